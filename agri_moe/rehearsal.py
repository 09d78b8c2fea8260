"""A training step without numbers: what it holds in memory, found by running it on tensors that have no storage.

Student, teacher and terms of the objective are the very ones that `fit` runs, on PyTorch's fake tensors: shapes and
types are worked out, autograd saves and frees what it would, and nothing is computed. Only the fused loss is replaced,
by one that allocates what it does (its passes read numbers back on a CPU).

Shapes: B sequences, T tokens, N supervised positions, M of them with KL, D width, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from agri_moe.cost import LossShape, loss_workspace
from agri_moe.data.chat import Segment
from agri_moe.data.packing import PackedRow, StepTotals, collate, count_targets
from agri_moe.models.base import LanguageModule
from agri_moe.models.causal import CausalModel
from agri_moe.models.distill import DistillModule
from agri_moe.objective import Batch, Objective, Plan, Running
from agri_moe.schedules import AdaptiveTemperature, Moment
from agri_moe.teacher import OnlineTeacher, TeacherSignal


class Phase(NamedTuple):
    """A part of a micro-batch and the bytes that are held, above the weights, when it begins, at most, and after it."""

    name: str
    start: int
    peak: int
    end: int


class Rehearsal(NamedTuple):
    """What a micro-batch holds, in bytes, once training is under way; see `rehearse`."""

    phases: list[Phase]
    gradients: int  # of everything that is trained, after the backward pass
    weight_copies: int  # of weights in bfloat16, which autocast makes and autograd keeps, after the forward pass

    @property
    def peak(self) -> Phase:
        """The part that holds most."""
        return max(self.phases, key=lambda phase: phase.peak)


@dataclass(frozen=True)
class Models:
    """Configs of what a run loads, with vocabularies as they will be, and the type of the frozen models' weights."""

    student: PreTrainedConfig
    teacher: PreTrainedConfig | None
    anchor: PreTrainedConfig | None
    frozen_dtype: torch.dtype
    attn_implementation: str


@dataclass(frozen=True)
class Rows:
    """What a micro-batch holds: B full sequences, and which shares of their tokens are learned."""

    sequences: int
    length: int
    teacher_length: int | None  # as the teacher reads them; None where it reads the student's ids
    thought: float
    advisory: float


@dataclass(frozen=True)
class Setting:
    """How a step is run.

    Args:
        precision: Lightning's name.
        accelerator: Whether it is run on one; the loss then works on larger blocks.
        sharded: FSDP2: weights are gathered in the type that they are used in, and gradients are given away at once.
        accumulate: Micro-batches of an optimizer step.
        gradient_checkpointing: Whether the student's layers run again in the backward pass.
        stage: Which of the run's stages has its objective.
        trained: Names of the student's parameters that get a gradient.
    """

    precision: str
    accelerator: bool
    sharded: bool
    accumulate: int
    gradient_checkpointing: bool
    stage: int
    trained: frozenset[str]


