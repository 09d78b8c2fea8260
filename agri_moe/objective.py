"""What the student is trained for: which terms, on which tokens, with what weights.

    L = w_ce CE + w_kl T^2 KL(teacher || student) + w_cka mean_l (1 - CKA_l) + w_bal BAL + w_z Z

The maths of every term lives in `losses/`; this file chooses positions, weights and divisors.

Shapes: B batch, T sequence, N supervised positions of a micro-batch (the M that carry KL stand first), S sampled
positions, D model width, V vocabulary, E experts, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agri_moe.data.chat import Segment
from agri_moe.losses import LogitLoss, Routing, balance_loss, fused_ce_kl, linear_cka
from agri_moe.teacher import TeacherSignal

Batch = dict[str, Tensor]
SegmentName = Literal["system", "user", "thought", "assistant"]


@dataclass
class Schedule:
    """A value that moves from `start` to `end` over `steps` optimizer steps, after `delay` steps at `start`.

    Args:
        start: Value at the beginning.
        end: Value from step `delay + steps` on.
        steps: Length of the transition in optimizer steps.
        kind: `linear`, `cosine` (half a period, flat at both ends), or `constant` (a jump from start to end).
        delay: Optimizer steps at `start` before the transition begins.
    """

    start: float
    end: float
    steps: int
    kind: Literal["constant", "linear", "cosine"] = "linear"
    delay: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.delay < 0:
            raise ValueError(f"a schedule needs steps >= 1 and delay >= 0, not steps={self.steps}, delay={self.delay}.")

    def at(self, step: int) -> float:
        """Value at optimizer step `step`, counted from 0."""
        progress = min(max(step - self.delay, 0) / self.steps, 1.0)
        if self.kind == "constant":
            progress = float(progress == 1.0)
        elif self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value that the schedule takes."""
        return min(self.start, self.end), max(self.start, self.end)


Value = float | Schedule


def value_at(value: Value, step: int) -> float:
    """A number, or a schedule's value at this optimizer step."""
    return value.at(step) if isinstance(value, Schedule) else float(value)


def _bounds(value: Value) -> tuple[float, float]:
    return value.bounds() if isinstance(value, Schedule) else (float(value), float(value))


def _on(value: Value) -> bool:
    return _bounds(value)[1] > 0


@dataclass
class CrossEntropy:
    """Next-token cross-entropy on the student's whole vocabulary.

    Args:
        weight: A number or a schedule; 0 is off.
        label_smoothing: Share of the target mass spread evenly over the vocabulary, as in `torch.nn.functional`.
        segments: Segments whose tokens are learned.
    """

    weight: Value = 1.0
    label_smoothing: float = 0.0
    segments: list[SegmentName] = field(default_factory=lambda: ["thought", "assistant"])


@dataclass
class KL:
    """T^2 KL(teacher || student), both renormalised over the vocabulary that they share (Hinton et al. 2015).

    Not taken where the next token is a marker or the end of text, which the teacher never learned to place.

    Args:
        weight: A number or a schedule; 0 is off.
        temperature: Softens both distributions; a number or a schedule.
        segments: Segments whose tokens are compared. By default the advisory only: the student's thoughts are its own.
    """

    weight: Value = 0.0
    temperature: Value = 1.0
    segments: list[SegmentName] = field(default_factory=lambda: ["assistant"])


@dataclass
class CKA:
    """1 - debiased linear CKA between residual streams, mean over the mapped layers (Kornblith et al. 2019).

    Args:
        weight: A number or a schedule; 0 is off.
        sample_tokens: At most so many supervised tokens of the micro-batch are compared; more cost time and memory,
            fewer make the statistic noisy.
    """

    weight: Value = 0.0
    sample_tokens: int = 512


@dataclass
class Balance:
    """Load balance, E sum_e f_e P_e per layer, then the mean over layers; 1 at balance (Fedus et al. 2021, eq. 4).

    Args:
        weight: A number or a schedule; 0 is off. 0.01 is the value of the Switch paper.
    """

    weight: Value = 0.01


@dataclass
class RouterZ:
    """Mean of logsumexp(router logits)^2, keeps router logits small (Zoph et al. 2022, eq. 5).

    Args:
        weight: A number or a schedule; 0 is off. 0.001 is the value of the ST-MoE paper.
    """

    weight: Value = 0.001


