"""Distil a frozen teacher into a sparse student."""

import math
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from agri_moe.data.chat import Chat
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.logit_cache import (
    KEY,
    TOKENIZER,
    LogitCache,
    row_keys,
    teacher_fingerprint,
    template_fingerprint,
    tokenizer_fingerprint,
)
from agri_moe.data.merged_tokens import MergedTokens
from agri_moe.data.teacher_view import TeacherView
from agri_moe.losses.attention import check_head_map
from agri_moe.models.attention import check_readable
from agri_moe.models.base import LanguageModule
from agri_moe.models.causal import CausalModel
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.sharding import shard_frozen
from agri_moe.models.source import ModelConfig, StudentConfig, check_vocabulary, untrained_tokens
from agri_moe.models.upcycle import is_moe
from agri_moe.objective import Batch, Objective, Plan
from agri_moe.on_policy import OnPolicy, Sampled, check_on_policy, is_on_policy, sample_batch
from agri_moe.teacher import CachedTeacher, OnlineTeacher, TeacherConfig, TeacherSignal

TEACHER = "model.teacher.source"
ANCHOR = "model.anchor"


class DistillModule(LanguageModule):
    """A student in training beside frozen models that it learns from.

    They are kept out of the module tree: they are in no checkpoint, get no gradient and stay in eval mode.

    Args:
        student: The model to train; a dense source is upcycled on the fly.
        teacher: The model to learn from, or its answers on disk; may be left out if no term needs it.
        anchor: Folder or hub name of the dense model that the objective's anchor terms compare with; by default the
            student's source, where that is dense.
        on_policy: On which share of the steps the student's own text takes the place of the rows, and how it is
            sampled. Such a step has only the divergence and the routers' terms; they are logged as `on_policy/<term>`.
        **kwargs: Objective, optimizer and freezing, see `LanguageModule`.
    """

    model_key = "model.student"
    teacher: OnlineTeacher | CachedTeacher
    anchor: OnlineTeacher

    def __init__(
        self,
        student: StudentConfig,
        teacher: TeacherConfig | None = None,
        anchor: str | None = None,
        on_policy: OnPolicy | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.student_config = student
        self.teacher_config = teacher
        self.anchor_source = anchor or student.source
        self.on_policy = on_policy or OnPolicy()
        self._sampled: list[Sampled] = []  # of the micro-batches of a step
        self._own_words = [objective.divergence_only() for objective in self.objectives]
        self.uses_teacher = any(objective.uses_teacher for objective in self.objectives)
        self.uses_anchor = any(objective.uses_anchor for objective in self.objectives)
        if not self.uses_teacher and not self.uses_anchor:
            raise ValueError("model.objective has no term with a teacher: set kl.weight or cka.weight above 0.")
        if self.uses_teacher and teacher is None:
            raise ValueError(
                "model.teacher is missing: the objective has terms with a teacher; give its source, or a cache."
            )
        if self.on_policy.share > 0 and not all(objective.uses("kl") for objective in self.objectives):
            raise ValueError("model.on_policy.share needs objective.kl.weight above 0: nothing else scores its text.")

    @property
    def model_config(self) -> StudentConfig:
        """The student."""
        return self.student_config

    # ------------------------------------------------------------------ before anything is loaded

    def check(self, chat: Chat) -> None:
        """Check the other models too: their folders, that they read the same token ids, that layers fit."""
        super().check(chat)
        student = self.model_config.hf_config(self.model_key, chat)
        others = []
        if self.cache is not None:
            self._check_cache(self.cache, chat)
        elif self.teacher_config is not None and self.teacher_config.source is not None:
            others.append((self.teacher_config.source, TEACHER, self.teacher_chat(chat)))
            self.teacher_config.check()
        if self.uses_anchor:
            if self.anchor_source is None:
                raise ValueError(
                    f"{ANCHOR} is missing: the student has no source for the anchor terms to compare with."
                )
            others.append((self.anchor_source, ANCHOR, chat))
        for source, key, read in others:
            check_vocabulary(source, load_config(source, key), read, key)
        if self.uses_anchor:
            self._check_anchor(student)
        for stage in self.stages:
            try:
                self._check_maps(stage.objective, student)
                continue
            except ValueError as error:
                wrong = str(error)
            # Not inside the handler: what the user is shown is the innermost error, which does not name the stage.
            raise ValueError(wrong if self.stage_config is None else f"{stage.key}: {wrong}")
        if self.cache is not None:
            self.cache.verify()
        if self.teacher_view is not None:  # of a cache, it stands in one of the files
            self.teacher_view.check()

    def _check_cache(self, cache: LogitCache, chat: Chat) -> None:
        """Refuse a cache that is not of this run's teacher, tokenizer, template, view and vocabulary."""
        assert self.teacher_config is not None, "it names the cache"
        if self.on_policy.share > 0:
            raise ValueError(f"model.on_policy.share needs a teacher that answers anew; set it to 0, or drop {KEY}.")
        expected = {"template": template_fingerprint(chat), "tokenizer": tokenizer_fingerprint(chat)}
        if self.teacher_config.view is not None:
            expected["view"] = self.teacher_config.view
        if self.teacher_config.source is not None:
            expected["teacher"] = teacher_fingerprint(self.teacher_config.source)
        cache.check(**expected)
        if (vocabulary := self.vocabulary(chat)) < cache.header.vocabulary:
            raise ValueError(
                f"{KEY}: {cache.folder} was made with another vocabulary ({cache.header.vocabulary:,} tokens; this "
                f"run's student has {vocabulary:,}): make it anew from this run's config with the cache command."
            )

    def _check_maps(self, objective: Objective, student: PreTrainedConfig) -> None:
        if self.cache is not None:
            objective.check_offline(self.cache.header.segments)
        objective.plan(student.num_hidden_layers, self.teacher_layers)
        if not objective.uses("attention"):
            return
        for config in (student, self._teacher_hf_config):
            with torch.device("meta"):
                check_readable(AutoModelForCausalLM.from_config(config))
        if (heads := objective.attention.heads) != "uniform":
            check_head_map(heads, student.num_key_value_heads, self._teacher_hf_config.num_key_value_heads)

    def _check_anchor(self, student: PreTrainedConfig) -> None:
        anchor = load_config(str(self.anchor_source), ANCHOR)
        if is_moe(anchor):
            raise ValueError(
                f"{ANCHOR}: {self.anchor_source} is a Mixture-of-Experts; name the dense model that the student was "
                "made from, for the anchor terms to compare with."
            )
        for name in ("hidden_size", "num_hidden_layers"):
            if getattr(anchor, name) != getattr(student, name):
                raise ValueError(
                    f"{ANCHOR}: {self.anchor_source} has {name} {getattr(anchor, name)}, the student "
                    f"{getattr(student, name)}; name the dense model that the student was made from."
                )

    @cached_property
    def cache(self) -> LogitCache | None:
        """The teacher's answers on disk, if those take its place."""
        config = self.teacher_config
        return LogitCache(config.cache) if config is not None and config.cache and self.uses_teacher else None

    def vocabulary(self, chat: Chat) -> int:
        """Rows of the student's head, with those of new markers."""
        return head_rows(self.student_config.source, self.model_config.hf_config(self.model_key, chat), chat)

    @cached_property
    def teacher_view(self) -> TeacherView | None:
        """How the teacher reads a row, for the data module; None without one, or if it read just the student's ids."""
        config = self.teacher_config
        if config is None or not self.uses_teacher:
            return None
        if self.cache is None:
            return TeacherView(str(config.source), config.view or "same", config.min_aligned)
        # The teacher itself may be out of reach of a run that reads a cache: its tokenizer lies there, if it is needed.
        source = self.cache.folder / TOKENIZER
        return TeacherView(str(source), self.cache.header.view, config.min_aligned) if source.is_dir() else None

    def own_view(self, chat: Chat) -> TeacherView | None:
        """How the teacher reads a row, if not as the student does."""
        return None if self.teacher_view is None else self.teacher_view.of(chat)

    def merged_of(self, chat: Chat) -> MergedTokens | None:
        """The student's tokens that join several of the teacher's pieces; None where the teacher has them too."""
        view = self.own_view(chat)
        return MergedTokens(chat.merged) if view is not None and view.lacks(chat) else None

    def teacher_chat(self, chat: Chat) -> Chat:
        """Tokens and markers as the teacher has them."""
        view = self.own_view(chat)
        return view.chat(chat.format) if view is not None and view.lacks(chat) else chat

    @property
    def _teacher_hf_config(self) -> PreTrainedConfig:
        assert self.teacher_config is not None, "checked when the module was made"
        return load_config(str(self.teacher_config.source), TEACHER)

    @property
    def teacher_layers(self) -> int:
        """Layers of the teacher; 0 without one that has any."""
        return self._teacher_hf_config.num_hidden_layers if self.uses_teacher and self.cache is None else 0

    def projections(self, student: PreTrainedConfig) -> dict[tuple[int, int], int]:
        """A projection for each pair of layers that the hidden term compares, where the widths differ."""
        pairs: set[tuple[int, int]] = set()
        for objective in self.objectives:
            pairs |= set(objective.plan(student.num_hidden_layers, self.teacher_layers).pairs.get("hidden", []))
        width = self._teacher_hf_config.hidden_size if pairs else student.hidden_size
        return dict.fromkeys(sorted(pairs), width) if width != student.hidden_size else {}

    # ------------------------------------------------------------------ loading

    def build(self, hf: PreTrainedModel) -> None:
        """Take `hf` as the model."""
        super().build(hf)
        self._own_plans = [own.plan(self.model.num_layers, self.teacher_layers) for own in self._own_words]

    def setup(self, stage: str) -> None:
        """Refuse on-policy steps where the student cannot write, and rows that a cached teacher was not asked about."""
        super().setup(stage)
        if self.device_mesh is not None and self.teacher_config and self.teacher_config.quantization() is not None:
            raise ValueError(
                f"model.teacher.dtype: {self.teacher_config.dtype} cannot be sharded; use bfloat16, whose pieces are "
                "smaller still."
            )
        check_on_policy(self.on_policy, strategy_is_sharded=self.device_mesh is not None)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.on_policy.share > 0 and not isinstance(data, ChatDataModule):
            raise ValueError("model.on_policy needs prompts to answer, which only ChatDataModule has; set share: 0.")
        if not isinstance(data, ChatDataModule) and self.own_view(self.chat) is not None:
            raise ValueError(
                "model.teacher reads rows in other ids than the student, which only ChatDataModule has; use view: same "
                "and, of documents, a tokenizer without merged tokens."
            )
        if self.cache is None or stage == "predict":
            return
        splits = {"fit": ["validation"], "validate": ["validation"]}.get(stage, ["test"])
        if stage == "fit" and not getattr(data, "streaming", False):  # streamed rows are looked for as they come
            splits.append("train")
        for split in splits:
            self.cache.check_rows(row_keys(data.rows(split).table), f"data.{split}")

    def configure_model(self) -> None:
        """Load student, teacher and anchor."""
        loaded = hasattr(self, "model")
        super().configure_model()
        if loaded:
            return
        self.merged_tokens = self.merged_of(self.chat)
        # Past nn.Module's own __setattr__: as submodules they would be saved, trained and moved with us.
        teacher = self.teacher_config
        dtype = teacher.torch_dtype if teacher else torch.bfloat16
        if self.cache is not None:
            self.teacher = CachedTeacher(self.cache)
            rank_zero_info(
                f"Teacher: {len(self.cache):,} rows of {self.cache.header.teacher_source} in {self.cache.folder}."
            )
        elif self.uses_teacher:
            assert teacher is not None, "checked when the module was made"
            chat = self.teacher_chat(self.chat)
            frozen = self._load_frozen(str(teacher.source), dtype, "Teacher", chat, teacher.quantization())
            frozen.pieces = None if self.merged_tokens is None else self.merged_tokens.width
            object.__setattr__(self, "teacher", frozen)
        if self.uses_anchor:
            object.__setattr__(self, "anchor", self._load_frozen(str(self.anchor_source), dtype, "Anchor", self.chat))

    def _load_frozen(
        self, source: str, dtype: torch.dtype, name: str, chat: Chat, quantization: Any = None
    ) -> OnlineTeacher:
        key = f"model.{name.lower()}"
        config = ModelConfig(source, attn_implementation=self.student_config.attn_implementation)
        device, mesh = self.trainer.strategy.root_device, self.device_mesh
        pieces = None if mesh is None else config.in_pieces(key, chat, dtype)
        hf = config.load(key, chat, dtype, quantization) if pieces is None else pieces.shape()
        frozen = OnlineTeacher(CausalModel(hf))
        if mesh is not None:
            shard_frozen(frozen.model, mesh["data_parallel"])
        if pieces is not None:
            pieces.fill(hf, device)
        frozen.to(device)
        held = str(dtype).removeprefix("torch.") if quantization is None else "float8"
        rank_zero_info(f"{name}: {hf.num_parameters():,} parameters in {held}, frozen.")
        return frozen

    # ------------------------------------------------------------------ steps

    def signals(self, batch: Batch, objective: Objective) -> tuple[TeacherSignal | None, TeacherSignal | None]:
        """What teacher and anchor say of a micro-batch, where an objective asks them."""
        teacher = self.teacher.signal(batch, self.plan.teacher) if objective.uses_teacher else None
        anchor = self.anchor.anchor(batch, self.plan.anchor) if objective.uses_anchor else None
        return teacher, anchor

    @property
    def writes(self) -> bool:
        """Whether the student itself writes the text of this step."""
        if self._trainer is None or not self.trainer.training:
            return False
        return is_on_policy(self.on_policy.share, self.global_step, self.seed)

    @property
    def objective(self) -> Objective:
        """Terms and weights of the loss in the stage in force, for the text of this step."""
        return self._own_words[self.stage_index] if self.writes else super().objective

    @property
    def plan(self) -> Plan:
        """What the objective in force wants to see of the models."""
        return self._own_plans[self.stage_index] if self.writes else super().plan

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On an on-policy step, let the student write the micro-batch; choose positions, and read a cache there."""
        if self.writes:
            batch = self._write(batch)
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.cache is not None and isinstance(batch, dict) and self.objective.uses_teacher:
            assert isinstance(self.teacher, CachedTeacher), "as `configure_model` made it"
            batch |= self.teacher.entries(batch)
        return batch

    def _write(self, batch: Batch) -> Batch:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        # Lightning's autocast begins with the step itself.
        with self.trainer.precision_plugin.forward_context():
            sampled = sample_batch(
                batch,
                self.model,
                self.chat,
                self.on_policy,
                data.max_length,
                self.own_view(self.chat),
                seed=hash((self.seed, progress.processed, self.global_rank)),
                replicas=self.replicas,
            )
        self._sampled.append(sampled)
        return sampled.batch

    @property
    def kind_of_step(self) -> str:
        """The student's own text is scored by another objective."""
        return f"{super().kind_of_step}, on policy" if self.writes else super().kind_of_step

    def forget_step(self) -> None:
        """Leave the finished step out, with the text that the student wrote for it."""
        super().forget_step()
        self._sampled.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch: the teacher answers, the student learns."""
        return self.learn(batch, *self.signals(batch, self.objective))

    def log_step(self, values: dict[str, Tensor], told: dict[str, Tensor]) -> None:
        """Log an on-policy step apart, with what its text cost: seconds and tokens of this rank."""
        if not self._sampled:
            super().log_step(values, told)
            return
        # Not through `self.log`, which would show these values again at the steps between.
        cost = {
            "generation_seconds": sum(sampled.seconds for sampled in self._sampled),
            "generated_tokens": sum(sampled.tokens for sampled in self._sampled),
        }
        self._sampled.clear()
        self._unlog()
        scalars = {f"on_policy/{name}": float(value) for name, value in (values | cost).items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(scalars, step=self.global_step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses per segment, divergence from and agreement with the teacher, routing."""
        self.evaluate(batch, *self.signals(batch, self.objective))

    def on_validation_epoch_end(self) -> None:
        """Log too how much of the rows' answers the teacher's view has a counterpart for."""
        super().on_validation_epoch_end()
        share = getattr(self.trainer.datamodule, "aligned_share", None)  # type: ignore[attr-defined]
        if share is not None:
            self.log("val/aligned", share)


def head_rows(source: str | None, config: PreTrainedConfig, chat: Chat) -> int:
    """Rows of a model's head once `start_rows` has given it those of new markers."""
    last = max(untrained_tokens(source, chat), default=0) if source else 0
    size: int = config.vocab_size
    return size if last < size else 128 * math.ceil((last + 1) / 128)
