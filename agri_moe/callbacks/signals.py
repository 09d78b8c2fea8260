"""Signals: the first asks for one last checkpoint, a second ends the process at once."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_warn

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SECONDS = 1.0
"""One Ctrl-C may arrive twice: from the terminal, and from the launcher that got it too."""


class Stopped(SystemExit):
    """Training was told to stop, and has saved; the exit status is 128 and the signal's number, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class Signals:
    """Notes SIGTERM, SIGINT and SIGUSR1 for `Checkpoint` to act on at the end of the optimizer step.

    Before training has begun there is nothing to save: the first signal ends the process then.

    Attributes:
        received: Number of the signal that came; 0 for none.
        training: Whether a checkpoint could be saved.
    """

    def __init__(self) -> None:
        self.received = 0
        self.training = False
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def install(self, trainer: lightning.Trainer, ready: Callable[[], None]) -> None:
        """Take the place of the handlers of before and of Lightning's.

        Lightning's talk to the other ranks from within the handler, exit with 0, and under SLURM save hpc_ckpt_N.ckpt
        apart from the run's checkpoints.

        Args:
            trainer: Whose handlers are not to be.
            ready: Called where Lightning would install them: everything is restored, and the loops begin.
        """
        trainer._signal_connector.register_signal_handlers = ready  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._handle) for number in HANDLED}

    def restore(self) -> None:
        """Put back the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._time > SAME_SECONDS:
                os._exit(128 + number)
            return
        if not self.training:
            raise Stopped(number)
        self.received, self._time = number, time.monotonic()
        told = f"\n{signal.Signals(number).name}: saving at the end of this step; a second signal exits at once.\n"
        os.write(2, told.encode())  # print may not be called from within itself


def requeue() -> None:
    """Put this SLURM job back in the queue, if it is one: the same command then goes on from the last checkpoint."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()
        rank_zero_warn(f"scontrol did not put job {job} back in the queue ({why}): start the same command again.")
