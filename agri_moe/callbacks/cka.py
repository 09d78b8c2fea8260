"""CKA matrix, teacher layers by student layers, at every validation: a picture and an `.npz`.

Shapes: S sampled positions, D width, L layers.
"""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agri_moe.callbacks.figures import log_figure, run_folder
from agri_moe.metrics import CKAMatrix
from agri_moe.models.causal import CausalModel, Reads
from agri_moe.models.distill import DistillModule
from agri_moe.teacher import OnlineTeacher


class CKAMonitor(lightning.Callback):
    """Compare every layer of the student with every layer of the teacher on the first validation batches.

    The matrix goes to the loggers as `cka` and to `cka/step=NNNNNNNN.npz` in the run's folder (`cka` [student layers,
    teacher layers], `step`).

    Args:
        batches: Validation micro-batches that are compared, on each rank; the statistic is accumulated over them.
    """

    def __init__(self, batches: int = 2):
        if batches < 1:
            raise ValueError(f"CKAMonitor.batches must be at least 1, not {batches}.")
        self.batches = batches
        self._matrix: CKAMatrix | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse a module that has no teacher, or none with layers."""
        if not isinstance(pl_module, DistillModule) or not pl_module.uses_teacher or pl_module.cache is not None:
            raise ValueError(
                "CKAMonitor compares with a teacher, which only DistillModule has, where the objective asks it and it "
                "is not read from model.teacher.cache; take it out of trainer.callbacks."
            )

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Accumulate the first batches."""
        if batch_idx >= self.batches or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DistillModule)
        student, teacher = pl_module.model, pl_module.teacher
        assert isinstance(teacher, OnlineTeacher), "checked in setup"
        if self._matrix is None:
            self._matrix = CKAMatrix(student.num_layers, teacher.model.num_layers).to(pl_module.device)
        streams = teacher.signal(batch, Reads(layers=range(teacher.model.num_layers))).layers
        self._matrix.update(residual_streams(student, batch), list(streams.values()))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the matrix down."""
        if self._matrix is None or not self._matrix.update_called:
            return
        matrix = self._matrix.compute().cpu().numpy()
        self._matrix.reset()
        log_figure(trainer, "cka", draw_cka(matrix))
        _save(run_folder(trainer) / "cka", matrix, trainer.global_step)


@torch.no_grad()
def residual_streams(model: CausalModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The residual stream after every layer at the batch's sampled positions, one [S, D] each."""
    reads = Reads(layers=range(model.num_layers))
    return list(model(batch, batch["sample"][:0], lambda hidden, head: None, reads).layers.values())


@rank_zero_only
def _save(folder: Path, matrix: np.ndarray, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"step={step:08d}.npz", cka=matrix, step=step)


def draw_cka(matrix: np.ndarray) -> Figure:
    """Heat map of a CKA matrix [student layers, teacher layers], first layers in the lower left corner."""
    figure = Figure(figsize=(2.5 + 0.2 * matrix.shape[1], 2 + 0.2 * matrix.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, origin="lower", cmap="magma", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="teacher layer", ylabel="student layer", title="debiased linear CKA")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes)
    return figure
