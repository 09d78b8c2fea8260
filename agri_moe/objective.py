"""What the student is trained for: which terms, on which tokens, with what weights.

    L = w_ce CE + w_kl T^2 D(teacher, student) + w_cka mean_l g_l (1 - CKA_l) + w_hid mean_l g_l HID_l
        + w_att mean_l g_l ATT_l + w_div DIV + w_bal BAL + w_z Z

The maths of every term lives in `losses/`; this file chooses positions, weights and divisors.

Shapes: B batch, T sequence, N supervised positions of a micro-batch (the M that carry KL stand first), S sampled
positions, Q query positions of a sequence, D model width, V vocabulary, E experts, P compared layer pairs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agri_moe.data.chat import Segment
from agri_moe.data.merged_tokens import MergedTokens
from agri_moe.layer_map import Pairs, layer_pairs
from agri_moe.losses import (
    LogitLoss,
    Routing,
    attention_distance,
    balance_loss,
    expert_similarity,
    fused_ce_kl,
    hidden_distance,
    linear_cka,
    uniform_head_map,
)
from agri_moe.models.causal import Forward, Reads
from agri_moe.schedules import (
    AdaptiveTemperature,
    LayerWeights,
    Moment,
    RunningMean,
    Value,
    bounds,
    is_on,
    layer_weights,
    value_at,
)
from agri_moe.teacher import TeacherSignal
from agri_moe.terms import (
    CKA,
    KL,
    Anchor,
    Attention,
    Balance,
    CrossEntropy,
    Diversity,
    Hidden,
    RouterZ,
    SegmentName,
)

Batch = dict[str, Tensor]


class Term(NamedTuple):
    """One term of the objective on one micro-batch.

    `loss` is its weighted share of the optimizer step's total, with gradient; `total / tokens`, both summed over the
    micro-batches and ranks of a step, is the unweighted value that is logged. For a term that is a statistic of the
    micro-batch, `tokens` is 1, or 0 where the micro-batch has nothing to compare. `layers` splits the total by pair of
    layers, [P].
    """

    loss: Tensor
    total: Tensor
    tokens: Tensor
    layers: Tensor | None = None


class Plan(NamedTuple):
    """What an objective wants to see of the models."""

    pairs: dict[str, Pairs]  # compared layers of each term that compares any
    student: Reads
    teacher: Reads
    anchor: Reads


Running = Mapping[str, RunningMean]
"""Running means by name: `teacher_entropy`, and the terms whose layers are balanced."""

REPRESENTATION = ("cka", "hidden", "anchor_cka", "anchor_hidden")
TEACHER_TERMS = ("kl", "cka", "hidden", "attention")


@dataclass
class Objective:
    """The terms of the loss; a term with weight 0 is not computed.

    Args:
        ce: Cross-entropy on the data.
        kl: Divergence from the teacher's distribution.
        cka: Similarity of hidden states to the teacher's.
        hidden: Distance of hidden states from the teacher's.
        attention: Divergence of attention from the teacher's.
        diversity: Experts that do different things.
        anchor: Hidden states against those of the dense source.
        balance: Even load of the experts.
        router_z: Small router logits.
        alpha: The blended form (1 - alpha) CE + alpha T^2 KL: takes the place of the weights of ce and kl. A number or
            a schedule in [0, 1].
    """

    ce: CrossEntropy = field(default_factory=CrossEntropy)
    kl: KL = field(default_factory=KL)
    cka: CKA = field(default_factory=CKA)
    hidden: Hidden = field(default_factory=Hidden)
    attention: Attention = field(default_factory=Attention)
    diversity: Diversity = field(default_factory=Diversity)
    anchor: Anchor = field(default_factory=Anchor)
    balance: Balance = field(default_factory=Balance)
    router_z: RouterZ = field(default_factory=RouterZ)
    alpha: Value | None = None

    def __post_init__(self) -> None:
        for term_name, term in self._terms.items():
            name = term_name.replace("anchor_", "anchor.")
            if bounds(term.weight)[0] < 0:
                raise ValueError(f"objective.{name}.weight must not be negative; 0 turns the term off.")
            extra = sorted(set(getattr(term, "segments", None) or []) - set(self.ce.segments))
            if extra and self.uses(term_name):
                raise ValueError(
                    f"objective.{name}.segments names {', '.join(extra)}, which objective.ce.segments lacks; "
                    "add it there."
                )
            if getattr(term, "segments", None) == []:
                raise ValueError(f"objective.{name}.segments is empty: name at least one segment, such as assistant.")
            if getattr(term, "sample_tokens", 4) < 4:
                raise ValueError(f"objective.{name}.sample_tokens must be at least 4: fewer cannot be compared.")
        if self.alpha is not None:
            if not 0 <= bounds(self.alpha)[0] <= bounds(self.alpha)[1] <= 1:
                raise ValueError("objective.alpha must be in [0, 1]: it is the share of the divergence in the blend.")
            if self.kl.weight != 0.0 or self.ce.weight != 1.0:
                raise ValueError("objective.alpha takes the place of ce.weight and kl.weight: leave those two out.")
        if bounds(self.kl.temperature)[0] <= 0:
            raise ValueError("objective.kl.temperature must be positive; 1 leaves the distributions as they are.")
        if not 0 < self.kl.beta < 1:
            raise ValueError(f"objective.kl.beta must lie between 0 and 1, not {self.kl.beta}; 0.5 treats both alike.")
        if not 0 <= self.ce.label_smoothing < 1:
            raise ValueError(f"objective.ce.label_smoothing must be in [0, 1), not {self.ce.label_smoothing}.")
        if bounds(self.ce.thought_weight)[0] < 0:
            raise ValueError("objective.ce.thought_weight must not be negative; 0 leaves the thought out.")
        if self.attention.queries < 1:
            raise ValueError("objective.attention.queries must be at least 1.")

    @property
    def _terms(self) -> dict[str, Any]:
        """The settings of every term by its name."""
        names = ("ce", "kl", "cka", "hidden", "attention", "diversity", "balance", "router_z")
        anchors = {"anchor_cka": self.anchor.cka, "anchor_hidden": self.anchor.hidden}
        return {name: getattr(self, name) for name in names} | anchors

    # ------------------------------------------------------------------ what is asked for

    def uses(self, *names: str) -> bool:
        """Whether any of these terms ever has a weight."""
        return any(is_on(self.kl_weight if name == "kl" else self._terms[name].weight) for name in names)

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs a teacher."""
        return self.uses(*TEACHER_TERMS)

    @property
    def uses_anchor(self) -> bool:
        """Whether any term needs the dense source."""
        return self.uses("anchor_cka", "anchor_hidden")

    @property
    def kl_weight(self) -> Value:
        """Weight of the divergence, `alpha` if that is set."""
        return self.kl.weight if self.alpha is None else self.alpha

    def ce_weight_at(self, step: int) -> float:
        """Weight of cross-entropy, 1 - `alpha` if that is set."""
        return value_at(self.ce.weight, step) if self.alpha is None else 1.0 - value_at(self.alpha, step)

    def plan(self, student_layers: int, teacher_layers: int) -> Plan:
        """What to read of models of so many layers; the anchor has as many as the student.

        Raises:
            ValueError: If a map does not fit the models.
        """
        pairs = {}
        for name in (*REPRESENTATION, "attention"):
            if self.uses(name):
                other = student_layers if name.startswith("anchor") else teacher_layers
                key = f"objective.{name.replace('anchor_', 'anchor.')}.layers"
                layers = self._terms[name].layers
                pairs[name] = layer_pairs(layers, student_layers, other, key, attention=name == "attention")

        def side(which: int, *names: str) -> list[int]:
            return sorted({pair[which] for name in names for pair in pairs.get(name, [])})

        anchors = ("anchor_cka", "anchor_hidden")
        return Plan(
            pairs,
            student=Reads(side(0, *REPRESENTATION), side(0, "attention"), experts=self.uses("diversity")),
            teacher=Reads(side(1, "cka", "hidden"), side(1, "attention")),
            anchor=Reads(side(1, *anchors)),
        )

    def running(self, plan: Plan) -> dict[str, RunningMean]:
        """Fresh running means for whatever follows one."""
        means = {
            name: RunningMean(len(pairs))
            for name, pairs in plan.pairs.items()
            if self._terms[name].layer_weights == "balanced"
        }
        if self.uses("kl") and isinstance(self.kl.temperature, AdaptiveTemperature):
            means["teacher_entropy"] = RunningMean(decay=self.kl.temperature.decay)
        return means

    def check_offline(self, segments: Sequence[str]) -> None:
        """Refuse what a teacher that is read from disk cannot be asked.

        Args:
            segments: Those that it has answers for.

        Raises:
            ValueError: Naming the setting.
        """
        for name in TEACHER_TERMS[1:]:
            if self.uses(name):
                raise ValueError(
                    f"objective.{name} looks inside the teacher, and model.teacher.cache holds only its distributions: "
                    f"set objective.{name}.weight: 0, or name the teacher by model.teacher.source alone."
                )
        if not self.uses("kl"):
            return
        if self.kl.divergence != "forward" or bounds(self.kl.temperature) != (1.0, 1.0):
            key = "divergence" if self.kl.divergence != "forward" else "temperature"
            raise ValueError(
                f"objective.kl.{key} needs the teacher's whole distribution, of which model.teacher.cache holds some "
                "tokens: use divergence: forward at temperature: 1, or name the teacher by model.teacher.source alone."
            )
        if lacking := [name for name in self.kl.segments if name not in segments]:
            raise ValueError(
                f"objective.kl.segments names {lacking[0]}, and model.teacher.cache was made with other segments "
                f"({', '.join(segments)}): make it anew with {lacking[0]} among its --segments."
            )

    def divergence_only(self) -> "Objective":
        """The objective for text that the student wrote itself: no term that would teach it its own words."""
        off: dict[str, Any] = {name: dataclasses.replace(getattr(self, name), weight=0.0) for name in TEACHER_TERMS[1:]}
        ce, kl = dataclasses.replace(self.ce, weight=0.0), dataclasses.replace(self.kl, weight=self.kl_weight)
        return dataclasses.replace(self, ce=ce, kl=kl, anchor=Anchor(), alpha=None, **off)

    # ------------------------------------------------------------------ which tokens

    def select(self, batch: Batch, control_ids: Sequence[int], merged: MergedTokens | None = None) -> Batch:
        """Choose this micro-batch's positions, on the CPU, before the batch moves to the device.

        Doing it here keeps the step free of host-device synchronisation (boolean indexing waits for the device).

        Args:
            batch: As `data/packing.py` describes it, tensors [B, T].
            control_ids: Markers and the end of text: targets at which the teacher is not asked.
            merged: The student's tokens that join several of the teacher's pieces, if it has any.

        Returns:
            All int64, positions flat (b T + t) unless said otherwise:
            `positions` [N], the predicting positions, those with KL first; `kl_targets` [M], a view whose length says
            how many those are; `targets` and `segments` [N], token and segment to be predicted there;
            `teacher_positions` [M], where the teacher predicts the same token;
            `sample` [S], the positions whose residual streams are compared, and `teacher_sample`; for each term that
            does so, `<term>_sample`, which of those are its own, and `<term>_tokens` [], from how many they were drawn;
            `queries` and `teacher_queries` [B, Q], positions t whose attention is compared, -1 where there are fewer;
            `key_tokens` [B, T, K], the teacher's positions of the same token, or of its K pieces, -1 where there are
            fewer; `expert_sample`, the tokens that go through every expert; what `MergedTokens.select` adds.
        """
        segments = batch["target_segments"].flatten()
        targets = batch["target_ids"].flatten()
        counterpart = _counterparts(batch)
        control = torch.isin(targets, torch.tensor(sorted(control_ids), dtype=torch.int64))
        supervised = torch.isin(segments, _segment_ids(self.ce.segments))
        taught = supervised & ~control & (counterpart >= 0)
        kl = taught & torch.isin(segments, _segment_ids(self.kl.segments))
        kl_positions = kl.nonzero()[:, 0]
        positions = torch.cat([kl_positions, (supervised & ~kl).nonzero()[:, 0]])
        order = _hash(batch["row_ids"].flatten(), batch["position_ids"].flatten())
        selected = {
            "positions": positions,
            "kl_targets": targets[kl_positions],
            "targets": targets[positions],
            "segments": segments[positions],
            "teacher_positions": counterpart[kl_positions],
        }
        selected |= self._sample(taught, segments, counterpart, order)
        if merged is not None:
            selected |= merged.select(selected["kl_targets"], selected["teacher_positions"])
        if self.uses("attention"):
            selected |= self._queries(batch, taught, segments, counterpart, order)
            selected["key_tokens"] = _keys(batch, merged)
        if self.uses("diversity"):
            tokens = (batch["segment_ids"].flatten() != Segment.PAD).nonzero()[:, 0]
            selected["expert_sample"] = _first(tokens, order, self.diversity.sample_tokens)
        return selected

    def _sample(self, taught: Tensor, segments: Tensor, counterpart: Tensor, order: Tensor) -> Batch:
        # CKA's own sample is there in any case: callbacks compare layers whether or not the objective does.
        drawn, selected = {}, {}
        for name in REPRESENTATION:
            if name == "cka" or self.uses(name):
                term = self._terms[name]
                own = torch.isin(segments, _segment_ids(term.segments or self.ce.segments))
                candidates = (taught & own).nonzero()[:, 0]
                drawn[name] = _first(candidates, order, term.sample_tokens)
                selected[f"{name}_tokens"] = torch.tensor(len(candidates))
        sample = torch.cat(list(drawn.values())).unique()
        sample = sample[torch.argsort(order[sample])]
        places = torch.empty(len(taught), dtype=torch.int64)
        places[sample] = torch.arange(len(sample))
        selected |= {f"{name}_sample": places[positions] for name, positions in drawn.items()}
        return selected | {"sample": sample, "teacher_sample": counterpart[sample]}

    def _queries(self, batch: Batch, taught: Tensor, segments: Tensor, counterpart: Tensor, order: Tensor) -> Batch:
        shape, wanted = batch["input_ids"].shape, self.attention.queries
        candidates = (taught & torch.isin(segments, _segment_ids(self.attention.segments))).view(shape)
        last = torch.iinfo(torch.int64).max
        ranked = order.view(shape).where(candidates, last).argsort(1)[:, :wanted]
        there = candidates.gather(1, ranked)
        queries = counterpart.view(shape).gather(1, ranked) % _read_width(batch)
        return {"queries": ranked.where(there, -1), "teacher_queries": queries.where(there, -1)}

    def counts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens under CE and under KL in the whole optimizer step, 0-d int64 each."""
        return _sum_of(batch["step_targets"][0], self.ce.segments), self._taught(batch, self.kl.segments)

    def _taught(self, batch: Batch, segments: Sequence[SegmentName]) -> Tensor:
        """Tokens of the optimizer step at which the teacher is asked, 0-d int64."""
        by_segment, excluded = batch["step_targets"]
        return _sum_of(by_segment - excluded, segments)

    # ------------------------------------------------------------------ terms

    def logit_loss(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        batch: Batch,
        signal: TeacherSignal | None,
        *,
        now: Moment,
        running: Running,
    ) -> LogitLoss:
        """CE and divergence together, fused over chunks of the vocabulary projection.

        Args:
            hidden_ND: Student's final hidden states at `batch["positions"]`.
            head_VD: Student's head.
            batch: With the keys that `select` adds, on the device.
            signal: The teacher's answer; None without a teacher.
            now: Where training stands.
            running: The running means of `running`.
        """
        use_kl = signal is not None and self.uses("kl")
        kl_scale: float | Tensor = 0.0
        if use_kl:
            kl_count = self._taught(batch, self.kl.segments).clamp(min=1).float()
            kl_scale = value_at(self.kl_weight, now.step) * now.replicas / kl_count
        adaptive = isinstance(self.kl.temperature, AdaptiveTemperature)
        return fused_ce_kl(
            hidden_ND,
            head_VD,
            batch["targets"],
            signal.hidden_MD if signal and use_kl else None,
            signal.head_VD if signal and use_kl else None,
            signal.sparse if signal and use_kl else None,
            signal.merged if signal and use_kl else None,
            ce_scale=self._ce_scale(batch, now),
            kl_scale=kl_scale,
            temperature=self.temperature(now.step, running) if use_kl else 1.0,
            label_smoothing=self.ce.label_smoothing,
            divergence=self.kl.divergence,
            beta=self.kl.beta,
            with_entropy=use_kl and adaptive,
        )

    def temperature(self, step: int, running: Running) -> float | Tensor:
        """The temperature in force."""
        if isinstance(self.kl.temperature, AdaptiveTemperature):
            return self.kl.temperature.at(running["teacher_entropy"])
        return value_at(self.kl.temperature, step)

    def _ce_scale(self, batch: Batch, now: Moment) -> float | Tensor:
        """Factor on the sum of cross-entropies, one for each row where the thought has a weight of its own."""
        weight, thought = self.ce_weight_at(now.step), value_at(self.ce.thought_weight, now.step)
        if weight == 0:
            return 0.0
        by_segment = batch["step_targets"][0].float()
        factors = torch.ones_like(by_segment)
        factors[Segment.THOUGHT] = thought
        # Weights of 0 leave no token: the sum is 0 then, and any divisor will do.
        count = _sum_of(by_segment * factors, self.ce.segments)
        scale = weight * now.replicas / count.where(count > 0, 1.0)
        return scale if thought == 1 else scale * factors[batch["segments"]]

    def logit_terms(self, loss: LogitLoss, batch: Batch, *, with_teacher: bool) -> dict[str, Term]:
        """CE, KL and the teacher's entropy, if measured, by name; their one fused loss stands under `ce`."""
        zero = torch.zeros_like(loss.loss)
        count, kl_count = (torch.full_like(zero, len(batch[name])) for name in ("targets", "kl_targets"))
        terms = {"ce": Term(loss.loss, loss.ce_sum, count)}
        if with_teacher and self.uses("kl"):
            terms["kl"] = Term(zero, loss.kl_sum, kl_count)
            if loss.entropy_sum is not None:
                terms["teacher_entropy"] = Term(zero, loss.entropy_sum, kl_count)
        return terms

    def sample_terms(
        self,
        out: Forward[Any],
        signal: TeacherSignal | None,
        anchor: TeacherSignal | None,
        routed: Routing | None,
        batch: Batch,
        *,
        plan: Plan,
        now: Moment,
        running: Running,
    ) -> dict[str, Term]:
        """The terms that are no sum over all tokens' logits, by name.

        CKA, attention, diversity and balance are statistics of a sample: each micro-batch has its own, and the step
        takes their mean over the micro-batches that hold any row. Router-z is a sum over tokens like CE. The hidden
        distance is one too, of which a sample is taken: its mean counts for all the tokens it was drawn from.

        Args:
            out: The student's forward pass.
            signal: The teacher's answer; None without a teacher.
            anchor: The dense source's answer; None without one.
            routed: What the routers did with the tokens that are no padding; None for a dense model.
            batch: With the keys that `select` adds, on the device.
            plan: From `plan`.
            now: Where training stands.
            running: The running means of `running`.
        """
        terms, pairs, seen = {}, plan.pairs, _Seen(out, batch, now, running)
        for name in REPRESENTATION:
            other = anchor if name.startswith("anchor") else signal
            if name in pairs and other is not None:
                compare = self._cka if name.endswith("cka") else self._hidden
                terms[name] = compare(name, pairs[name], other, seen)
        if "attention" in pairs and signal is not None:
            terms["attention"] = self._attention(pairs["attention"], signal, seen)
        if routed is not None:
            terms |= self._routing_terms(routed, seen)
        return terms

    def _cka(self, name: str, pairs: Pairs, other: TeacherSignal, seen: "_Seen") -> Term:
        batch, layers = seen.batch, seen.out.layers
        sample = batch[f"{name}_sample"]
        debiased = self._terms[name].debiased
        distances = [1 - linear_cka(layers[i][sample], other.layers[j][sample], debiased=debiased) for i, j in pairs]
        # Without tokens CKA is 0 by definition, and 1 - CKA would pull at nothing.
        there = (batch[f"{name}_tokens"] > 0).float()
        return self._statistic(name, torch.stack(distances), there, seen)

    def _hidden(self, name: str, pairs: Pairs, other: TeacherSignal, seen: "_Seen") -> Term:
        batch, layers = seen.batch, seen.out.layers
        term, sample, tokens = self._terms[name], batch[f"{name}_sample"], batch[f"{name}_tokens"].float()
        distances = []
        for i, j in pairs:
            projected = name == "hidden" and (i, j) in seen.out.projected
            x = seen.out.projected[i, j] if projected else layers[i][sample]
            distance_S = hidden_distance(x, other.layers[j][sample], term.distance)
            distances.append(distance_S.sum() / max(len(distance_S), 1))
        distance_P = torch.stack(distances)
        step_tokens = self._taught(batch, term.segments or self.ce.segments).clamp(min=1).float()
        weights = self._layer_weights(name, distance_P, seen)
        scale = value_at(term.weight, seen.now.step) * seen.now.replicas * tokens / step_tokens
        per_layer = distance_P.detach() * tokens
        return Term(scale * (weights * distance_P).mean(), per_layer.mean(), tokens, per_layer)

    def _attention(self, pairs: Pairs, signal: TeacherSignal, seen: "_Seen") -> Term:
        batch = seen.batch
        distances, there = [], torch.zeros((), device=batch["queries"].device)
        for i, j in pairs:
            student, teacher = seen.out.attention[i], signal.attention[j]
            heads = self.attention.heads
            head_map = uniform_head_map(student.shape[1], teacher.shape[1]) if heads == "uniform" else heads
            total, queries = attention_distance(student, teacher, batch["key_tokens"][..., 0] >= 0, head_map)
            distances.append(total / queries.clamp(min=1))
            there = (queries > 0).float()
        return self._statistic("attention", torch.stack(distances), there, seen)

    def _routing_terms(self, routed: Routing, seen: "_Seen") -> dict[str, Term]:
        terms, batch, now = {}, seen.batch, seen.now
        has_rows = (batch["segment_ids"] != Segment.PAD).any().float()
        if seen.out.experts:
            similarity = torch.stack([expert_similarity(outputs) for outputs in seen.out.experts])
            terms["diversity"] = self._statistic("diversity", similarity, has_rows, seen)
        terms["balance"] = self._statistic("balance", balance_loss(routed), has_rows, seen)
        scale = value_at(self.router_z.weight, now.step) * now.replicas / batch["step_tokens"].clamp(min=1).float()
        terms["router_z"] = Term(scale * routed.z_sum, routed.z_sum.detach(), routed.tokens)
        return terms

    def _statistic(self, name: str, values_P: Tensor, there: Tensor, seen: "_Seen") -> Term:
        """A statistic of the micro-batch by layer: the step takes the mean of those that are `there` (0 or 1)."""
        values_P = values_P * there
        weights = self._layer_weights(name, values_P, seen)
        per_batch = seen.now.replicas / seen.batch["step_batches"].clamp(min=1).float()
        scale = value_at(self._terms[name].weight, seen.now.step) * per_batch
        values = values_P.detach()
        return Term(scale * (weights * values_P).mean(), values.mean(), there, values)

    def _layer_weights(self, name: str, values_P: Tensor, seen: "_Seen") -> Tensor:
        kind: LayerWeights = getattr(self._terms[name], "layer_weights", "equal")
        return layer_weights(kind, len(values_P), seen.now.progress, seen.running.get(name), values_P.device)


