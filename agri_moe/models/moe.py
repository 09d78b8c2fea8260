"""A mixture of experts that stock transformers does not have: experts of unequal width, expert choice, capacity.

The neurons of all experts of a layer lie one below the other in three matrices of one row per neuron. An expert is a
run of rows, so that experts of any widths cost the products of their own neurons and no padding, and a neuron that
changes hands moves three rows, in the weights and in the optimizer's moments alike.

Shapes: N tokens, D model width, E experts, K experts per token, A assignments of a token to an expert (N K where none
is dropped), C assignments that each expert has room for, F width of one expert, S neurons of all experts.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RoutingKind = Literal["token_choice", "expert_choice"]


@dataclass(frozen=True)
class RoutingRule:
    """Who chooses whom.

    Args:
        kind: `token_choice`: each token takes its K most probable experts. `expert_choice` (Zhou et al. 2022,
            arXiv:2202.09368): each expert takes the C tokens for which it is most probable.
        top_k: K; with expert choice the mean number of experts per token, before `capacity_factor`.
        capacity_factor: C is this times N K / E (Zhou et al. call `capacity_factor * top_k` the capacity factor).
        drop: With token choice, in training, an expert keeps the C of its tokens that it is most probable for
            (Riquelme et al. 2021, arXiv:2106.05974, "batch prioritized routing"), and the others get nothing from it.
            In evaluation nothing is dropped, so that a token's answer does not hang on the others.
    """

    kind: RoutingKind = "token_choice"
    top_k: int = 2
    capacity_factor: float = 1.25
    drop: bool = False

    def capacity(self, tokens: int, experts: int) -> int:
        """C."""
        return min(tokens, math.ceil(self.capacity_factor * tokens * self.top_k / experts))


class Assignment(NamedTuple):
    """Which expert works on which token; expert by expert, so that each has a run of A."""

    token_A: Tensor  # int64
    weight_A: Tensor  # share of the expert's answer in the token's, with gradient; 0 where the place is empty
    count_E: Tensor  # int64: lengths of the runs
    load_E: Tensor  # int64: assignments with a token, which is less where places are empty

    @property
    def experts(self) -> Tensor:
        """The expert of each assignment [A]."""
        experts = torch.arange(len(self.count_E), device=self.count_E.device)
        return experts.repeat_interleave(self.count_E, output_size=len(self.token_A))


def assign(logits_NE: Tensor, rule: RoutingRule, noise_NE: Tensor | None = None) -> Assignment:
    """Who works on what.

    A token's weights are the router's probabilities of the experts that it has, divided by their sum (transformers'
    `norm_topk_prob`), so that copies of one network give that network's answer under either rule; Zhou et al. do not
    divide. With dropping they are divided before, as in the Switch Transformer: a token that an expert has no room for
    loses that share of its answer. A token that nobody chooses gets an answer of zero.

    Args:
        logits_NE: The router's, in float32 or above.
        rule: Who chooses.
        noise_NE: Added to the logits where the choice is made, and not where the weights are.
    """
    p_NE = logits_NE.softmax(-1)
    choice_NE = logits_NE.detach() if noise_NE is None else logits_NE.detach() + noise_NE
    if rule.kind == "expert_choice":
        score_NE = choice_NE.softmax(-1)
        slots_EC = score_NE.topk(rule.capacity(*logits_NE.shape), dim=0).indices.T
        taken_NE = torch.zeros_like(p_NE, requires_grad=False).scatter_(0, slots_EC.T, 1.0)
        return _by_slots(slots_EC, normalised(p_NE * taken_NE), taken_NE)
    experts_NK = choice_NE.topk(rule.top_k, dim=-1).indices
    weights_NK = normalised(p_NE.gather(1, experts_NK))
    if not rule.drop:
        experts_A, order_A = experts_NK.flatten().sort(stable=True)
        # Not `bincount`, which asks the device for the largest value.
        zeros_E = torch.zeros(logits_NE.shape[1], dtype=torch.int64, device=logits_NE.device)
        count_E = zeros_E.scatter_add(0, experts_A, torch.ones_like(experts_A))
        return Assignment(order_A // rule.top_k, weights_NK.flatten()[order_A], count_E, count_E)
    slots_EC, kept_NE = within_capacity(choice_NE.softmax(-1), experts_NK, rule.capacity(*logits_NE.shape))
    weights_NE = torch.zeros_like(p_NE, requires_grad=False).scatter(1, experts_NK, weights_NK)
    return _by_slots(slots_EC, weights_NE * kept_NE, kept_NE)


def within_capacity(score_NE: Tensor, experts_NK: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Whom each expert has room for, among the tokens that chose it: those of the highest scores.

    Args:
        score_NE: At least 0, without gradient.
        experts_NK: What each token chose.
        capacity: C, at most N.

    Returns:
        The tokens [E, C] in each expert's places, of which some may be empty; and [N, E] 1 where a token chose an
        expert and has a place there, 0 elsewhere, in the type of the scores.
    """
    wanted_NE = torch.zeros_like(score_NE).scatter_(1, experts_NK, 1.0)
    slots_EC = score_NE.where(wanted_NE > 0, -1.0).topk(capacity, dim=0).indices.T
    return slots_EC, torch.zeros_like(wanted_NE).scatter_(0, slots_EC.T, 1.0) * wanted_NE


