"""The teacher's answer to a batch.

`OnlineTeacher` runs the frozen model beside the student. What it answers is a `TeacherSignal`, so that another kind of
teacher (one read from disk) can stand in its place without the objective knowing.

Shapes: B batch, T sequence, M positions with KL, S sampled positions, D teacher width, V teacher vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agri_moe.models.causal import CausalModel


@dataclass
class TeacherConfig:
    """Which teacher, and what it reads.

    Args:
        source: Folder or hub name of a causal language model with the student's tokenizer.
        view: What the teacher reads: `same` is the student's own token ids.
        dtype: Type of the teacher's weights in memory; bfloat16 halves them against float32.
    """

    source: str
    view: Literal["same"] = "same"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class TeacherSignal(NamedTuple):
    """What the teacher says of one micro-batch, without gradient."""

    hidden_MD: Tensor  # final hidden states at the positions with KL
    head_VD: Tensor  # the head that turns them into logits
    layers: list[Tensor]  # one [S, D] per mapped layer: the residual stream at the sampled positions


class OnlineTeacher:
    """A frozen model that runs beside the student.

    It is deliberately no `nn.Module`: as a submodule, Lightning would put it in train mode, in every checkpoint and in
    the optimizer.

    Args:
        model: The teacher, already on its device.
        layers: Which layers' residual streams the objective asks for.
    """

    def __init__(self, model: CausalModel, layers: Sequence[int]):
        self.model = model.eval().requires_grad_(False)
        self.layers = layers

    def to(self, device: torch.device) -> None:
        """Move the weights; Lightning does not, since it does not know of this model."""
        self.model.to(device)

    @torch.no_grad()
    def signal(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """The teacher's answer at `batch["positions"]` (its first M) and `batch["sample"]`."""
        kl_positions = batch["positions"][: batch["kl_targets"].shape[0]]
        # Autocast would run the bfloat16 teacher's matrix products as they are, but cast its float32 ones.
        with torch.autocast(kl_positions.device.type, enabled=False):
            out = self.model(batch, kl_positions, lambda hidden, head: (hidden, head), layers=self.layers)
        hidden_MD, head_VD = out.read
        return TeacherSignal(hidden_MD, head_VD, out.layers)