class _Seen(NamedTuple):
    """One micro-batch through the student, and what its terms depend on besides."""

    out: Forward[Any]
    batch: Batch
    now: Moment
    running: Running


def _segment_ids(names: Sequence[SegmentName]) -> Tensor:
    return torch.tensor([Segment[name.upper()] for name in names], dtype=torch.int64)


def _sum_of(by_segment: Tensor, names: Sequence[SegmentName]) -> Tensor:
    """Sum over some segments of [S]; indexed by numbers, since a tensor of indices would wait for the device."""
    return torch.stack([by_segment[Segment[name.upper()]] for name in dict.fromkeys(names)]).sum()


def _tokens(batch: Batch) -> Tensor:
    """The flat place of each student token, or its first piece, in what the teacher reads, [B, T], -1 for none."""
    if "teacher_tokens" in batch:
        return batch["teacher_tokens"]
    shape = batch["input_ids"].shape
    return torch.arange(shape.numel()).view(shape).where(batch["segment_ids"] != Segment.PAD, -1)


def _read_width(batch: Batch) -> int:
    """U, tokens of a sequence as the teacher reads it."""
    return batch["teacher_input_ids" if "teacher_input_ids" in batch else "input_ids"].shape[1]


def _keys(batch: Batch, merged: MergedTokens | None) -> Tensor:
    """The teacher's positions in its sequence of each student token or its pieces, [B, T, K], -1 where there are none.

    What a student's token is attended to, all of its pieces are.
    """
    tokens = _tokens(batch)
    first = (tokens % _read_width(batch)).where(tokens >= 0, -1)[..., None]
    if merged is None:
        return first
    there = merged.pieces(batch["input_ids"].flatten()).view(*tokens.shape, -1) >= 0
    return (first + torch.arange(there.shape[-1])).where(there & (first >= 0), -1)