def normalised(weights: Tensor) -> Tensor:
    """Weights [..., K] over their sum; zeros where that is 0."""
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, 1.0)


def _by_slots(slots_EC: Tensor, weights_NE: Tensor, taken_NE: Tensor) -> Assignment:
    experts, capacity = slots_EC.shape
    return Assignment(
        slots_EC.flatten(),
        weights_NE.T.gather(1, slots_EC).flatten(),
        torch.full((experts,), capacity, device=slots_EC.device),
        taken_NE.sum(0).long(),
    )


class MoEOutput(NamedTuple):
    """What a layer answers."""

    output_ND: Tensor
    logits_NE: Tensor  # the router's over its temperature, without noise, with gradient
    assignment: Assignment


class MoE(nn.Module):
    """Router and experts, with or without a gate: `down(act(gate x) * up x)`, or `down(act(up x))`.

    The weights are empty until they are filled (`agri_moe.models.neurons`, or a checkpoint).

    Args:
        width: D.
        widths: F of each expert.
        rule: Who chooses whom.
        act_fn: The model's own activation.
        gated: Whether there is a gate.
        inner_bias: Whether gate and up have a bias.
        output_bias: Whether the answer has one; it belongs to the layer and not to an expert.
    """

    act_fn: Callable[[Tensor], Tensor]
    up_SD: nn.Parameter
    down_SD: nn.Parameter

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        rule: RoutingRule,
        act_fn: Callable[[Tensor], Tensor],
        *,
        gated: bool = True,
        inner_bias: bool = False,
        output_bias: bool = False,
    ):
        super().__init__()
        self.rule = rule
        # Past nn.Module's own __setattr__: it may be a part of the frozen model that the network came from.
        object.__setattr__(self, "act_fn", act_fn)
        neurons = sum(widths)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.router_ED = empty(len(widths), width)
        self.gate_SD = empty(neurons, width) if gated else None
        self.up_SD = empty(neurons, width)
        self.down_SD = empty(neurons, width)
        self.gate_bias_S = empty(neurons) if gated and inner_bias else None
        self.up_bias_S = empty(neurons) if inner_bias else None
        self.bias_D = empty(width) if output_bias else None
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones((), dtype=torch.float32))
        self._widths: Tensor
        self.register_buffer("_widths", torch.tensor(list(widths)))
        self._known_widths: tuple[int, ...] | None = tuple(widths)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.router_ED)

    @property
    def widths(self) -> tuple[int, ...]:
        """F of each expert; read from the device once after each change."""
        if self._known_widths is None:
            self._known_widths = tuple(self._widths.tolist())
        return self._known_widths

    def set_widths(self, widths: Sequence[int]) -> None:
        """Draw the borders between experts anew; the rows stay where they are.

        Raises:
            ValueError: If they are not as many, or have not as many neurons.
        """
        if len(widths) != self.num_experts or sum(widths) != len(self.up_SD):
            raise ValueError(f"{list(widths)} are not {self.num_experts} widths of {len(self.up_SD)} neurons in all.")
        self._widths.copy_(torch.tensor(list(widths)))
        self._known_widths = tuple(widths)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._known_widths = None  # the checkpoint's may be others

    @property
    def per_neuron(self) -> dict[str, nn.Parameter]:
        """The parameters that have a row, or a number, for each neuron."""
        names = ("gate_SD", "up_SD", "down_SD", "gate_bias_S", "up_bias_S")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def spans(self) -> list[slice]:
        """The rows of each expert."""
        ends = list(itertools.accumulate(self.widths))
        return [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]

    def logits(self, x_ND: Tensor) -> Tensor:
        """The router's logits over its temperature [N, E], in float32 at least, whatever autocast says."""
        with torch.autocast(x_ND.device.type, enabled=False):
            dtype = torch.promote_types(x_ND.dtype, torch.float32)
            return F.linear(x_ND.to(dtype), self.router_ED.to(dtype)) / self.temperature.to(dtype)

    def forward(self, x_ND: Tensor, noise_NE: Tensor | None = None) -> MoEOutput:
        """Answer tokens, none of which is padding.

        Args:
            x_ND: What the layer reads.
            noise_NE: For the choice of experts, see `assign`; None is no noise.
        """
        logits_NE = self.logits(x_ND)
        assignment = assign(logits_NE, replace(self.rule, drop=self.rule.drop and self.training), noise_NE)
        answers_AD = self._experts(x_ND, assignment)
        weighted_AD = answers_AD * assignment.weight_A[:, None].to(answers_AD.dtype)
        output_ND = torch.zeros_like(x_ND, dtype=answers_AD.dtype).index_add(0, assignment.token_A, weighted_AD)
        if self.bias_D is not None:
            output_ND = output_ND + self.bias_D
        return MoEOutput(output_ND, logits_NE, assignment)

    def _experts(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        """Each assignment's answer [A, D], in the type that a linear layer would answer in."""
        kind = x_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.up_SD.dtype
        x_AD = x_ND.to(dtype)[assignment.token_A]
        weights = {name: parameter.to(dtype) for name, parameter in self.per_neuron.items()}
        # The kernel wants rows of whole 16 bytes.
        whole = all(size * dtype.itemsize % 16 == 0 for size in (self.widths[0], x_ND.shape[1]))
        if len(set(self.widths)) == 1 and whole and self.up_bias_S is None and dtype != torch.float64:
            return self._grouped(x_AD, assignment.count_E, weights)
        return self._in_turn(x_AD, assignment.count_E, weights)

    @torch.no_grad()
    def strengths(self, x_ND: Tensor) -> Tensor:
        """How much each neuron says of the tokens of its expert [S]: sum of squares of what it adds to the answer."""
        assignment = assign(self.logits(x_ND), self.rule)
        x_AD = x_ND.to(self.up_SD.dtype)[assignment.token_A]
        counts = assignment.count_E.tolist()
        seen = zip(x_AD.split(counts), assignment.weight_A.split(counts), self._parts(self.per_neuron), strict=True)
        power = [(self._neurons(x, one).float() * weight[:, None]).square().sum(0) for x, weight, one in seen]
        return torch.cat(power) * self.down_SD.float().square().sum(1)

    def _grouped(self, x_AD: Tensor, count_E: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Experts of one width: three grouped products."""
        ends_E = count_E.cumsum(0).to(torch.int32)
        shape = (self.num_experts, -1, x_AD.shape[1])

        def read(name: str) -> Tensor:
            return F.grouped_mm(x_AD, weights[name].view(shape).transpose(1, 2), offs=ends_E)

        h_AF = self.act_fn(read("gate_SD")) * read("up_SD") if self.gate_SD is not None else self.act_fn(read("up_SD"))
        return F.grouped_mm(h_AF, weights["down_SD"].view(shape), offs=ends_E)

    def _in_turn(self, x_AD: Tensor, count_E: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Experts of any widths, one after the other.

        A grouped product has one ragged dimension, and here both tokens and neurons are ragged. The loop costs 4 to 11%
        more than the grouped product at equal widths (16 experts of 768 and 1,024, D 512, one CPU thread), and on a GPU
        waits for the device once, to know the counts. The weights are split and not sliced: the gradient of a slice is
        as large as the whole.
        """
        answers = [
            self._neurons(x_nD, one) @ one["down_SD"]
            for x_nD, one in zip(x_AD.split(count_E.tolist()), self._parts(weights), strict=True)
        ]
        return torch.cat(answers)

    def _parts(self, weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Each expert's rows of what has a row for each neuron."""
        parts = {name: weight.split(list(self.widths)) for name, weight in weights.items()}
        return [{name: part[e] for name, part in parts.items()} for e in range(self.num_experts)]

    def _neurons(self, x_nD: Tensor, one: Mapping[str, Tensor]) -> Tensor:
        """What one expert's neurons say [n, F]."""
        up_nF = F.linear(x_nD, one["up_SD"], one.get("up_bias_S"))
        if "gate_SD" not in one:
            return self.act_fn(up_nF)
        return self.act_fn(F.linear(x_nD, one["gate_SD"], one.get("gate_bias_S"))) * up_nF


class Replacement(nn.Module):
    """A mixture in the place of a model's feed-forward network.

    Args:
        moe: The mixture.
    """

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe
        self.positions_N: Tensor | None = None  # flat places of what is no padding, where somebody says so

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., D] to answers; padding, which must not take an expert's room, gets zeros."""
        x_ND = x.reshape(-1, x.shape[-1])
        if self.positions_N is None:
            return self.moe(x_ND).output_ND.to(x.dtype).view_as(x)
        answers = self.moe(x_ND[self.positions_N]).output_ND.to(x.dtype)
        return torch.zeros_like(x_ND).index_copy(0, self.positions_N, answers).view_as(x)
