"""The teacher's answer to a batch.

`OnlineTeacher` runs a frozen model beside the student; `CachedTeacher` reads what one said before from disk. What they
answer is a `TeacherSignal`, so that either can stand in the other's place without the objective knowing.

Shapes: B batch, T sequence of the student, U sequence of the teacher, M positions with KL, S sampled positions, Q query
positions of a sequence, G key-value groups, D teacher width, V teacher vocabulary, R pieces after the first of merged
tokens.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agri_moe.data.logit_cache import Answers, LogitCache, View, join, row_key, to_arrays
from agri_moe.data.merged_tokens import merged_of
from agri_moe.losses import Merged, SparseTeacher, align_attention, token_statistics
from agri_moe.models.causal import CausalModel, Reads

Array = np.ndarray[Any, Any]
Dtype = Literal["float32", "bfloat16", "float16", "float8", "float8_dynamic"]


@dataclass
class TeacherConfig:
    """Which teacher, and what it reads.

    Args:
        source: Folder or hub name of a causal language model with the student's tokenizer. Beside `cache` it is not
            loaded, and may be left out; if it is there, the cache must be of this model.
        cache: Folder that the `cache` command wrote: the teacher's answers are read from it. Only `objective.kl` can be
            asked then, forward and at temperature 1.
        view: What the teacher reads: `same` is the student's own token ids; `native` the row in the teacher's own chat
            template, thoughts where it puts them; `no_thought` likewise without the thought. By default `same`, or what
            the cache was made with.
        dtype: Type of the teacher's weights in memory; bfloat16 halves them against float32. `float8` halves those of
            the layers' linear maps again (torchao, a scale for each row; the head, which the loss reads, stays in
            bfloat16) and multiplies in bfloat16; `float8_dynamic` also rounds what they are multiplied with and
            multiplies in float8, on GPUs that can. Neither reaches the experts of a sparse teacher.
        min_aligned: A row is a bad row where a smaller share of its answer's tokens than this has a counterpart in what
            the teacher reads.
    """

    source: str | None = None
    cache: str | None = None
    view: View | None = None
    dtype: Dtype = "bfloat16"
    min_aligned: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.min_aligned <= 1:
            raise ValueError(f"model.teacher.min_aligned must be in [0, 1], not {self.min_aligned}.")
        if self.source is None and self.cache is None:
            raise ValueError("model.teacher needs a source (folder or hub name), or a cache that holds its answers.")

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

    hidden_MD: Tensor | None  # final hidden states at the positions with KL
    head_VD: Tensor | None  # the head that turns them into logits
    layers: dict[int, Tensor]  # layer -> [S, D], the residual stream at the sampled positions
    attention: dict[int, Tensor]  # layer -> [B, G, Q, T], attention over the tokens of the student's sequence
    sparse: SparseTeacher | None = None  # in place of hidden states and head: some tokens of the distributions
    merged: Merged | None = None  # where the student has merges of its pieces: what it says of the whole next token


class OnlineTeacher:
    """A frozen model that runs beside the student.

    It is deliberately no `nn.Module`: as a submodule, Lightning would put it in train mode, in every checkpoint and in
    the optimizer.

    Args:
        model: The teacher, already on its device.
        pieces: Of a student with merges of this teacher's pieces, how many pieces there are; None of any other.
    """

    def __init__(self, model: CausalModel, pieces: int | None = None):
        self.model = model.eval().requires_grad_(False)
        self.pieces = pieces

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
        signal = (
            self._ask(own, batch["teacher_positions"], reads) if self.pieces is None else self._spell(own, batch, reads)
        )
        # Brought to the tokens of the student's sequence, whatever the view.
        attention = {i: align_attention(seen, batch["key_tokens"]) for i, seen in signal.attention.items()}
        return signal._replace(attention=attention)

    def _spell(self, own: dict[str, Tensor], batch: dict[str, Tensor], reads: Reads) -> TeacherSignal:
        """The answer with what the teacher makes of the pieces after the first of the student's merged tokens."""
        assert self.pieces is not None, "else there are none"
        signal = self._ask(own, torch.cat([batch["teacher_positions"], batch["rest_positions"]]), reads)
        assert signal.hidden_MD is not None and signal.head_VD is not None, "a model answers with both"  # noqa: PT018
        count = len(batch["teacher_positions"])
        head_VD = signal.head_VD[: self.pieces]
        nll_R = token_statistics(signal.hidden_MD[count:], head_VD, batch["rest_targets"]).nll_N
        rest_M = -torch.cat([nll_R, nll_R.new_zeros(1)])[batch["rest_places"]].sum(1)
        return signal._replace(
            hidden_MD=signal.hidden_MD[:count], head_VD=head_VD, merged=merged_of(batch, rest_M, self.pieces)
        )

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


