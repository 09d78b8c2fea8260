"""The optimizer: which one, and what moments it keeps."""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass
class OptimizerConfig:
    """An optimizer with linear warm-up and cosine decay.

    Args:
        name: `adamw` keeps two float32 moments, 8 bytes per trained parameter; `adamw8bit` keeps them in blocks of 8
            bits (torchao; Dettmers et al. 2021), about 2 bytes; `adafactor` (Shazeer & Stern 2018) keeps one sum per
            row and one per column of a matrix, next to nothing, and steps relative to the size of a tensor: it wants
            a learning rate some ten times higher.
        weight_decay: Decay of matrices; vectors (norms, biases) have none.
        betas: Moments' decay rates; adafactor has a schedule of its own and ignores them.
        warmup_steps: Optimizer steps from 0 to the full learning rate.
        final_learning_rate: Learning rate at the last step, as a share of the full one.
    """

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
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
