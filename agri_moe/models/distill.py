"""Distil a frozen teacher into a sparse student."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoModelForCausalLM

from agri_moe.data.chat import Chat
from agri_moe.models.base import LanguageModule
from agri_moe.models.causal import CausalModel, start_rows
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.source import StudentConfig, check_vocabulary, untrained_markers
from agri_moe.objective import Batch, layer_map
from agri_moe.teacher import OnlineTeacher, TeacherConfig


class DistillModule(LanguageModule):
    """A student in training beside a frozen teacher.

    The teacher is kept out of the module tree: it is in no checkpoint, gets no gradient and stays in eval mode.

    Args:
        student: The model to train; a dense source is upcycled on the fly.
        teacher: The model to learn from.
        **kwargs: Objective, optimizer and freezing, see `LanguageModule`.
    """

    model_key = "model.student"
    teacher: OnlineTeacher

    def __init__(self, student: StudentConfig, teacher: TeacherConfig, **kwargs: Any):
        super().__init__(**kwargs)
        if not self.objective.uses_teacher:
            raise ValueError("model.objective has no term with a teacher: set kl.weight or cka.weight above 0.")
        self.student_config = student
        self.teacher_config = teacher

    @property
    def model_config(self) -> StudentConfig:
        """The student."""
        return self.student_config

    def check(self, chat: Chat) -> None:
        """Check the teacher too: its folder, and that it reads the same token ids."""
        super().check(chat)
        key = "model.teacher.source"
        check_vocabulary(self.teacher_config.source, load_config(self.teacher_config.source, key), chat, key)

    def configure_model(self) -> None:
        """Load student and teacher."""
        loaded = hasattr(self, "model")
        super().configure_model()
        if not loaded:
            # Past nn.Module's own __setattr__: as a submodule the teacher would be saved, trained and moved with us.
            object.__setattr__(self, "teacher", self._load_teacher())

    def _load_teacher(self) -> OnlineTeacher:
        config = self.teacher_config
        dtype = getattr(torch, config.dtype)
        hf = AutoModelForCausalLM.from_pretrained(
            config.source, dtype=dtype, attn_implementation=self.student_config.attn_implementation
        )
        start_rows(hf, untrained_markers(config.source, self.chat))
        model = CausalModel(hf)
        pairs = layer_map(self.model.num_layers, model.num_layers) if self.objective.uses_hidden_states else []
        self.student_layers = [student for student, _ in pairs]
        rank_zero_info(f"Teacher: {hf.num_parameters():,} parameters in {config.dtype}, frozen.")
        teacher = OnlineTeacher(model, [layer for _, layer in pairs])
        teacher.to(self.trainer.strategy.root_device)
        return teacher

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch: the teacher answers, the student learns."""
        return self.learn(batch, self.teacher.signal(batch), self.student_layers)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses per segment, divergence from and agreement with the teacher, routing."""
        self.evaluate(batch, self.teacher.signal(batch), self.student_layers)

    test_step = validation_step
