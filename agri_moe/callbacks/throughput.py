"""Tokens per second."""

import time
from typing import Any

import lightning

from agri_moe.callbacks.figures import last_step
from agri_moe.models.base import LanguageModule


class Throughput(lightning.Callback):
    """Log `throughput/tokens_per_second` and, of a language model, `supervised_tokens_per_second`, over all ranks.

    Padding counts as no token; time spent in validation does not count.

    Args:
        every_n_steps: Optimizer steps between two entries.
    """

    def __init__(self, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise ValueError(f"Throughput.every_n_steps must be at least 1, not {every_n_steps}.")
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._restart(trainer)

    def _restart(self, trainer: lightning.Trainer) -> None:
        self._tokens: Any = 0
        self._supervised: Any = 0
        self._counted_step = trainer.global_step
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the finished step; log when due."""
        if trainer.global_step == self._counted_step:
            return  # still accumulating
        self._counted_step = trainer.global_step
        self._tokens = self._tokens + batch["step_tokens"]
        if isinstance(pl_module, LanguageModule):
            self._supervised = self._supervised + pl_module.objective.counts(batch)[0]
        if trainer.global_step % self.every_n_steps:
            return
        counts = {"tokens_per_second": int(self._tokens)}  # waits for the device
        if isinstance(pl_module, LanguageModule):
            counts["supervised_tokens_per_second"] = int(self._supervised)
        seconds = time.perf_counter() - self._started
        rates = {name: count / seconds for name, count in counts.items()}
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{k}": v for k, v in rates.items()}, step=last_step(trainer))
        self._restart(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Go on where the clock stopped."""
        if hasattr(self, "_started"):
            self._started += time.perf_counter() - self._paused