def rehearse(module: LanguageModule, models: Models, rows: Rows, setting: Setting, control_ids: list[int]) -> Rehearsal:
    """Run two micro-batches without numbers; report the second, which finds the gradients of the first if they add up.

    Args:
        module: Fresh from the config, nothing loaded; it is given models without storage and is of no use afterwards.
        models: Configs.
        rows: The micro-batch.
        setting: How it is run.
        control_ids: Markers and the end of text.
    """
    ledger, batch = Ledger(), _batch(rows, control_ids)
    batch |= module.stages[setting.stage].objective.select(batch, control_ids) | module.routed_tokens(batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _grouped_mm_of_any_type():
        batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        with ledger:
            step = _build(module, models, setting, ledger)
            weights = ledger.live
            ledger.watch(module.model.parameters())
            for _ in range(2):
                ledger.phases.clear()
                copies = _micro_batch(step, batch)
        gradients = sum(p.grad.nbytes for p in module.model.parameters() if p.grad is not None)
    phases = [Phase(p.name, p.start - weights, p.peak - weights, p.end - weights) for p in ledger.phases]
    return Rehearsal(phases, gradients, copies)


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations inside the block have made and that are still alive.

    Real tensors and fake ones alike; not what a kernel allocates and frees before it returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.copies = 0
        self.peak = 0
        self.phases: list[Phase] = []
        self._known: set[int] = set()
        self._weights: set[int] = set()

    def watch(self, weights: Iterator[Tensor]) -> None:
        """From now on, count the copies of these in another type apart too."""
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note what the block holds."""
        start, self.peak = self.live, self.live
        yield
        self.phases.append(Phase(name, start, self.peak, self.live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and enter what it has made: views of what it was given are older."""
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        copy = func is torch.ops.aten._to_copy.default and not given.isdisjoint(self._weights)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._enter(leaf.untyped_storage(), copy)
        return out

    def _enter(self, storage: torch.UntypedStorage, copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.copies += size * copy
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size, copy)

    def _leave(self, key: int, size: int, copy: bool) -> None:
        self._known.discard(key)
        self.live -= size
        self.copies -= size * copy


# ---------------------------------------------------------------------- what is run


class _Step(NamedTuple):
    """What is run, and how."""

    module: LanguageModule
    objective: Objective
    plan: Plan
    running: Running
    setting: Setting
    ledger: Ledger


def _build(module: LanguageModule, models: Models, setting: Setting, ledger: Ledger) -> _Step:
    """Give the module models without storage, as `configure_model` gives it real ones."""
    # Under FSDP2 what is used is gathered in the type of the computation.
    in_half = setting.precision == "bf16-true" or (setting.sharded and setting.precision == "bf16-mixed")
    hf = _without_storage(models.student, torch.bfloat16 if in_half else torch.float32, models)
    hf.config.use_cache = False
    if setting.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    model = CausalModel(hf.train(), module.projections(hf.config), module.routing_config)
    objective = module.stages[setting.stage].objective
    plan = objective.plan(model.num_layers, module.teacher_layers)
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(name in setting.trained)
    model.projections.requires_grad_("hidden" in plan.pairs)
    if setting.sharded:
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(_give_away)
    module.model = model
    for key, config in (("teacher", models.teacher), ("anchor", models.anchor)):
        if config is not None:
            frozen = OnlineTeacher(CausalModel(_without_storage(config, models.frozen_dtype, models)))
            object.__setattr__(module, key, frozen)  # as `configure_model` does: they are no submodules
    return _Step(module, objective, plan, objective.running(plan), setting, ledger)


def _give_away(parameter: Tensor) -> None:
    parameter.grad = None


def _without_storage(config: PreTrainedConfig, dtype: torch.dtype, models: Models) -> PreTrainedModel:
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=models.attn_implementation)
    model.tie_weights()  # no_init_weights leaves a tied head untied
    return model


def _batch(rows: Rows, control_ids: list[int]) -> Batch:
    """A micro-batch of one row to a sequence: what memory depends on is how many tokens are learned, not which."""
    end = control_ids[0]
    tokens = int(rows.thought * rows.length), int(rows.advisory * rows.length)
    parts = [rows.length - sum(tokens), *tokens]
    segments = np.repeat([int(Segment.USER), int(Segment.THOUGHT), int(Segment.ASSISTANT)], parts)
    # An id that is no control token: those are not asked of the teacher.
    ids = np.full(rows.length, next(i for i in range(len(control_ids) + 1) if i not in control_ids))
    view: tuple[Any, ...] = ()
    if rows.teacher_length is not None:
        view = (np.full(rows.teacher_length, ids[0]), np.minimum(np.arange(rows.length), rows.teacher_length - 1))
    packed = [[PackedRow(i, ids, segments, *view)] for i in range(rows.sequences)]
    counts = count_targets(ids.tolist(), segments.tolist(), frozenset(control_ids)) * rows.sequences
    totals = StepTotals(counts, rows.sequences * rows.length, 1)
    return collate(packed, totals, rows.length, end)


def _micro_batch(step: _Step, batch: Batch) -> int:
    """Forward and backward pass as `DistillModule.training_step` makes them; bytes of copied weights in between."""
    if step.setting.accumulate == 1:
        step.module.zero_grad(set_to_none=True)
    with _autocast(step.setting.precision):
        loss = _forward(step, batch)
    copies = step.ledger.copies
    with step.ledger.phase("backward pass"):
        loss.backward()
    return copies


