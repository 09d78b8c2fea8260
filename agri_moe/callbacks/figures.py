"""Hand a figure or a text to whatever loggers a run has."""

import functools
from pathlib import Path

import lightning
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from matplotlib.figure import Figure

from agri_moe.callbacks.resume import RunStatus


def run_folder(trainer: lightning.Trainer) -> Path:
    """The folder of this run. To be asked for on every rank: the first one may have to tell the others."""
    known = next((c.run.folder for c in trainer.callbacks if isinstance(c, RunStatus)), None)  # type: ignore[attr-defined]
    return known or Path(trainer.log_dir or trainer.default_root_dir)


def last_step(trainer: lightning.Trainer) -> int:
    """The step that Lightning writes beside the metrics of the optimizer step just finished, counted from 0."""
    return max(trainer.global_step - 1, 0)


@rank_zero_only
def log_figure(trainer: lightning.Trainer, tag: str, figure: Figure) -> None:
    """Add a picture under `tag` to every logger that takes pictures; nothing during the sanity check."""
    if trainer.sanity_checking:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, last_step(trainer), close=False)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{tag}/step={last_step(trainer):08d}.png")
        elif _takes(logger, "log_image"):
            logger.log_image(tag, [figure], step=last_step(trainer))  # type: ignore[attr-defined]
        else:
            _say_left_out(type(logger).__name__, "pictures")


@rank_zero_only
def log_text(trainer: lightning.Trainer, tag: str, markdown: str) -> None:
    """Add a text under `tag` to every logger that takes texts; nothing during the sanity check."""
    if trainer.sanity_checking:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, last_step(trainer))
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, markdown, f"{tag}/step={last_step(trainer):08d}.md")
        else:
            _say_left_out(type(logger).__name__, "texts")


def _takes(logger: Logger, method: str) -> bool:
    return callable(getattr(logger, method, None))


@functools.cache
def _say_left_out(logger: str, what: str) -> None:
    """Once a process: a picture is drawn at every validation."""
    rank_zero_info(f"{logger} is given no {what}: TensorBoard's files and the run's folder hold them.")
