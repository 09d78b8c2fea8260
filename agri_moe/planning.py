"""What a config will cost before it runs: parameters, memory, operations, time and disk, and what would make it fit.

Read are the config, the configs of the models, the tokenizer, and the rows where they are local and few; no weights.
Imported only by `plan`, since Lightning takes seconds to load.
"""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from agri_moe import cost
from agri_moe.data.chat import Chat, Segment
from agri_moe.data.packing import pack
from agri_moe.data.sources import find_sources
from agri_moe.models.base import LanguageModule, parameter_counts
from agri_moe.models.causal import CausalModel
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.distill import ANCHOR, TEACHER, DistillModule, head_rows
from agri_moe.models.experts import visits
from agri_moe.rehearsal import Models, Rehearsal, Rows, Setting, rehearse
from agri_moe.training_cli import TrainingCLI, run_training

READ_AT_MOST = 64_000_000
"""Bytes of training files up to which their rows are read and tokenised: about a minute."""
ASSUMED_THOUGHT, ASSUMED_ADVISORY = 0.25, 0.25
"""Shares of the tokens where rows cannot be read: half prompt, a quarter each thought and advisory."""


class ConfigOnly(TrainingCLI):
    """Parses what `fit` parses and makes module and data module, but no trainer; runs nothing."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: a trainer would take hold of devices."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""

    def _set_seed(self) -> None:
        """Nothing: no number is drawn."""


def read_config(args: Sequence[str]) -> ConfigOnly:
    """The module and data module of a `fit` command line, and its settings.

    Raises:
        SystemExit: Status 2, after one sentence, if a key or value is wrong, as `fit` does.
    """
    warnings.filterwarnings("ignore", ".*activation_checkpointing_enable.*")
    return run_training("fit", args, ConfigOnly)


# ---------------------------------------------------------------------- what the trainer's settings say


Strategy = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Run:
    """What of the trainer's settings costs something."""

    ranks: int
    strategy: Strategy
    precision: Literal["32-true", "bf16-mixed", "bf16-true"]
    accelerator: bool
    accumulate: int
    max_steps: int
    max_epochs: int | None
    limit: int | float
    kept: int  # checkpoints; -1 is all
    save_every: int

    @property
    def weight_size(self) -> int:
        """Bytes of a parameter of the student, of its gradient and of each of its moments."""
        return 2 if self.precision == "bf16-true" else 4


PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "bf16-true"]] = {
    **dict.fromkeys(("None", "32", "32-true"), "32-true"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bf16-mixed"),
    "bf16-true": "bf16-true",
}


def read_run(trainer: dict[str, Any]) -> Run:
    """What the trainer's settings mean; `auto` devices are counted as one.

    Raises:
        ValueError: If a setting is one that `fit` refuses, or that this arithmetic does not know.
    """
    precision = str(trainer["precision"])
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision: {precision} is not supported; use bf16-mixed, bf16-true or 32-true.")
    strategy = trainer["strategy"]
    named = strategy if isinstance(strategy, str) else str(strategy["class_path"])
    sharded = named.endswith("ModelParallelStrategy")
    devices = trainer["devices"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    if sharded and count == 1 and not isinstance(strategy, str):
        size = (strategy.get("init_args") or {}).get("data_parallel_size", "auto")
        count = size if isinstance(size, int) else 1
    ranks = count * int(trainer["num_nodes"])
    if not sharded and named != "auto" and not named.startswith("ddp"):
        raise ValueError(f"trainer.strategy: plan knows auto, ddp and ModelParallelStrategy, not {named}.")
    kind: Strategy = "fsdp2" if sharded else "ddp" if ranks > 1 or named.startswith("ddp") else "single"
    saving: dict[str, Any] = next(
        (c["init_args"] for c in trainer["callbacks"] or [] if c["class_path"].endswith(".Checkpoint")), {}
    )
    limit = trainer["limit_train_batches"]
    return Run(
        ranks=ranks,
        strategy=kind,
        precision=PRECISIONS[precision],
        accelerator=trainer["accelerator"] != "cpu",
        accumulate=trainer["accumulate_grad_batches"],
        max_steps=trainer["max_steps"],
        max_epochs=trainer["max_epochs"],
        limit=1.0 if limit is None else limit,
        kept=saving.get("keep", 2),
        save_every=saving.get("every_n_steps") or 500,  # by the clock alone, its number is not known
    )


# ---------------------------------------------------------------------- what the rows say


@dataclass(frozen=True)
class Supply:
    """What training rows give to a micro-batch and to an epoch."""

    rows: Rows
    fill: float  # share of the sequences' places that hold a token
    sequences: int | None  # of an epoch; None where rows were not read
    tokens: int | None
    cache_bytes: int | None
    note: str


def read_supply(data: Any, module: LanguageModule) -> Supply:
    """From the training rows where they are local files of moderate size, else by assumption, and says which."""
    length = data.max_length if hasattr(data, "max_length") else data.block_size
    per_batch = max(1, data.tokens_per_batch // length)
    view = getattr(module, "teacher_view", None)
    view = None if view is None else view.of(data.chat)
    chat_rows = hasattr(data, "teacher_view")
    try:
        return _read_supply(data, view, length, per_batch)
    except ValueError as error:
        reason = str(error)
    thought, advisory = (ASSUMED_THOUGHT, ASSUMED_ADVISORY) if chat_rows else (0.0, 1.0)
    rows = Rows(per_batch, length, length if view is not None else None, thought, advisory)
    assumed = f"sequences assumed full, {thought:.0%} of the tokens thought and {advisory:.0%} advisory"
    return Supply(rows, 1.0, None, None, None, f"{assumed}: {reason}")


def _read_supply(data: Any, view: Any, length: int, per_batch: int) -> Supply:
    sources = find_sources(data.train, "data.train")
    if any(source.kind == "hub" for source in sources) or getattr(data, "streaming", False):
        raise ValueError("data.train is streamed, or a dataset of the hub, which is not read here.")
    size = sum(Path(source.name).stat().st_size for source in sources)
    if size > READ_AT_MOST:
        raise ValueError(f"data.train has {size / 1e9:.2f} GB, which is not read here.")
    if hasattr(data, "teacher_view"):
        data.teacher_view = view
    data.check()
    rows = data.rows("train")
    sequences = pack(rows.lengths, length, data.seed)
    tokens = int(rows.lengths.sum())
    thought, advisory = (
        int(rows.counts[:, 0, segment].sum()) / tokens for segment in (Segment.THOUGHT, Segment.ASSISTANT)
    )
    longest = min(-(-max(int(rows.lengths[chosen].sum()) for chosen in sequences) // 8) * 8, length)
    teacher_length = None
    if "teacher_ids" in rows.table.column_names:
        read = sum(
            len(ids) for ids in rows.table.select_columns(["teacher_ids"]).with_format("arrow")[:]["teacher_ids"]
        )
        teacher_length = -(-round(longest * read / tokens) // 8) * 8
    fill = tokens / (len(sequences) * longest)
    shares = thought * fill, advisory * fill
    held = Rows(min(per_batch, len(sequences)), longest, teacher_length, *shares)
    note = f"{len(rows):,} rows read, {tokens:,} tokens in {len(sequences):,} sequences, {fill:.0%} full"
    return Supply(held, fill, len(sequences), tokens, rows.table.data.nbytes, note)


# ---------------------------------------------------------------------- what the models are


class Model(NamedTuple):
    """A model's numbers."""

    total: int
    active: int
    matrices: cost.Matrices
    pieces: cost.Pieces


def weigh(config: PreTrainedConfig, trained: frozenset[str], projections: dict[tuple[int, int], int]) -> Model:
    """Count a model's parameters on the meta device.

    Args:
        config: Its config.
        trained: Names of the parameters that learn.
        projections: Of the objective, which learn too and are part of no model.
    """
    with torch.device("meta"):
        model = CausalModel(AutoModelForCausalLM.from_config(config), projections)
    total, active, _ = parameter_counts(model)
    body = body_trained = 0.0
    layers: dict[str, int] = {}
    learns = sum(p.numel() for p in model.projections.parameters())
    for name, parameter in model.hf.named_parameters():
        numbers = parameter.numel()
        learns += numbers * (name in trained)
        if (layer := re.search(r"\.layers\.(\d+)\.", name)) is None:
            continue
        layers[layer[1]] = layers.get(layer[1], 0) + numbers
        visited = numbers * visits(name, model.top_k, model.num_experts) * (parameter.ndim > 1)
        body += visited
        body_trained += visited * (name in trained)
    head = model.hf.get_output_embeddings().weight
    head_name = next(name for name, parameter in model.hf.named_parameters() if parameter is head)
    heads = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    matrices = cost.Matrices(
        round(body), round(body_trained), config.num_hidden_layers * heads, head.numel(), head_name in trained
    )
    everything = sum(p.numel() for p in model.parameters())
    pieces = cost.Pieces(everything, learns, max(layers.values()), everything - sum(layers.values()))
    return Model(total, active, matrices, pieces)


def model_configs(module: LanguageModule, chat: Chat) -> Models:
    """The configs of what `fit` would load, each with room for the markers that its vocabulary lacks.

    Raises:
        ValueError: If one cannot be read.
    """
    student = module.model_config
    config = student.hf_config(module.model_key, chat)
    teacher = anchor = None
    dtype = torch.bfloat16
    if isinstance(module, DistillModule):
        if module.teacher_config is not None:
            dtype = module.teacher_config.torch_dtype
            if module.uses_teacher and module.cache is None:
                source = str(module.teacher_config.source)
                teacher = _with_room(load_config(source, TEACHER), source, chat)
        if module.uses_anchor:
            source = str(module.anchor_source)
            anchor = _with_room(load_config(source, ANCHOR), source, chat)
    if student.source is not None:
        config = _with_room(config, student.source, chat)
    return Models(config, teacher, anchor, dtype, student.attn_implementation)


def _with_room(config: PreTrainedConfig, source: str, chat: Chat) -> PreTrainedConfig:
    """The config as `start_rows` leaves it."""
    config.vocab_size = head_rows(source, config, chat)
    return config


# ---------------------------------------------------------------------- the plan


class Part(NamedTuple):
    """Something that takes memory on one rank."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """What one rank holds."""

    parts: list[Part]
    peak: int
    when: str

    def fits(self, limit: int) -> bool:
        """Whether it stays within so many bytes."""
        return self.peak <= limit


class Remedy(NamedTuple):
    """A setting that changes the peak."""

    setting: str
    peak: int


class Duration(NamedTuple):
    """How long the run takes; None where its steps cannot be counted."""

    flops_per_token: float
    step_tokens: int
    step_seconds: float
    tokens_per_second: float
    steps: int | None
    hours: float | None


class Disk(NamedTuple):
    """Bytes on disk; None where rows were not read, or the objective needs more of a teacher than its logits."""

    checkpoint: int
    checkpoints: int
    kept: int
    row_cache: int | None
    teacher_cache: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` tells."""

    run: Run
    supply: Supply
    stage: int
    stages: int
    student: Model
    teacher: Model | None
    anchor: Model | None
    memory: Memory
    remedies: list[Remedy]
    work: cost.Work
    throughput: float | None
    duration: Duration | None
    disk: Disk


class Planner:
    """Works a config out.

    Args:
        module: From the config, nothing loaded.
        data: Its data module.
        run: The trainer's settings.

    Raises:
        ValueError: If a setting or a config is wrong.
    """

    def __init__(self, module: LanguageModule, data: Any, run: Run):
        self.module, self.run = module, run
        self.chat: Chat = data.chat
        module.check(self.chat)
        module.check_steps(run.max_steps)
        self.supply = read_supply(data, module)
        self.models = model_configs(module, self.chat)
        with torch.device("meta"):
            self.names = [n for n, _ in AutoModelForCausalLM.from_config(self.models.student).named_parameters()]
        self.teacher, self.anchor = (
            None if config is None else weigh(config, frozenset(), {})
            for config in (self.models.teacher, self.models.anchor)
        )
        self.whole = self.student(None)
        self._rehearsed: dict[tuple[Rows, Setting], Rehearsal] = {}  # the number of ranks changes none of them

    def trained(self, stage: int | None) -> frozenset[str]:
        """Names of the parameters that learn in a stage; None asks for those that learn in any."""
        chosen = self.module.stages if stage is None else [self.module.stages[stage]]
        by_stage = [settings.scales(self.names) for settings in chosen]
        return frozenset(name for name in self.names if any(scales[name] > 0 for scales in by_stage))

    def student(self, stage: int | None) -> Model:
        """Numbers of the student as a stage trains it."""
        return weigh(self.models.student, self.trained(stage), self.module.projections(self.models.student))

    # ------------------------------------------------------------------ memory

    def memory(self, stage: int, run: Run, rows: Rows, *, checkpointing: bool) -> Memory:
        """What one rank holds in a stage."""
        # Gradients that DDP and FSDP2 wait for are fixed for the whole run, whatever a stage trains.
        trained = self.trained(stage if run.strategy == "single" else None)
        setting = Setting(
            run.precision, run.accelerator, run.strategy == "fsdp2", run.accumulate, checkpointing, stage, trained
        )
        if (rows, setting) not in self._rehearsed:
            control_ids = sorted(self.chat.control_ids)
            self._rehearsed[rows, setting] = rehearse(self.module, self.models, rows, setting, control_ids)
        held = self._rehearsed[rows, setting]
        parts = self._states(run, held)
        always = sum(part.bytes for part in parts)
        worst = held.peak
        if run.strategy == "fsdp2":
            parts.append(Part("gradients", run.weight_size * self.whole.pieces.trained // run.ranks))
            always += parts[-1].bytes
        else:
            parts.append(Part("gradients", held.gradients))  # counted in the phases
        parts += _phase_parts(held)
        return Memory(parts, always + worst.peak, worst.name)

    @property
    def float8(self) -> bool:
        """Whether the teacher's linear maps are kept in float8; the experts of a sparse one are not."""
        teacher = self.module.teacher_config if isinstance(self.module, DistillModule) else None
        return teacher is not None and teacher.dtype.startswith("float8")

    def _states(self, run: Run, held: Rehearsal) -> list[Part]:
        """What lies there from the first step to the last, besides gradients."""
        sharded, size = run.strategy == "fsdp2", run.weight_size
        ranks = run.ranks if sharded else 1
        frozen_size = self.models.frozen_dtype.itemsize
        parts, pieces = [], self.whole.pieces
        for name, model in (("teacher", self.teacher), ("anchor", self.anchor)):
            if model is not None:
                # The head of a frozen model stays whole on every rank.
                whole = model.matrices.head if sharded else 0
                held_bytes = frozen_size * ((model.pieces.total - whole) // ranks + whole)
                if name == "teacher" and self.float8 and model.active == model.total:
                    held_bytes -= model.matrices.body  # one byte for each of their numbers in place of two
                parts.append(Part(f"{name}: weights", held_bytes))
                if sharded:
                    parts.append(Part(f"{name}: layers gathered", cost.gathered(model.pieces, frozen_size, root=False)))
        parts.append(Part("student: weights", size * pieces.total // ranks))
        moments = round(self.module.optimizer_config.moment_bytes(size) * pieces.trained)
        parts.append(Part("optimizer: moments", moments // ranks))
        if run.strategy == "ddp":
            parts.append(Part("DDP: buckets of gradients", held.gradients))
        if sharded:
            used = 4 if run.precision == "32-true" else 2
            parts.append(Part("student: layers and head gathered", cost.gathered(pieces, used)))
            parts.append(Part("gradients on their way", cost.reduced(pieces, used)))
        if run.accelerator:
            parts.append(Part("CUDA's own, assumed", cost.RESERVED))
        return parts

    def most_expensive(self) -> tuple[int, Memory]:
        """The stage with the highest peak."""
        found = [
            self.memory(stage, self.run, self.supply.rows, checkpointing=self.module.gradient_checkpointing)
            for stage in range(len(self.module.stages))
        ]
        stage = max(range(len(found)), key=lambda i: found[i].peak)
        return stage, found[stage]

    def remedies(self, stage: int, limit: int) -> list[Remedy]:
        """Settings in the order of what they cost the run, up to the first that makes it fit."""
        rows, checkpointing = self.supply.rows, self.module.gradient_checkpointing
        tried: list[Remedy] = []
        for words, run, changed, recompute in self._candidates(rows, checkpointing):
            memory = self.memory(stage, run, changed, checkpointing=recompute)
            tried.append(Remedy(words, memory.peak))
            if memory.fits(limit):
                break
        return tried

    def _candidates(self, rows: Rows, checkpointing: bool) -> Iterator[tuple[str, Run, Rows, bool]]:
        also = ""
        if not checkpointing:
            also = "model.gradient_checkpointing: true"
            yield also, self.run, rows, True
            also += " and "
        sequences = rows.sequences
        while sequences > 1:
            sequences //= 2
            fewer = replace(rows, sequences=sequences)
            accumulate = self.run.accumulate * (rows.sequences // sequences)
            tokens = sequences * rows.length
            words = f"data.tokens_per_batch: {tokens} with trainer.accumulate_grad_batches: {accumulate}"
            if not checkpointing:
                yield words, self.run, fewer, False
            yield also + words, self.run, fewer, True
        for ranks in (2, 4, 8, 16, 32, 64):
            if self.run.strategy != "fsdp2" or ranks > self.run.ranks:
                words = f"FSDP2 over {ranks} GPUs (ModelParallelStrategy, data_parallel_size: {ranks})"
                yield also + words, replace(self.run, strategy="fsdp2", ranks=ranks), rows, True

    # ------------------------------------------------------------------ operations, time, disk

    def work(self, stage: int) -> cost.Work:
        """Operations for one token of the student's sequences."""
        rows, objective = self.supply.rows, self.module.stages[stage].objective
        share = {"thought": rows.thought, "assistant": rows.advisory}
        supervised = min(sum(share.get(name, 0.0) for name in objective.ce.segments), 1.0)
        taught = sum(share.get(name, 0.0) for name in objective.kl.segments) if objective.uses("kl") else 0.0
        teacher = self.teacher if objective.uses_teacher else None
        anchor = self.anchor if objective.uses_anchor else None
        student = self.student(stage) if self.run.strategy == "single" else self.whole
        return cost.work(
            student.matrices,
            teacher.matrices if teacher else None,
            anchor.matrices if anchor else None,
            length=rows.length,
            teacher_length=rows.teacher_length or rows.length,
            supervised=supervised,
            taught=taught,
            recompute=self.module.gradient_checkpointing,
        )

    def steps(self) -> int | None:
        """Optimizer steps of the run; None where only epochs end it and rows were not counted."""
        run, supply = self.run, self.supply
        limits = [run.max_steps] if run.max_steps > 0 else []
        if supply.sequences is not None and run.max_epochs is not None and run.max_epochs > 0:
            per_epoch = cost.epoch_steps(
                supply.sequences,
                per_batch=supply.rows.sequences,
                ranks=run.ranks,
                accumulate=run.accumulate,
                limit=run.limit,
            )
            limits.append(run.max_epochs * per_epoch)
        return min(limits, default=None)

    def duration(self, work: cost.Work, throughput: float) -> Duration:
        """How long it takes if each rank makes `throughput` operations a second."""
        rows = self.supply.rows
        places = rows.sequences * rows.length * self.run.accumulate
        seconds = places * work.total / throughput
        tokens = round(places * self.supply.fill) * self.run.ranks
        steps = self.steps()
        hours = None if steps is None else steps * seconds / 3600
        return Duration(work.total, tokens, seconds, tokens / seconds, steps, hours)

    def disk(self) -> Disk:
        """What checkpoints and caches take."""
        run, supply, pieces = self.run, self.supply, self.whole.pieces
        moments = round(self.module.optimizer_config.moment_bytes(run.weight_size) * pieces.trained)
        checkpoint = run.weight_size * pieces.total + moments
        kept = run.kept
        if kept < 0:
            steps = self.steps()
            kept = 1 if steps is None else math.ceil(steps / run.save_every)
        objectives = self.module.objectives
        logits_only = not any(o.uses("cka", "hidden", "attention") for o in objectives)
        teacher_cache = None
        if supply.tokens is not None and logits_only and any(o.uses("kl") for o in objectives):
            share = supply.rows.advisory + supply.rows.thought * any("thought" in o.kl.segments for o in objectives)
            teacher_cache = round(cost.CACHED_LOGITS * share / supply.fill * supply.tokens)
        return Disk(checkpoint, checkpoint * kept, kept, supply.cache_bytes, teacher_cache)

    def plan(self, throughput: float | None, limit: int) -> Plan:
        """All of it.

        Args:
            throughput: Operations a second of one rank; by default a share of an H100's, and none for a CPU.
            limit: Bytes of one GPU.
        """
        stage, memory = self.most_expensive()
        if throughput is None and self.run.accelerator:
            throughput = cost.default_throughput(self.run.precision)
        work = self.work(stage)
        return Plan(
            run=self.run,
            supply=self.supply,
            stage=stage,
            stages=len(self.module.stages),
            student=self.student(stage),
            teacher=self.teacher,
            anchor=self.anchor,
            memory=memory,
            remedies=[] if memory.fits(limit) else self.remedies(stage, limit),
            work=work,
            throughput=throughput,
            duration=None if throughput is None else self.duration(work, throughput),
            disk=self.disk(),
        )


def _phase_parts(held: Rehearsal) -> list[Part]:
    """What comes and goes in a micro-batch. Not all of it is there at once, which is why the peak is no sum."""
    at = {phase.name: phase for phase in held.phases}
    student, loss = at["student's forward pass"], at["loss"]
    backward, terms = at["backward pass"], at["terms on samples"]
    parts = [
        Part(f"{name.split(chr(39))[0]}: while it answers", at[name].peak - at[name].start)
        for name in ("teacher's forward pass", "anchor's forward pass")
        if name in at
    ]
    return [
        *parts,
        Part("activations for the backward pass", loss.start - student.start - held.weight_copies),
        Part("bfloat16 copies of weights", held.weight_copies),
        Part("loss: logits of a chunk, operands", loss.peak - loss.end),
        Part("loss: gradients of head and hidden states", loss.end - loss.start),
        Part("terms on samples", terms.peak - terms.start),
        Part("backward pass: above its beginning", backward.peak - backward.start),
    ]
