"""Callbacks for runs that are to be killed: sign posts for whoever kills them, and a record of the rows they saw."""

import ctypes
import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning


class KillAt(lightning.Callback):
    """SIGKILL to itself in the middle of an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SignPost(lightning.Callback):
    """Write down where training is, `step 3` (being taken) or `validation 4` (after step 4), and stay there a while.

    A real model is in each of these places for long; this one would have left before anybody could look.

    Args:
        path: Where to; of the first rank.
        seconds: How long to stay in a micro-batch, of training or of validation.
    """

    def __init__(self, path: str, seconds: float = 0.0):
        self.path = Path(path)
        self.seconds = seconds

    def _at(self, trainer: lightning.Trainer, where: str) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            partial = self.path.with_suffix(".partial")
            partial.write_text(where)
            partial.replace(self.path)
        time.sleep(self.seconds)

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self._at(trainer, f"step {trainer.global_step + 1}")

    def on_validation_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self._at(trainer, f"validation {trainer.global_step}")


class RowLog(lightning.Callback):
    """Add a line for each micro-batch of training, rank by rank: the optimizer step, and the rows in it.

    A line `from` says that what stands above of this step and later ones is about to be done again.

    Args:
        path: A file for each rank, PATH.RANK.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def _add(self, path: Path, **entry: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:  # of ranks, too, that are no more
            for path in self.path.parent.glob(f"{self.path.name}.*"):
                self._add(path, **{"from": trainer.global_step})
        trainer.strategy.barrier()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rows = sorted(set(batch["row_ids"].flatten().tolist()) - {-1})
        self._add(self.path.with_name(f"{self.path.name}.{trainer.global_rank}"), step=trainer.global_step, rows=rows)


class NoFolder(lightning.Callback):
    """From now on the second rank can make no folder of a checkpoint: its node has lost the disk, say.

    Args:
        elsewhere: Whether it makes one of its own instead, which nobody else sees.
    """

    def __init__(self, elsewhere: bool = False):
        self.elsewhere = elsewhere

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.global_rank != 1:
            return
        if self.elsewhere:
            unshared_disk(Path(trainer.checkpoint_callback.dirpath))
            return
        made = Path.mkdir

        def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name.endswith(".partial"):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            made(path, *args, **kwargs)

        Path.mkdir = mkdir


def unshared_disk(folder: Path) -> None:
    """Mount a disk of this process's own over a folder; only root may."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(parents=True, exist_ok=True)
    private = 0x40000 | 0x4000  # MS_PRIVATE | MS_REC
    place = str(folder).encode()
    for failed in (
        libc.unshare(0x20000),  # CLONE_NEWNS
        libc.mount(b"none", b"/", None, private, None),
        libc.mount(b"tmpfs", place, b"tmpfs", 0, b"size=30m"),
    ):
        assert not failed, os.strerror(ctypes.get_errno())
