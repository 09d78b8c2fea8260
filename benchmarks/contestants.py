"""Three ways to take a distillation step, on the same rows and models: ours, TRL's GKDTrainer, a plain one.

All distil the same teacher into the same student with the same rows in the same micro-batches, and end in clipping and
an AdamW step; collation is part of the step, logging is not. The tokens learned are those of thought and advisory. The
weights are random, which costs as much as any. The tests hold the gradients of all three against each other.

    ours   `DistillModule`, rows packed; CE, forward KL and the routers' terms
    gkd    `trl.experimental.gkd.GKDTrainer` at lmbda 0, beta 0 (forward KL), temperature 1, with its own collator;
           neither CE nor the routers' terms. Driven by its `training_step`, since the contestants take turns
    plain  what one writes first: right padding, logits of every token, then CE and KL where there is a label
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for every model; read when tqdm is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from measure import DATA, OUTPUT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from agri_moe.data.chat import Segment
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.packing import PackedRow, StepTotals, collate, count_targets, pack
from agri_moe.models.causal import CausalModel
from agri_moe.models.distill import DistillModule
from agri_moe.models.source import StudentConfig
from agri_moe.models.upcycle import UpcycleSpec, moe_config
from agri_moe.objective import Objective
from agri_moe.teacher import OnlineTeacher, TeacherConfig
from agri_moe.terms import KL

OURS, GKD, PLAIN = "ours", "gkd", "plain"
SUPERVISED = (Segment.THOUGHT, Segment.ASSISTANT)
IGNORED = -100
LEARNING_RATE = 1e-4
SOURCES = ("plant_disease", "soil", "hindi_qa")

# ---------------------------------------------------------------------- rows and models


class Corpus(NamedTuple):
    """Rows, and what the data module knows of their tokens."""

    rows: list[PackedRow]
    control_ids: frozenset[int]
    pad_id: int


def real_data(max_length: int) -> ChatDataModule:
    """The data module over the training rows of the folder named by AGRI_MOE_DATA."""
    if not DATA.is_dir():
        raise SystemExit(
            f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real rows, or take --random ones."
        )
    return ChatDataModule(
        tokenizer=str(DATA / "qwen3-0.6b"),
        train=[str(DATA / f"{name}_train.parquet") for name in SOURCES],
        validation_share=0.0,
        max_length=max_length,
        bad_rows="skip",  # longer rows
        cache_dir=str(OUTPUT / "cache"),
    )


def real_rows(count: int, max_length: int, seed: int) -> Corpus:
    """A seeded draw from the real rows of at most `max_length` tokens, in Qwen3's tokens."""
    data = real_data(max_length)
    rows = data.rows("train")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count].tolist()
    picked = [rows.table[i] for i in chosen]
    packed = [PackedRow(i, np.array(row["input_ids"]), np.array(row["segment_ids"])) for i, row in enumerate(picked)]
    return Corpus(packed, data.chat.control_ids, data.chat.pad_id)


