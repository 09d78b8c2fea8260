"""What the model writes, at every validation, as text."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_only

from agri_moe.callbacks.figures import log_text, run_folder
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.generation import generate
from agri_moe.models.base import LanguageModule


class SampleAdvisories(lightning.Callback):
    """Answer the first validation scenarios greedily and log thought and advisory beside the reference.

    The texts go to TensorBoard as `advisories` and to `samples/step=NNNNNNNN.md` in the run's folder.

    Args:
        rows: How many scenarios.
        max_new_tokens: Answers are cut off after so many tokens.
    """

    def __init__(self, rows: int = 4, max_new_tokens: int = 256):
        self.rows = rows
        self.max_new_tokens = max_new_tokens

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse rows that hold no scenarios."""
        if not isinstance(trainer.datamodule, ChatDataModule):  # type: ignore[attr-defined]
            raise ValueError(
                "SampleAdvisories needs scenarios, which only ChatDataModule has; take it out of trainer.callbacks."
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
        prompts = [data.chat.encode_prompt(row["scenario"], row.get("system")) for row in rows]
        answers = list(
            generate(pl_module.model, data.chat, prompts, max_new_tokens=self.max_new_tokens, batch_size=self.rows)
        )
        parts = [
            f"**स्थिति** {row['scenario']}\n\n**विचार** {answer.thought}\n\n"
            f"**सलाह** {answer.advisory}\n\n**संदर्भ (reference)** {row['advisory']}\n"
            for row, answer in zip(rows, answers, strict=True)
        ]
        return "\n---\n\n".join(parts)

    @rank_zero_only
    def _log(self, trainer: lightning.Trainer, text: str, folder: Path) -> None:
        log_text(trainer, "advisories", text)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step={trainer.global_step:08d}.md").write_text(text, encoding="utf-8")