class CachedTeacher:
    """What a teacher said before, read from disk.

    Args:
        cache: Complete, and checked against the run.
    """

    def __init__(self, cache: LogitCache):
        self.cache = cache

    def entries(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The answers at a micro-batch's positions with KL, on the CPU, as tensors that travel with it.

        Args:
            batch: As `Objective.select` leaves it, on the CPU. Its numbers of rows are not looked at.

        Returns:
            `cached_ids` [M, K] int32, `cached_probs` [M, K], `cached_entropy` [M] and, unless the answers are samples,
            `cached_tail` [M], float32; with merged tokens `cached_whole` [M], the log-probability of all pieces.

        Raises:
            ValueError: If the cache has no answer for one of the positions.
        """
        ids, segments, places = (batch[name].flatten().numpy() for name in ("input_ids", "segment_ids", "position_ids"))
        wanted = batch["positions"][: len(batch["kl_targets"])].numpy()  # ascending, and so row by row
        row_starts, first = np.unique(wanted - places[wanted], return_index=True)
        begins = np.append(np.flatnonzero(places == 0), len(places))  # of rows, and of each token of padding
        ends = begins[np.searchsorted(begins, row_starts, side="right")]
        answers = [
            self._read(ids[start:end], segments[start:end], at)
            for start, end, at in zip(row_starts, ends, np.split(places[wanted], first[1:]), strict=False)
        ]
        arrays = to_arrays(join(answers or [Answers.none(self.cache.header.kind)]))
        found = {"ids": arrays.ids_MK, "probs": arrays.probs_MK, "tail": arrays.tail_M, "entropy": arrays.entropy_M}
        found["whole"] = arrays.whole_M
        return {f"cached_{name}": torch.from_numpy(a) for name, a in found.items() if a is not None}

    def _read(self, ids: Array, segments: Array, positions: Array) -> Answers:
        """The answers at some positions of a row."""
        row = self.cache.read(row_key(ids, segments))
        at = np.searchsorted(row.positions_N, positions)
        if at.max(initial=-1) >= len(row.positions_N) or (row.positions_N[at] != positions).any():
            raise ValueError(
                "model.teacher.cache has no answer at some positions of a row where this run asks the teacher: make it "
                "anew from this run's config with the cache command."
            )
        return row.select(at)

    def signal(self, batch: dict[str, Tensor], reads: Reads) -> TeacherSignal:
        """The teacher's answer at the positions that `Objective.select` has chosen, out of what travelled with them."""
        assert not reads.layers, "a run that compares residual streams is refused before it begins"
        assert not reads.attention, "and so is one that compares attention"
        sparse = SparseTeacher(
            batch["cached_ids"].long(),
            batch["cached_probs"],
            batch.get("cached_tail"),
            batch["cached_entropy"],
            self.cache.header.vocabulary,
        )
        merged = merged_of(batch, batch["cached_whole"], sparse.vocabulary) if "cached_whole" in batch else None
        return TeacherSignal(None, None, {}, {}, sparse, merged)
