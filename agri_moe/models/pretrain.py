"""Train a dense or sparse language model on text or chat rows with cross-entropy."""

from typing import Any

from agri_moe.models.base import LanguageModule
from agri_moe.models.source import ModelConfig
from agri_moe.objective import Batch


class PretrainModule(LanguageModule):
    """A language model in training without a teacher.

    Args:
        network: The model to train: a checkpoint, a dense one upcycled on the fly, or a config with random weights.
        **kwargs: Objective, optimizer and freezing, see `LanguageModule`.
    """

    model_key = "model.network"

    def __init__(self, network: ModelConfig, **kwargs: Any):
        super().__init__(**kwargs)
        if any(objective.uses_teacher or objective.uses_anchor for objective in self.objectives):
            raise ValueError(
                "model.objective: kl, cka, hidden, attention and anchor need another model, which only DistillModule "
                "has; set their weights to 0."
            )
        self.network_config = network

    @property
    def model_config(self) -> ModelConfig:
        """The model."""
        return self.network_config

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch of cross-entropy, balance and router-z."""
        return self.learn(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses per segment and routing."""
        self.evaluate(batch)
