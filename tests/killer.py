"""A callback that ends the process as a power cut would, for the resume test."""

import os
import signal

import lightning


class KillAt(lightning.Callback):
    """SIGKILL to itself in the middle of an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