def _counterparts(batch: Batch) -> Tensor:
    """Where the teacher predicts what the student predicts at each position, flat [B T], -1 where it does not.

    Of a merged token it predicts the first piece there.
    """
    after = torch.nn.functional.pad(_tokens(batch)[:, 1:], (0, 1), value=-1)
    known = (after >= 0) & (batch["target_segments"] != Segment.PAD)
    if "teacher_position_ids" in batch:  # nothing predicts the first token of the teacher's row
        known &= batch["teacher_position_ids"].flatten()[after.clamp(min=0)] > 0
    here = (after - 1).where(known, -1)
    return here.flatten()


def _first(positions: Tensor, order: Tensor, count: int) -> Tensor:
    """The first `count` positions in the order of their hashes."""
    return positions[torch.argsort(order[positions])[:count]]


def _hash(row_ids: Tensor, position_ids: Tensor) -> Tensor:
    """A fixed pseudo-random order of (row, position), so that packing does not change which tokens are sampled.

    Two rounds of a 64-bit multiply-xorshift (the finaliser of splitmix64); int64 arithmetic wraps as it should.
    """
    x = row_ids * 0x9E3779B97F4A7C1 + position_ids * 0x7F4A7C15F39CC060 + 1
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = (x ^ (x >> 30)) * multiplier
    return x ^ (x >> 31)