def _autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def _forward(step: _Step, batch: Batch) -> Tensor:
    module, objective, plan, phase = step.module, step.objective, step.plan, step.ledger.phase
    signal = anchor = None
    if isinstance(module, DistillModule):
        if objective.uses_teacher and module.cache is not None:
            signal = _as_cached(batch, module.cache.header.vocabulary)
        elif objective.uses_teacher:
            with phase("teacher's forward pass"):
                signal = module.teacher.signal(batch, plan.teacher)
        if objective.uses_anchor:
            with phase("anchor's forward pass"):
                anchor = module.anchor.anchor(batch, plan.anchor)
    with phase("student's forward pass"):
        out = module.model(batch, batch["positions"], _reader(step, signal), plan.student)
    with phase("terms on samples"):
        routed = module.routing(out, batch)
        now = Moment(replicas=step.setting.accumulate)
        terms = objective.sample_terms(out, signal, anchor, routed, batch, plan=plan, now=now, running=step.running)
        return torch.stack([out.read, *(term.loss for term in terms.values())]).sum()


def _as_cached(batch: Batch, vocabulary: int) -> TeacherSignal:
    """What `fused_ce_kl` takes a teacher by some of its tokens for: one of width 0."""
    positions = len(batch["kl_targets"])
    return TeacherSignal(torch.empty(positions, 0), torch.empty(vocabulary, 0), {}, {})


def _reader(step: _Step, signal: TeacherSignal | None) -> Callable[[Tensor, Tensor], Tensor]:
    """What takes the place of `Objective.logit_loss`."""
    objective, setting = step.objective, step.setting
    taught_MD, taught_VD = (signal.hidden_MD, signal.head_VD) if signal and objective.uses("kl") else (None, None)
    tempered = isinstance(objective.kl.temperature, AdaptiveTemperature) or objective.kl.temperature != 1.0

    def read(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        shape = LossShape(
            rows=len(hidden_ND),
            taught=0 if taught_MD is None else len(taught_MD),
            student=(head_VD.shape[0], head_VD.shape[1]),
            teacher=(0, 0) if taught_VD is None else (taught_VD.shape[0], taught_VD.shape[1]),
            hidden_size=hidden_ND.dtype.itemsize,
            student_size=head_VD.dtype.itemsize,
            teacher_size=2 if taught_VD is None else taught_VD.dtype.itemsize,
            operand_size=2 if setting.accelerator and setting.precision.startswith("bf16") else 4,
            tempered=tempered,
        )
        # Inside the student's forward pass, and reported before it.
        with step.ledger.phase("loss"):
            workspace = loss_workspace(shape, accelerator=setting.accelerator)
            teacher_MD = hidden_ND if taught_MD is None else taught_MD
            return _Loss.apply(hidden_ND, head_VD, teacher_MD, workspace)

    return read


class _Loss(torch.autograd.Function):
    """What `fused_ce_kl` allocates: gradients in float32 in the forward pass, beside logits that go again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, teacher_MD: Tensor, workspace: int) -> Tensor:
        ctx.save_for_backward(hidden_ND, head_VD, teacher_MD)
        wanted = zip((hidden_ND, head_VD), ctx.needs_input_grad, strict=False)
        ctx.gradients = [torch.empty_like(t, dtype=torch.float32) if needed else None for t, needed in wanted]
        torch.empty(workspace, dtype=torch.uint8)
        return hidden_ND.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        cast = [g if g is None else g.to(t.dtype) for g, t in zip(gradients, ctx.saved_tensors, strict=False)]
        return *cast, None, None


@contextmanager
def _grouped_mm_of_any_type() -> Iterator[None]:
    """Let the experts' product go without numbers in float32 too, which PyTorch's own knows only with numbers."""
    real = torch.nn.functional.grouped_mm

    def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor, **options: Any) -> Tensor:
        if a.dtype == torch.bfloat16:
            return real(a, b, offs=offs, **options)
        # transformers' stand-in for where there is no such kernel: the same results are allocated and saved.
        return torch.ops.transformers.grouped_mm_fallback(a, b, offs)

    with patch("torch.nn.functional.grouped_mm", grouped_mm):
        yield
