"""Hand a figure or a text to whatever loggers a run has."""

from pathlib import Path

import lightning
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure


def run_folder(trainer: lightning.Trainer) -> Path:
    """The folder of this run. To be asked for on every rank: the first one tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


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
        elif _takes(logger, "log_image"):
            logger.log_image(tag, [figure], step=last_step(trainer))  # type: ignore[attr-defined]


@rank_zero_only
def log_text(trainer: lightning.Trainer, tag: str, markdown: str) -> None:
    """Add a text under `tag` to every TensorBoard logger; nothing during the sanity check."""
    if trainer.sanity_checking:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, last_step(trainer))


def _takes(logger: Logger, method: str) -> bool:
    return callable(getattr(logger, method, None))
