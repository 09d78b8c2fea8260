"""What every module of this package that `fit` trains has in common, whatever it trains."""

import math
import os
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import lightning

from agri_moe.data.chat import Chat


class TrainingModule(lightning.LightningModule, ABC):
    """A module that the command line trains.

    Nothing is loaded before `configure_model`; `check` finds what can be found wrong before that.
    """

    @abstractmethod
    def check(self, chat: Chat) -> None:
        """Find mistakes in the settings before any weight is read or any row is tokenised.

        Raises:
            ValueError: In one sentence that names the key.
        """

    @abstractmethod
    def check_steps(self, max_steps: int) -> None:
        """Find settings that do not go with the length of the run, as far as that shows before any row is read.

        Args:
            max_steps: As the trainer has it; -1 if epochs end the run.

        Raises:
            ValueError: If there are any.
        """

    @abstractmethod
    def log_evaluation(self, prefix: str) -> None:
        """Log what validation (`val`) or test (`test`) has gathered, across ranks, and begin anew."""

    def on_validation_epoch_end(self) -> None:
        """Log the validation."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test."""
        self.log_evaluation("test")

    def setup(self, stage: str) -> None:
        """Refuse a precision in which gradients would have to be scaled."""
        if str(self.trainer.precision).startswith("16"):
            raise ValueError("trainer.precision: float16 is not supported; use bf16-mixed, bf16-true or 32-true.")

    @property
    def chat(self) -> Chat:
        """Tokenizer, markers and chat template of the data module."""
        return self.trainer.datamodule.chat  # type: ignore[attr-defined]

    @property
    def seed(self) -> int:
        """The run's `seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))

    @cached_property
    def replicas(self) -> int:
        """What the framework divides each micro-batch's gradient by: accumulated micro-batches times ranks."""
        return self.trainer.world_size * self.trainer.accumulate_grad_batches

    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Lightning's own estimate is not used: it rebuilds the loaders and so loses the place in a resumed epoch.
        """
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise ValueError("trainer.max_steps or trainer.max_epochs must be set: the schedule needs an end.")
        return trainer.max_epochs * self._epoch_steps()

    def _epoch_steps(self) -> int:
        return math.ceil(self._epoch_batches() / self.trainer.accumulate_grad_batches)

    def _epoch_batches(self) -> int:
        """Micro-batches of one epoch on each rank."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "streaming", False):
            raise ValueError(
                "trainer.max_steps must be set, and stages must count in steps, for streamed rows: "
                "their number is not known."
            )
        batches, limit = len(data.train_dataloader()), self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def _unlog(self) -> None:
        """Drop what was logged of training: Lightning repeats a value at every step until another takes its place."""
        results: Any = self.trainer.fit_loop.epoch_loop._results
        for key in [key for key, result in results.items() if result.meta.name.startswith("train/")]:
            del results[key]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the gradients go.

        Lightning clears them between the next forward and backward pass: all that while they would stand beside the
        activations.
        """
        super().optimizer_step(*args, **kwargs)
        self.zero_grad(set_to_none=True)


def layer_name(term: str, layer: int) -> str:
    """Name of one layer's share of a term, as it is logged."""
    return f"{term}/layer_{layer:02d}"
