"""The teacher's answer to a batch.

`OnlineTeacher` runs a frozen model beside the student. What it answers is a `TeacherSignal`, so that another kind of
teacher (one read from disk) can stand in its place without the objective knowing.

Shapes: B batch, T sequence of the student, U sequence of the teacher, M positions with KL, S sampled positions, Q query
positions of a sequence, G key-value groups, D teacher width, V teacher vocabulary.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agri_moe.losses import align_attention
from agri_moe.models.causal import CausalModel, Reads

Dtype = Literal["float32", "bfloat16", "float16", "float8", "float8_dynamic"]


@dataclass
class TeacherConfig:
    """Which teacher, and what it reads.

    Args:
        source: Folder or hub name of a causal language model with the student's tokenizer.
        view: What the teacher reads: `same` is the student's own token ids; `native` the row in the teacher's own chat
            template, thoughts where it puts them; `no_thought` likewise without the thought.
        dtype: Type of the teacher's weights in memory; bfloat16 halves them against float32. `float8` halves those of
            the layers' linear maps again (torchao, a scale for each row; the head, which the loss reads, stays in
            bfloat16) and multiplies in bfloat16; `float8_dynamic` also rounds what they are multiplied with and
            multiplies in float8, on GPUs that can. Neither reaches the experts of a sparse teacher.
        min_aligned: A row is a bad row where a smaller share of its answer's tokens than this has a counterpart in what
            the teacher reads.
    """

    source: str
    view: Literal["same", "native", "no_thought"] = "same"
    dtype: Dtype = "bfloat16"
    min_aligned: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.min_aligned <= 1:
            raise ValueError(f"model.teacher.min_aligned must be in [0, 1], not {self.min_aligned}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of what is not in float8."""
        return torch.bfloat16 if self.dtype.startswith("float8") else getattr(torch, self.dtype)

    def check(self) -> None:
        """Find out whether this machine can hold and run the teacher in its type.

        Raises:
            ValueError: If it cannot.
        """
        if not self.dtype.startswith("float8"):
            return
        if importlib.util.find_spec("torchao") is None:
            raise ValueError(
                f"model.teacher.dtype: {self.dtype} needs torchao, which is not installed; `pip install torchao`, or "
                "use bfloat16."
            )
        if self.dtype == "float8_dynamic" and not _multiplies_float8():
            raise ValueError(
                "model.teacher.dtype: float8_dynamic needs a GPU of compute capability 8.9 or above (L40, H100); use "
                "float8 or bfloat16."
            )

    def quantization(self) -> Any:
        """What transformers is given to load the weights in float8; None for other types."""
        if not self.dtype.startswith("float8"):
            return None
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
        from transformers import TorchAoConfig

        if self.dtype == "float8":
            return TorchAoConfig(Float8WeightOnlyConfig())
        return TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _multiplies_float8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


class TeacherSignal(NamedTuple):
    """What the teacher says of one micro-batch, without gradient."""

    hidden_MD: Tensor  # final hidden states at the positions with KL
    head_VD: Tensor  # the head that turns them into logits
    layers: dict[int, Tensor]  # layer -> [S, D], the residual stream at the sampled positions
    attention: dict[int, Tensor]  # layer -> [B, G, Q, T], attention over the tokens of the student's sequence


class OnlineTeacher:
    """A frozen model that runs beside the student.

    It is deliberately no `nn.Module`: as a submodule, Lightning would put it in train mode, in every checkpoint and in
    the optimizer.

    Args:
        model: The teacher, already on its device.
    """

    def __init__(self, model: CausalModel):
        self.model = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move the weights; Lightning does not, since it does not know of this model."""
        self.model.to(device)

    def signal(self, batch: dict[str, Tensor], reads: Reads) -> TeacherSignal:
        """The teacher's answer at the positions that `Objective.select` has chosen for it, in its own view."""
        view = "teacher_" if "teacher_input_ids" in batch else ""
        own = {"input_ids": batch[f"{view}input_ids"], "position_ids": batch[f"{view}position_ids"]}
        own["sample"] = batch["teacher_sample"]
        if reads.attention:
            own["queries"] = batch["teacher_queries"]
        signal = self._ask(own, batch["teacher_positions"], reads)
        # Brought to the tokens of the student's sequence, whatever the view.
        attention = {i: align_attention(seen, batch["key_tokens"]) for i, seen in signal.attention.items()}
        return signal._replace(attention=attention)

    def anchor(self, batch: dict[str, Tensor], reads: Reads) -> TeacherSignal:
        """Residual streams where the student's are sampled, of a model that reads what the student reads."""
        return self._ask(batch, batch["positions"][:0], reads)

    @torch.no_grad()
    def _ask(self, batch: dict[str, Tensor], positions: Tensor, reads: Reads) -> TeacherSignal:
        # Autocast would run the bfloat16 teacher's matrix products as they are, but cast its float32 ones.
        with torch.autocast(positions.device.type, enabled=False):
            out = self.model(batch, positions, lambda hidden, head: (hidden, head), reads)
        hidden_MD, head_VD = out.read
        return TeacherSignal(hidden_MD, head_VD, out.layers, out.attention)