def random_rows(count: int, max_length: int, seed: int, vocabulary: int) -> Corpus:
    """Random tokens at roughly the lengths of the real rows: median 190, one in six near 1,000."""
    random = np.random.default_rng(seed)
    end = vocabulary - 1
    rows = []
    for i in range(count):
        middle = 1000 if random.random() < 1 / 6 else 185
        size = int(np.clip(random.normal(middle, middle / 5), 16, max_length))
        parts = [size - 2 * (size // 8), size // 8, size // 8]
        segments = np.repeat([int(Segment.USER), int(Segment.THOUGHT), int(Segment.ASSISTANT)], parts)
        rows.append(PackedRow(i, np.append(random.integers(0, end, size - 1), end), segments))
    return Corpus(rows, frozenset([end]), end)


@dataclass(frozen=True)
class Setting:
    """Everything that the contestants have in common.

    Args:
        student: Config of a Mixture-of-Experts.
        teacher: Config of a dense model with the same vocabulary.
        micro_batches: Rows of each micro-batch of the step.
        corpus: Where they come from.
        max_length: Longest packed sequence.
        device: cpu or cuda.
        mixed: bf16-mixed, with a bf16 teacher; else everything is float32.
        gradient_checkpointing: Recompute activations, for all contestants.
    """

    student: PreTrainedConfig
    teacher: PreTrainedConfig
    micro_batches: list[list[PackedRow]]
    corpus: Corpus
    max_length: int
    device: str = "cpu"
    mixed: bool = False
    gradient_checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the step's rows."""
        return sum(len(row.input_ids) for rows in self.micro_batches for row in rows)

    def totals(self) -> StepTotals:
        """What the whole step holds."""
        rows = [row for rows in self.micro_batches for row in rows]
        control = self.corpus.control_ids
        counts = [count_targets(row.input_ids.tolist(), row.segment_ids.tolist(), control) for row in rows]
        return StepTotals(np.sum(counts, axis=0), self.tokens, len(self.micro_batches))

    def new_student(self) -> PreTrainedModel:
        """The student in training, with float32 weights that are the same each time."""
        model = self._new(self.student, torch.float32).train()
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def new_teacher(self) -> PreTrainedModel:
        """The teacher, frozen."""
        return self._new(self.teacher, torch.bfloat16 if self.mixed else torch.float32).eval().requires_grad_(False)

    def _new(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.config.use_cache = False
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """What Lightning's bf16-mixed puts around the forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.mixed)


def qwen3(vocabulary: int, width: int, layers: int) -> PreTrainedConfig:
    """A small Qwen3: heads of 64, two query heads to a key-value head, FFN of three widths, tied."""
    heads = max(width // 64, 2)
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
        tie_word_embeddings=True,
    )


def in_micro_batches(corpus: Corpus, micro_rows: int) -> list[list[PackedRow]]:
    """The rows, so many at a time."""
    return [corpus.rows[i : i + micro_rows] for i in range(0, len(corpus.rows), micro_rows)]


# ---------------------------------------------------------------------- contestants


class Ours:
    """`DistillModule` without a trainer.

    Args:
        setting: Models and rows.
        teacher: Shared with the other contestants.
        packed: Several rows to a sequence; else each row is a sequence of its own, padded to the longest.
        objective: Changes to the objective; by default CE and KL on thought and advisory, and the routers' terms.
    """

    def __init__(
        self, setting: Setting, teacher: PreTrainedModel, *, packed: bool = True, objective: Objective | None = None
    ) -> None:
        self.setting = setting
        self.sequences = [self._sequences(rows, packed) for rows in setting.micro_batches]
        self.totals = setting.totals()
        objective = objective or Objective(kl=KL(weight=1.0, segments=["thought", "assistant"]))
        with tempfile.TemporaryDirectory() as folder:
            setting.teacher.save_pretrained(folder)  # the module asks its config, for the number of layers
            self.module = DistillModule(
                student=StudentConfig(source=None, upcycle=None),
                teacher=TeacherConfig(folder),
                objective=objective,
                learning_rate=LEARNING_RATE,
            )
            self.module._trainer = self._trainer()
            self.module.build(setting.new_student())
        object.__setattr__(self.module, "teacher", OnlineTeacher(CausalModel(teacher)))
        self.optimizer = self.module.configure_optimizers()["optimizer"]

    def _sequences(self, rows: list[PackedRow], packed: bool) -> list[list[PackedRow]]:
        if not packed:
            return [[row] for row in rows]
        return [[rows[i] for i in chosen] for chosen in pack([len(r.input_ids) for r in rows], self.setting.max_length)]

    def _trainer(self) -> Any:
        """As much of a trainer as a step asks for."""
        control = SimpleNamespace(control_ids=self.setting.corpus.control_ids)
        return SimpleNamespace(
            datamodule=SimpleNamespace(chat=control),
            strategy=SimpleNamespace(root_device=torch.device(self.setting.device)),
            world_size=1,
            accumulate_grad_batches=len(self.sequences),
            global_step=0,
            max_steps=1000,
            precision="bf16-mixed" if self.setting.mixed else "32-true",
            training=True,
            validating=False,
        )

    def step(self) -> None:
        """Every micro-batch, then the optimizer."""
        corpus, device = self.setting.corpus, torch.device(self.setting.device)
        for sequences in self.sequences:
            with record_function("data"):
                batch = collate(sequences, self.totals, self.setting.max_length, corpus.pad_id)
                batch = self.module.on_before_batch_transfer(batch, 0)
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with record_function("student forward"), self.setting.autocast():
                loss = self.module.training_step(batch, 0)["loss"]
            with record_function("backward"):
                (loss / len(self.sequences)).backward()
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.module.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.module._step_terms.clear()  # on_before_optimizer_step would log them


class Gkd:
    """TRL's GKDTrainer, driven step by step."""

    def __init__(self, setting: Setting, teacher: PreTrainedModel) -> None:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        self.setting = setting
        arguments = GKDConfig(
            output_dir=tempfile.gettempdir(),
            use_cpu=setting.device == "cpu",
            bf16=setting.mixed,
            gradient_checkpointing=False,  # `Trainer.train` would enable it; the student comes with it
            per_device_train_batch_size=len(setting.micro_batches[0]),
            gradient_accumulation_steps=len(setting.micro_batches),
            max_steps=1000,
            learning_rate=LEARNING_RATE,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_length=setting.max_length,
            report_to=[],
            save_strategy="no",
        )
        self.examples = [[self._example(row) for row in rows] for rows in setting.micro_batches]
        self.trainer = GKDTrainer(
            model=setting.new_student(),
            teacher_model=copy.copy(teacher),  # accelerate gives it another forward, which is not for the others
            args=arguments,
            train_dataset=Dataset.from_list(self.examples[0]),
            processing_class=self._tokenizer(setting.corpus.pad_id),
        )
        self.trainer.create_optimizer()
        # As `Trainer.train` does: this is what puts autocast around the forward pass.
        accelerator = self.trainer.accelerator
        self.model, self.trainer.optimizer = accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.create_scheduler(1000)

    @staticmethod
    def _tokenizer(pad_id: int) -> PreTrainedTokenizerFast:
        """All that the collator asks of a tokenizer when rows come as ids: what to pad with."""
        words = {"<pad>": pad_id}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
        )

    @staticmethod
    def _example(row: PackedRow) -> dict[str, Any]:
        """The very ids that the others see; the collator takes them as they are."""
        mask = np.isin(row.segment_ids, SUPERVISED).astype(int).tolist()
        return {"prompt": "", "input_ids": row.input_ids.tolist(), "completion_mask": mask}

    def step(self) -> None:
        """Every micro-batch, then the optimizer, as `Trainer.train` does it."""
        trainer = self.trainer
        batches = [trainer.data_collator(examples) for examples in self.examples]
        labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        for batch in batches:
            trainer.training_step(self.model, batch, labels)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad(set_to_none=True)


class Plain:
    """Padding, full logits, CE and KL at the labels."""

    def __init__(self, setting: Setting, teacher: PreTrainedModel) -> None:
        self.setting = setting
        self.teacher = teacher
        self.student = setting.new_student()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE, fused=True)

    def _batch(self, rows: list[PackedRow]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask and labels, [B, T]."""
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        ids = np.full(shape, self.setting.corpus.pad_id)
        mask = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED)
        for b, row in enumerate(rows):
            size = len(row.input_ids)
            ids[b, :size], mask[b, :size] = row.input_ids, 1
            labels[b, :size] = np.where(np.isin(row.segment_ids, SUPERVISED), row.input_ids, IGNORED)
        ids_BT, mask_BT, labels_BT = (torch.from_numpy(a).to(self.setting.device) for a in (ids, mask, labels))
        return ids_BT, mask_BT, labels_BT

    def step(self) -> None:
        """Every micro-batch, then the optimizer."""
        batches = [self._batch(rows) for rows in self.setting.micro_batches]
        total = sum((labels[:, 1:] != IGNORED).sum() for _, _, labels in batches)
        for ids, mask, labels in batches:
            with self.setting.autocast():
                logits = self.student(input_ids=ids, attention_mask=mask).logits[:, :-1]
                with torch.no_grad():
                    teacher_logits = self.teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]
            chosen = labels[:, 1:] != IGNORED
            student_NV, teacher_NV = logits[chosen].float(), teacher_logits[chosen].float()
            ce = F.cross_entropy(student_NV, labels[:, 1:][chosen], reduction="sum")
            log_q_s, log_q_t = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
            kl = F.kl_div(log_q_s, log_q_t, reduction="sum", log_target=True)
            ((ce + kl) / total).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


CONTESTANTS: dict[str, Callable[[Setting, PreTrainedModel], Any]] = {OURS: Ours, GKD: Gkd, PLAIN: Plain}
"""Name -> class with a `step()`."""


def installed() -> list[str]:
    """The contestants whose packages are there."""
    return [name for name in CONTESTANTS if name != GKD or find_spec("trl")]


# ---------------------------------------------------------------------- from the command line


def parser(description: str, rows: int, micro_rows: int) -> argparse.ArgumentParser:
    """Models and rows of a step, from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--micro_rows", type=int, default=micro_rows, help="rows of a micro-batch")
    parser.add_argument("--max_length", type=int, default=1024, help="longest row; GKDTrainer's own default")
    parser.add_argument("--random", action="store_true", help="random tokens in place of the real rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--teacher_width", type=int, default=1152)
    parser.add_argument("--teacher_layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What the command line asks for."""
    rows, longest, seed = arguments.rows, arguments.max_length, arguments.seed
    corpus = random_rows(rows, longest, seed, arguments.vocabulary) if arguments.random else None
    corpus = corpus or real_rows(rows, longest, seed)
    dense = qwen3(arguments.vocabulary, arguments.width, arguments.layers)
    return Setting(
        student=moe_config(dense, UpcycleSpec(num_experts=8, num_experts_per_tok=2)),
        teacher=qwen3(arguments.vocabulary, arguments.teacher_width, arguments.teacher_layers),
        micro_batches=in_micro_batches(corpus, arguments.micro_rows),
        corpus=corpus,
        max_length=2 * longest,
    )