class Term(NamedTuple):
    """One term of the objective on one micro-batch.

    `loss` is its weighted share of the optimizer step's total, with gradient; `total / tokens`, both summed over the
    micro-batches and ranks of a step, is the unweighted value that is logged. For a term that is a statistic of the
    micro-batch, `tokens` is 1, or 0 where the micro-batch is all padding.
    """

    loss: Tensor
    total: Tensor
    tokens: Tensor


def layer_map(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Uniform skip: each student layer with the teacher layer at the same relative depth, the last with the last.

    Student layer i of L_s (from 0) is compared with teacher layer round((i + 1) L_t / L_s) - 1.
    """
    return [(i, max(round((i + 1) * teacher_layers / student_layers) - 1, 0)) for i in range(student_layers)]


@dataclass
class Objective:
    """The terms of the loss; a term with weight 0 is not computed.

    Args:
        ce: Cross-entropy on the data.
        kl: Divergence from the teacher's distribution.
        cka: Similarity of hidden states to the teacher's.
        balance: Even load of the experts.
        router_z: Small router logits.
    """

    ce: CrossEntropy = field(default_factory=CrossEntropy)
    kl: KL = field(default_factory=KL)
    cka: CKA = field(default_factory=CKA)
    balance: Balance = field(default_factory=Balance)
    router_z: RouterZ = field(default_factory=RouterZ)

    def __post_init__(self) -> None:
        for name in ("ce", "kl", "cka", "balance", "router_z"):
            if _bounds(getattr(self, name).weight)[0] < 0:
                raise ValueError(f"objective.{name}.weight must not be negative; 0 turns the term off.")
        if _bounds(self.kl.temperature)[0] <= 0:
            raise ValueError("objective.kl.temperature must be positive; 1 leaves the distributions as they are.")
        if not 0 <= self.ce.label_smoothing < 1:
            raise ValueError(f"objective.ce.label_smoothing must be in [0, 1), not {self.ce.label_smoothing}.")
        if not self.ce.segments:
            raise ValueError("objective.ce.segments is empty: name at least one segment, such as assistant.")
        if extra := sorted(set(self.kl.segments) - set(self.ce.segments)):
            raise ValueError(
                f"objective.kl.segments names {', '.join(extra)}, which objective.ce.segments lacks; add it there."
            )
        if self.cka.sample_tokens < 4:
            raise ValueError("objective.cka.sample_tokens must be at least 4, the fewest that debiased CKA takes.")

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs a teacher."""
        return _on(self.kl.weight) or _on(self.cka.weight)

    @property
    def uses_hidden_states(self) -> bool:
        """Whether any term compares residual streams layer by layer."""
        return _on(self.cka.weight)

    def select(self, batch: Batch, control_ids: Sequence[int]) -> Batch:
        """Choose this micro-batch's positions, on the CPU, before the batch moves to the device.

        Doing it here keeps the step free of host-device synchronisation (boolean indexing waits for the device).

        Args:
            batch: As `data/chat_data.py` describes it, tensors [B, T].
            control_ids: Markers and the end of text: targets at which KL is not taken.

        Returns:
            `positions` int64 [N], flat indices (b T + t) of predicting positions, the KL ones first; `kl_targets`
            int64 [M], a view whose length says how many those are; `targets` and `segments` [N], token and segment to
            be predicted there; `sample` [S], the positions whose hidden states are compared.
        """
        segments = batch["target_segments"].flatten()
        targets = batch["target_ids"].flatten()
        supervised = torch.isin(segments, _segment_ids(self.ce.segments))
        control = torch.isin(targets, torch.tensor(sorted(control_ids), dtype=torch.int64))
        kl = supervised & torch.isin(segments, _segment_ids(self.kl.segments)) & ~control
        kl_positions = kl.nonzero()[:, 0]
        positions = torch.cat([kl_positions, (supervised & ~kl).nonzero()[:, 0]])
        rank = _hash(batch["row_ids"].flatten()[positions], batch["position_ids"].flatten()[positions])
        sample = positions[torch.argsort(rank)[: self.cka.sample_tokens]]
        return {
            "positions": positions,
            "kl_targets": targets[kl_positions],
            "targets": targets[positions],
            "segments": segments[positions],
            "sample": sample,
        }

    def logit_loss(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        batch: Batch,
        signal: TeacherSignal | None,
        *,
        step: int,
        replicas: int,
    ) -> LogitLoss:
        """CE and KL together, fused over chunks of the vocabulary projection.

        Args:
            hidden_ND: Student's final hidden states at `batch["positions"]`.
            head_VD: Student's head.
            batch: With the keys that `select` adds, on the device.
            signal: The teacher's answer; None without a teacher.
            step: Optimizer step, for schedules.
            replicas: World size times accumulated micro-batches: what the framework will divide the gradient by.
        """
        ce_count, kl_count = self.counts(batch)
        use_kl = signal is not None and _on(self.kl.weight)
        return fused_ce_kl(
            hidden_ND,
            head_VD,
            batch["targets"],
            signal.hidden_MD if signal and use_kl else None,
            signal.head_VD if signal and use_kl else None,
            ce_scale=value_at(self.ce.weight, step) * replicas / ce_count.clamp(min=1).float(),
            kl_scale=value_at(self.kl.weight, step) * replicas / kl_count.clamp(min=1).float() if use_kl else 0.0,
            temperature=value_at(self.kl.temperature, step),
            label_smoothing=self.ce.label_smoothing,
        )

    def logit_terms(self, loss: LogitLoss, batch: Batch, *, with_teacher: bool) -> dict[str, Term]:
        """CE and KL by name. They share one fused loss, which stands under `ce`."""
        count = torch.tensor([batch["targets"].shape[0], batch["kl_targets"].shape[0]], device=loss.loss.device)
        terms = {"ce": Term(loss.loss, loss.ce_sum, count[0])}
        if with_teacher and _on(self.kl.weight):
            terms["kl"] = Term(torch.zeros_like(loss.loss), loss.kl_sum, count[1])
        return terms

    def sample_terms(
        self,
        layers: list[Tensor],
        teacher_layers: list[Tensor],
        routed: Routing | None,
        batch: Batch,
        *,
        step: int,
        replicas: int,
    ) -> dict[str, Term]:
        """CKA, balance and router-z by name.

        CKA and balance are statistics of a sample: each micro-batch has its own, and the step takes their mean over
        the micro-batches that hold any row. Router-z is a sum over tokens like CE.

        Args:
            layers: Student's residual streams, one [S, D] per mapped layer; empty if not compared.
            teacher_layers: The teacher's, likewise.
            routed: What the routers did with the tokens that are no padding; None for a dense model.
            batch: With the keys that `select` adds, on the device.
            step: Optimizer step, for schedules.
            replicas: World size times accumulated micro-batches.
        """
        terms = {}
        has_rows = (batch["segment_ids"] != Segment.PAD).any().float()
        per_batch = replicas / batch["step_batches"].clamp(min=1).float()
        if layers and teacher_layers:
            similarity = [linear_cka(x, y) for x, y in zip(layers, teacher_layers, strict=True)]
            distance = (1 - torch.stack(similarity).mean()) * has_rows
            scale = value_at(self.cka.weight, step) * per_batch
            terms["cka"] = Term(scale * distance, distance.detach(), has_rows)
        if routed is not None:
            balance = balance_loss(routed).mean() * has_rows
            scale = value_at(self.balance.weight, step) * per_batch
            terms["balance"] = Term(scale * balance, balance.detach(), has_rows)
            scale = value_at(self.router_z.weight, step) * replicas / batch["step_tokens"].clamp(min=1).float()
            terms["router_z"] = Term(scale * routed.z_sum, routed.z_sum.detach(), routed.tokens)
        return terms

    def counts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens under CE and under KL in the whole optimizer step, 0-d int64 each."""
        by_segment, control = batch["step_targets"]
        ce = by_segment[_segment_ids(self.ce.segments).to(by_segment.device)].sum()
        kl_segments = _segment_ids(self.kl.segments).to(by_segment.device)
        return ce, (by_segment[kl_segments] - control[kl_segments]).sum()


def _segment_ids(names: Sequence[SegmentName]) -> Tensor:
    return torch.tensor([Segment[name.upper()] for name in names], dtype=torch.int64)


def _hash(row_ids: Tensor, position_ids: Tensor) -> Tensor:
    """A fixed pseudo-random order of (row, position), so that packing does not change which tokens are sampled.

    Two rounds of a 64-bit multiply-xorshift (the finaliser of splitmix64); int64 arithmetic wraps as it should.
    """
    x = row_ids * 0x9E3779B97F4A7C1 + position_ids * 0x7F4A7C15F39CC060 + 1
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = (x ^ (x >> 30)) * multiplier
    return x ^ (x >> 31)
