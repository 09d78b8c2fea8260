"""The optimizer: which one, what moments it keeps, and its learning rate over time."""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass
class OptimizerConfig:
    """An optimizer and the way of its learning rate.

    Args:
        name: `adamw` keeps two float32 moments, 8 bytes per trained parameter; `adamw8bit` keeps them in blocks of 8
            bits (torchao; Dettmers et al. 2021), about 2 bytes; `adafactor` (Shazeer & Stern 2018) keeps one sum per
            row and one per column of a matrix, next to nothing, and steps relative to the size of a tensor: it wants
            a learning rate some ten times higher.
        weight_decay: Decay of matrices; vectors (norms, biases) have none.
        betas: Moments' decay rates; adafactor has a schedule of its own and ignores them.
        schedule: What follows the linear warm-up. `cosine` falls to `final_learning_rate` at the last step.
            `inverse_sqrt` (Vaswani et al. 2017, section 5.3; with adafactor as in Shazeer & Stern 2018) falls with the
            root of the step and knows no last one: a run of it can be prolonged, and read at any step.
        warmup_steps: Optimizer steps from 0 to the full learning rate.
        final_learning_rate: With `cosine`, the learning rate at the last step, as a share of the full one.
    """

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    warmup_steps: int = 100
    final_learning_rate: float = 0.1

    def check(self) -> None:
        """Find out whether what the optimizer needs is installed.

        Raises:
            ValueError: If it is not.
        """
        if self.name == "adamw8bit" and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                "model.optimizer.name: adamw8bit needs torchao, which is not installed; `pip install torchao`, or use "
                "adamw."
            )

    def factor(self, step: int, *, warmup: int, total: int) -> float:
        """Factor on the learning rate at optimizer step `step`, counted from 0.

        Args:
            step: Which one.
            warmup: Steps of warm-up.
            total: Steps in all.
        """
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "inverse_sqrt":
            return math.sqrt((warmup + 1) / (step + 1))
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return self.final_learning_rate + (1 - self.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2

    def moment_bytes(self, weight_bytes: int) -> float:
        """Bytes of moments for each trained parameter whose weight takes `weight_bytes`, but for small tensors."""
        # Blocks of 256 with a float32 scale each; a row and a column of a matrix, against the matrix.
        return {"adamw": 2.0 * weight_bytes, "adamw8bit": 2 * (1 + 4 / 256), "adafactor": 0.0}[self.name]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups that have their `lr` and `weight_decay`."""
        if self.name == "adamw8bit":
            from torchao.optim import AdamW8bit

            return AdamW8bit(groups, betas=self.betas)
        if self.name == "adafactor":
            return torch.optim.Adafactor(groups)
        return torch.optim.AdamW(groups, betas=self.betas, fused=True)
