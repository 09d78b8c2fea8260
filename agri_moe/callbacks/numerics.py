"""Steps that would spoil the weights are left out: one batch with a NaN makes all weights NaN for good."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from agri_moe.data.streaming import StreamingDataModule

if TYPE_CHECKING:
    from agri_moe.models.training import TrainingModule

LISTED = 20  # rows named in one warning


class NumericsGuard(lightning.Callback):
    """Leave out optimizer steps whose loss or gradient is not finite on some rank, or jumps; on by default in `fit`.

    All ranks see the same two numbers, the mean of their losses and the norm of the joint gradient, and so decide
    alike. The device is waited for once in each optimizer step; clipping takes the norm from here.

    A step that is left out still counts as one, for the schedules, the checkpoints and the order of rows: weights, the
    optimizer's state, running means and logged terms are as if it had not been. `train/skipped_steps` counts them, and
    a warning names the rows of its micro-batches; only those with a loss that is not finite, where there are any.

    A jump is a loss or gradient norm above mean + `spike_sigma` x standard deviation of the last `window` steps of its
    kind (stages, and steps on the student's own text, have objectives of their own); OLMo-core's SkipStepOptimizer has
    6 of 128. A jump enters the window as that limit: one alone widens it little, a lasting change is accepted after
    some steps. The window is part of the checkpoint.

    Args:
        stop_after: So many steps left out in a row stop the run.
        spike_sigma: Standard deviations that make a jump; null leaves out no finite step.
        window: Steps that a jump is measured against; nothing is called a jump before half of them are there.
    """

    def __init__(self, stop_after: int = 5, spike_sigma: float | None = None, window: int = 128):
        if stop_after < 1 or window < 4 or (spike_sigma is not None and not spike_sigma > 0):
            raise ValueError(
                "NumericsGuard needs stop_after >= 1, window >= 4 and spike_sigma > 0 (or null), not "
                f"{stop_after}, {window} and {spike_sigma}."
            )
        self.stop_after = stop_after
        self.spike_sigma = spike_sigma
        self.window = window
        self.skipped_steps = 0
        self._in_a_row = 0
        self._recent: dict[
            str, list[deque[float]]
        ] = {}  # kind of step -> loss, and each gradient norm, of the last ones
        self._losses: list[Tensor] = []  # of the micro-batches of the step under way
        self._row_ids: list[Tensor] = []

    # ------------------------------------------------------------------ what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the window of each kind of step."""
        recent = {kind: [list(values) for values in windows] for kind, windows in self._recent.items()}
        return {"skipped_steps": self.skipped_steps, "in_a_row": self._in_a_row, "recent": recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved, the same on every rank."""
        self.skipped_steps, self._in_a_row = state_dict["skipped_steps"], state_dict["in_a_row"]
        self._recent = {
            kind: [deque(values, self.window) for values in windows] for kind, windows in state_dict["recent"].items()
        }

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which rows these are."""
        self._row_ids.append(batch["row_ids"])

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Remember the loss."""
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decide, before anything is made of the step.

        Raises:
            ValueError: If too many steps in a row are left out.
        """
        module: TrainingModule = pl_module  # which has asked for this guard
        norms = [norm.float() for norm in module.gradient_norms()]
        measured = trainer.strategy.reduce(torch.stack([torch.stack(self._losses).sum(), *norms]), reduce_op="mean")
        reason = self._against(measured.tolist(), module.kind_of_step)
        module.skipped = bool(reason)
        self._in_a_row = self._in_a_row + 1 if reason else 0
        if reason:
            self.skipped_steps += 1
            module.forget_step()
            self._tell(trainer, reason)
        module.log("train/skipped_steps", float(self.skipped_steps))
        self._losses.clear()
        self._row_ids.clear()

    def _against(self, measured: list[float], kind: str) -> str:
        """The reason against a step, or nothing; its numbers go into the window."""
        names = ["loss", *["gradient norm"] * (len(measured) - 1)]
        for name, value in zip(names, measured, strict=True):
            if not math.isfinite(value):
                return f"its {name} is {value}"
        if self.spike_sigma is None:
            return ""
        reason = ""
        recent = self._recent.setdefault(kind, [deque(maxlen=self.window) for _ in measured])
        for name, value, values in zip(names, measured, recent, strict=True):
            limit = math.inf
            if len(values) >= self.window // 2:
                limit = statistics.fmean(values) + self.spike_sigma * statistics.stdev(values)
            if value > limit:
                reason = reason or f"its {name} {value:.4g} is above {limit:.4g}, {self.spike_sigma:g} sigma"
            values.append(min(value, limit))
        return reason

    def _tell(self, trainer: lightning.Trainer, reason: str) -> None:
        """Warn, or stop: the rows of all ranks are asked for, so this must be called on all."""
        step, rows = trainer.global_step, self._rows(trainer)
        if self._in_a_row < self.stop_after:
            rank_zero_warn(f"Step {step} is left out, because {reason}; rows: {rows}.")
            return
        raise ValueError(
            f"step {step} is the {_ordinal(self._in_a_row)} in a row that cannot be taken, because {reason}: look at "
            f"its rows ({rows}), and at model.learning_rate, or let NumericsGuard.stop_after be more."
        )

    def _rows(self, trainer: lightning.Trainer) -> str:
        """The rows of the step, as far as one warning holds."""
        losses = torch.stack(self._losses).tolist()
        held = list(zip(losses, (sorted({*ids.flatten().tolist()} - {-1}) for ids in self._row_ids), strict=True))
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, held)
            held = [one for part in parts for one in part]
        bad = [(loss, rows) for loss, rows in held if not math.isfinite(loss)]
        ids = sorted({row for _, rows in bad or held for row in rows})
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, StreamingDataModule):
            named = data.origins(ids[:LISTED])
        else:  # somebody's own, which alone knows where they came from
            named = "row_ids " + ", ".join(map(str, ids[:LISTED]))
        return named if len(ids) <= LISTED else f"{named} and {len(ids) - LISTED} more"


def _ordinal(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")
