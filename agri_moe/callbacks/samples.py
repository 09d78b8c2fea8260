"""What the model writes, at every validation, as text, and what its teacher writes."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_only

from agri_moe.callbacks.figures import log_text, run_folder
from agri_moe.data.chat import Chat
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.generation import Generated, ModelTemplate, generate
from agri_moe.models.base import LanguageModule
from agri_moe.models.causal import CausalModel
from agri_moe.models.distill import DistillModule
from agri_moe.teacher import OnlineTeacher

TEACHER = "**शिक्षक (teacher)**"


def _written(answer: Generated) -> str:
    return f"**विचार** {answer.thought or ''}\n\n**सलाह** {answer.advisory}"


class SampleAdvisories(lightning.Callback):
    """Answer the first validation scenarios greedily and log thought and advisory beside the reference.

    The texts go to TensorBoard as `advisories` and to `samples/step=NNNNNNNN.md` in the run's folder.

    Args:
        rows: How many scenarios.
        max_new_tokens: Answers are cut off after so many tokens.
        teacher: Let the teacher answer too, in the view in which it reads rows, once for each time that `fit` is
            called; not one that is read from a cache, nor one that is sharded, which would be gathered at every token.
    """

    def __init__(self, rows: int = 4, max_new_tokens: int = 256, teacher: bool = True):
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.teacher = teacher
        self._taught: list[Generated] | None = None  # the teacher's answers, which stay the same

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse rows that hold no scenarios, and layers that are no language model."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, LanguageModule) or not isinstance(data, ChatDataModule):
            raise ValueError(
                "SampleAdvisories needs a language model and scenarios, which only ChatDataModule has; take it out of "
                "trainer.callbacks."
            )

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Generate on the first rank; a sharded model on all of them, since each has a piece of it."""
        if trainer.sanity_checking:
            return
        folder = run_folder(trainer) / "samples"
        if trainer.is_global_zero or pl_module.device_mesh is not None:
            self._log(trainer, self._text(trainer, pl_module), folder)

    def _text(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> str:
        assert isinstance(pl_module, LanguageModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        table = data.rows("validation").table
        rows = [table[i] for i in range(min(self.rows, len(table)))]
        answers = self._answers(pl_module.model, data.chat, rows)
        if self._taught is None:
            self._taught = self._teacher_answers(pl_module, data.chat, rows)
        parts = []
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            taught = f"{TEACHER} {_written(self._taught[i])}\n\n" if self._taught else ""
            parts.append(
                f"**स्थिति** {row['scenario']}\n\n{_written(answer)}\n\n{taught}**संदर्भ (reference)** {row['advisory']}\n"
            )
        return "\n---\n\n".join(parts)

    def _answers(self, model: CausalModel, frame: Chat | ModelTemplate, rows: list[dict[str, Any]]) -> list[Generated]:
        prompts = [frame.encode_prompt(row["scenario"], row.get("system")) for row in rows]
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": self.rows}
        return list(generate(model, frame, prompts, **options))

    def _teacher_answers(self, module: LanguageModule, chat: Chat, rows: list[dict[str, Any]]) -> list[Generated]:
        """Nothing where there is none to ask."""
        if not self.teacher or not isinstance(module, DistillModule) or not module.uses_teacher:
            return []
        if not isinstance(module.teacher, OnlineTeacher) or module.device_mesh is not None:
            return []
        model, view, own = module.teacher.model, module.own_view(chat), module.teacher_chat(chat)
        if view is None or view.view == "same":
            return self._answers(model, own, rows)
        return self._answers(model, ModelTemplate.load(model.hf, view.source, own), rows)

    @rank_zero_only
    def _log(self, trainer: lightning.Trainer, text: str, folder: Path) -> None:
        log_text(trainer, "advisories", text)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step={trainer.global_step:08d}.md").write_text(text, encoding="utf-8")
