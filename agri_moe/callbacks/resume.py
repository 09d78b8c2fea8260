"""Checkpoints that count only when whole, and what a run says of itself."""

import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.distributed.checkpoint.api import CheckpointException

from agri_moe.callbacks.signals import Signals, Stopped, requeue
from agri_moe.foreign_files import check_pieces, load_state
from agri_moe.models.base import LanguageModule, parameter_counts
from agri_moe.runs import (
    NO_ROOM,
    PARTIAL,
    Lock,
    Run,
    beside,
    checkpoints_in,
    commit,
    remove,
    remove_leftovers,
    size_on_disk,
    step_of,
    storage_error,
)
from agri_moe.trained import check_intact, read_sharded


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the final name, flush, write checksums, rename: a crash at any moment leaves no false checkpoint.

    Lightning's own saves stage in the temporary folder; on another filesystem, a full disk leaves a broken file under
    the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to `path`, a local path; to one that ends in `.partial`, for `commit` to finish."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.name.endswith(PARTIAL)
        with (path if unfinished else beside(path)).open("wb") as file:
            torch.save(checkpoint, file)
        if not unfinished:
            commit(path)

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
        remove(Path(path))


class Checkpoint(ModelCheckpoint):
    """Save every so many optimizer steps or minutes, when a signal asks for it, and at the end; keep the newest few.

    What is saved is the state at the end of an optimizer step, before the validation that may follow it. The checkpoint
    gets its name a little later, once what was logged of that step is on disk: a run that goes on from it logs no step
    twice and none too few. Where the validation after it was cut off, that is done first.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; None saves by the clock alone.
        every_n_minutes: Minutes after which one is saved whatever the step; None saves by steps alone.
        keep: How many to keep, the newest first; -1 keeps all. An older one is deleted only once a newer one is whole.

    Attributes:
        signals: What asks to stop; None without the command line.
        lock: Of the run's folder, held by this process; None on other ranks, and without the command line.
        validated: The step after which the run's folder has a validation already; None lets `catch_up` do none.
    """

    def __init__(self, every_n_steps: int | None = 500, every_n_minutes: float | None = None, keep: int = 2):
        if keep == 0 or keep < -1:
            raise ValueError(f"Checkpoint.keep is {keep}: it must be at least 1, or -1 for all.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Checkpoint.every_n_steps is {every_n_steps}: it must be at least 1, or null.")
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise ValueError(f"Checkpoint.every_n_minutes is {every_n_minutes}: it must be above 0, or null.")
        if every_n_steps is None and every_n_minutes is None:
            raise ValueError("Checkpoint needs every_n_steps or every_n_minutes: else nothing is saved before the end.")
        # Lightning's own record of what to keep does not outlive the process: the folder itself is looked at instead.
        super().__init__(filename="{step:08d}", save_top_k=-1, save_on_train_epoch_end=False)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.signals: Signals | None = None
        self.lock: Lock | None = None
        self.validated: int | None = None
        self._group: dist.ProcessGroup | None = None
        self._written: Path | None = None  # not yet under its name
        self._stop = 0
        self._owed = False  # the validation after the step that was restored
        self._loops: dict[str, Any] = {}  # of the end of the step, while validation runs

    @property
    def state_key(self) -> str:
        """The same whatever the settings, which may change when a run goes on."""
        return "Checkpoint"

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation was about to follow."""
        return {"validation_follows": bool(self._loops)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved."""
        self._owed = state_dict["validation_follows"]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let Lightning count in micro-batches of this run where the checkpoint's were of another size.

        They are, on another number of ranks. What they left of their epoch is the data module's to share out; but
        Lightning ends the epoch where its own count says so, too.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        position = checkpoint.get(type(data).__qualname__, {}).get("position")
        if position is None:
            return
        current = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        done = data.train_dataloader().batch_sampler.done_of_epoch(position, current["processed"])
        more = done - current["processed"]
        current |= {name: count + more for name, count in current.items()}

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the clock, and at what is saved already."""
        self._meet(trainer)
        self._step, self._saved_at = trainer.global_step, time.monotonic()
        if self.file_exists(self._path(trainer), trainer):
            self._last_global_step_saved = trainer.global_step
        if self.signals is not None:
            self.signals.training = True

    def catch_up(self, trainer: lightning.Trainer) -> None:
        """Do the validation after the restored step, where it was cut off; before training, which may be at its end."""
        self._meet(trainer)
        if not self._owed or self.validated in (None, trainer.global_step):
            return
        loop, results = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector._first_loop_iter
        loop.restarting = False  # from its first batch
        trainer.validating = True
        loop.run()
        trainer.training = True
        loop.restarting = True
        trainer._logger_connector._first_loop_iter = results

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where the finished step is due."""
        if trainer.global_step == self._step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # still accumulating
        self._step = trainer.global_step
        self._loops = {}
        epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if fetcher is not None and not epoch_loop.val_loop.skip and epoch_loop._should_check_val_fx(fetcher):
            self._remember_loops(trainer)
        self._stop, late = self._agree(trainer)
        if late or self._stop or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._write(trainer)
            self._stop = self._stop or self._agree(trainer)[0]  # it may have come while that was written

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """By now the step before has been logged."""
        self._loops = {}
        self._finish(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """So it has here."""
        self._finish(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """Do not make a signal wait for the end of a validation: what was trained is saved, and it is begun anew."""
        if trainer.sanity_checking or not self._loops:
            return
        self._stop = self._agree(trainer)[0]
        if self._stop:
            self._write(trainer)
            self._finish(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save nothing: what validation finds chooses no checkpoint."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The last step of an epoch has been logged too."""
        self._finish(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last step too, whatever the interval."""
        self._loops = {}
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer)
        self._finish(trainer)

    def _meet(self, trainer: lightning.Trainer) -> None:
        """Make the group in which ranks agree when to save; on all ranks."""
        asked = self.signals is not None or self.every_n_minutes is not None
        if self._group is None and trainer.world_size > 1 and asked:
            self._group = dist.new_group(backend="gloo")  # between CPUs: no step waits for the device

    def _agree(self, trainer: lightning.Trainer) -> tuple[int, bool]:
        """The signal that any rank has received, and whether the first rank's clock says that it is time to save."""
        received = 0 if self.signals is None else self.signals.received
        minutes = (time.monotonic() - self._saved_at) / 60
        late = self.every_n_minutes is not None and minutes >= self.every_n_minutes and trainer.is_global_zero
        if self._group is None:
            return received, late
        both = torch.tensor([received, late])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        return int(both[0]), bool(both[1])

    # ------------------------------------------------------------------ how

    def _remember_loops(self, trainer: lightning.Trainer) -> None:
        """Keep the trainer's progress as it is before a validation.

        Saved from within one, a checkpoint would have Lightning go on in its middle, without what it had found so far.
        """
        self._loops = {"fit_loop": trainer.fit_loop.state_dict()}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save progress as it was when the step ended."""
        checkpoint["loops"] |= self._loops

    def _write(self, trainer: lightning.Trainer) -> None:
        """Write the state beside its place; on all ranks."""
        if self._last_global_step_saved == trainer.global_step:
            return
        path, problem = self._path(trainer), ""
        if in_pieces(trainer):  # which every rank writes: where one cannot, the others would wait for it in vain
            try:
                beside(path).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = self._explain(path, error)
            self._refuse_to_go_on(trainer, path, problem)
        try:
            super()._save_checkpoint(trainer, str(beside(path)))
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = self._explain(path, error)
            trainer.strategy.barrier()  # the one at the end of Lightning's save, where ranks wait that had no trouble
        self._refuse_to_go_on(trainer, path, problem)
        self._written = path
        self._saved_at = time.monotonic()

    def _path(self, trainer: lightning.Trainer) -> Path:
        assert self.dirpath is not None, "set by the trainer's set-up"
        return Path(self.dirpath) / f"step={trainer.global_step:08d}.ckpt"

    def _finish(self, trainer: lightning.Trainer) -> None:
        """Give the checkpoint its name, delete older ones, and stop if a signal came; on all ranks."""
        if self._written is not None:
            path, self._written, problem = self._written, None, ""
            if self.lock is not None:
                self.lock.check()  # the disk may have made this process stand still while it saved
            try:
                if trainer.is_global_zero:
                    for logger in trainer.loggers:
                        logger.save()
                    if in_pieces(trainer):
                        check_pieces(beside(path))
                    commit(path)
                    self._delete_older(path)
            except OSError as error:
                problem = self._explain(path, error)
            self._refuse_to_go_on(trainer, path, problem)
            self.best_model_path = self.last_model_path = self._last_checkpoint_saved = str(path)
        if self._stop:
            rank_zero_info("Saved; the same command goes on from here.")
            if self._stop == signal.SIGUSR1 and trainer.is_global_zero:
                requeue()
            raise Stopped(self._stop)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """What had been written when something else failed is whole: keep it."""
        ours = trainer.is_global_zero and (self.lock is None or self.lock.held())
        if self._written is not None and ours and storage_error(exception) is None:
            commit(self._written)
        self._written = None

    def _delete_older(self, newest: Path) -> None:
        older = [path for path in checkpoints_in(newest.parent) if step_of(path) < step_of(newest)]
        for path in older[self.keep - 1 :] if self.keep > 0 else []:
            remove(path)

    def _explain(self, path: Path, error: BaseException) -> str:
        """One sentence for what the disk says; raises an error that is none of its own."""
        cause = storage_error(error)
        if cause is None:
            raise error
        size = max((size_on_disk(p) for p in checkpoints_in(path.parent)), default=0)
        takes = f" (a checkpoint takes {size / 1e9:.3g} GB)" if size and cause.errno in NO_ROOM else ""
        return (
            f"{path} could not be saved, {cause.strerror or cause}{takes}: mend that and give the same command again, "
            "it goes on from the checkpoint before."
        )

    def _refuse_to_go_on(self, trainer: lightning.Trainer, path: Path, problem: str) -> None:
        """End the run on all ranks if saving has failed on one."""
        problems = [problem]
        if trainer.world_size > 1:
            problems = [""] * trainer.world_size
            dist.all_gather_object(problems, problem)
        if any(problems):
            if trainer.is_global_zero:
                remove_leftovers(path.parent)
            raise ValueError(next(filter(None, problems)))


def in_pieces(trainer: lightning.Trainer) -> bool:
    """Whether a checkpoint is a folder to which every rank adds its piece."""
    return bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False))


class RunStatus(lightning.Callback):
    """Write down what is trained and on what, how far it is validated, and that the run has finished.

    Args:
        run: The run's folder.
        lock: Held by this process; None on ranks other than the first.
    """

    def __init__(self, run: Run, lock: Lock | None):
        self.run = run
        self.lock = lock

    def on_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing into a run that another process has taken over."""
        if self.lock is not None:
            self.lock.check()

    @rank_zero_only
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note that the validation after this step is in the folder, for a run that goes on from this step."""
        if trainer.sanity_checking:
            return
        if self.lock is not None:
            self.lock.check()
        for logger in trainer.loggers:
            logger.save()
        self.run.write(validated=trainer.global_step)

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
        """The last word; not reached when training was interrupted or failed: the same command goes on then."""
        if not trainer.interrupted:
            if self.lock is not None:
                self.lock.check()
            self.run.write(status="finished", steps=trainer.global_step)


def device_name(device: torch.device) -> str:
    """What a GPU calls itself, or a CPU where Linux tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
