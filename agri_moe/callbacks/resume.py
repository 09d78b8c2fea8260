"""Checkpoints that count only when whole, and what a run says of itself."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from agri_moe.foreign_files import load_state
from agri_moe.models.base import LanguageModule, parameter_counts
from agri_moe.runs import MARKER, Lock, Run, mark_complete
from agri_moe.trained import check_intact, read_sharded


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the final name, flush, rename, write checksums: a crash at any moment leaves no false checkpoint.

    Lightning's own saves stage in the temporary folder; on another filesystem, a full disk leaves a broken file under
    the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to `path`, a local path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        mark_complete(path)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load without running any code that a file may hold; a folder, saved by a sharded run, only if intact.

        Raises:
            ValueError: If a folder is not as it was saved.
        """
        if Path(path).is_dir():
            check_intact(Path(path), "--ckpt_path")
            return read_sharded(Path(path))
        # By name, not by Lightning's function: tensors of more than one part (8-bit moments) know no other way.
        return load_state(Path(path), "--ckpt_path", map_location=map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Take the completeness marker away first: what is half removed must not count."""
        path = Path(path)
        path.with_name(path.name + MARKER).unlink(missing_ok=True)
        super().remove_checkpoint(path)


class Checkpoint(ModelCheckpoint):
    """Save every so many optimizer steps and at the end; keep the newest few.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        keep: How many to keep, the newest first; -1 keeps all.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2):
        if every_n_steps < 1 or keep == 0 or keep < -1:
            raise ValueError(
                f"Checkpoint needs every_n_steps >= 1 and keep >= 1 (or -1 for all), not {every_n_steps} and {keep}."
            )
        super().__init__(
            filename="{step:08d}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
        )

    def _save_checkpoint(self, trainer: lightning.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero and Path(filepath).is_dir():
            mark_complete(Path(filepath))  # sharded: the strategy wrote it, past AtomicCheckpointIO

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last step too, whatever the interval."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class RunStatus(lightning.Callback):
    """Write down what is trained and on what, and that the run has finished; then let go of its folder.

    Args:
        run: The run's folder.
        lock: Held by this process; None on ranks other than the first.
    """

    def __init__(self, run: Run, lock: Lock | None):
        self.run = run
        self.lock = lock

    @rank_zero_only
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The machine, and the size of a language model; of what is trained beside one, the log tells."""
        self.run.write(device=device_name(pl_module.device), ranks=trainer.world_size)
        if not isinstance(pl_module, LanguageModule):
            return
        model = pl_module.model
        total, active, trained = parameter_counts(model)
        self.run.write(
            parameters={"total": total, "active": active, "trained": trained},
            experts={"per_layer": model.num_experts, "per_token": model.top_k},
        )

    @rank_zero_only
    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The last word; not reached when training was interrupted or failed."""
        if not trainer.interrupted:
            self.run.write(status="finished", steps=trainer.global_step)
        self._release()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Stay unfinished: the same command goes on from here."""
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()


def device_name(device: torch.device) -> str:
    """What a GPU calls itself, or a CPU where Linux tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
