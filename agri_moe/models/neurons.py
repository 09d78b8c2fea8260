"""Which neurons of a dense feed-forward network each expert begins with, and how neurons change hands later.

Shapes: N sampled tokens, D model width, F width of the dense network, E experts, K experts per token, G slices of a
group, Q groups (E / G), S neurons of all experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agri_moe.models.ffn import FFN
from agri_moe.models.moe import MoE

KMEANS_ROUNDS = 15
PRICE_ROUNDS = 60
ROUTER_STEPS = 200
ROUTER_BATCH = 2048
SPLIT = 0.01
"""How far the halves of a split neuron are moved apart, over the standard deviation of their row."""


def slices(top_k: int, num_experts: int, width: int, dense_width: int) -> int:
    """G: as many of a token's experts as together hold no more neurons than the dense network has, each one once."""
    fitting = (g for g in range(top_k, 1, -1) if top_k % g == 0 and num_experts % g == 0 and g * width <= dense_width)
    return next(fitting, 1)


@torch.no_grad()
def start_from_dense(moe: MoE, ffn: FFN, x_ND: Tensor, generator: torch.Generator) -> None:
    """Fill a mixture whose experts have one width from the network that it is to replicate, in place.

    The sampled tokens are put into Q groups of one size by what the network reads (balanced spherical k-means). A group
    of G experts shares one row of the router, which learns to tell the groups apart, and holds G times an expert's
    width of distinct neurons: all of them where that is F (`down` then counts G times, since each expert gets 1/G of
    the group's weight: the dense function exactly, He et al. 2024, arXiv:2410.07524), and otherwise those that say most
    on the group's own tokens, by the mean square of what each adds to the answer.

    Chosen by measurement, on a trained Qwen3 of 6 layers (D 128, F 384), 16 experts of F/4, top-2, held-out relative
    error untrained and after 400 steps, in layers 0 and 3: token groups 0.013 and 0.18, then 0.012 and 0.07; contiguous
    slices 0.77 and 0.77, then 0.03 and 0.09; random neurons the same; clustered by their gate rows (MoEfication,
    Zhang et al. 2022, arXiv:2110.01786) 0.85 and 0.77, then 0.04 and 0.09; by when they fire together 0.75 and 0.80,
    then 0.04 and 0.09. The best fixed half of the neurons has 0.016 and 0.28. Grouping tokens by what the neurons say,
    or by alternating between groups and their neurons, is no better. What takes the other choices down is that a
    partition of the neurons leaves every expert without most of those that its tokens need.

    Args:
        moe: The mixture.
        ffn: The dense network.
        x_ND: A sample of what it reads.
        generator: For the first centres and the router's batches, on the CPU.
    """
    (width,) = set(moe.widths)
    own = {name: tensor.float() for name, tensor in ffn.weights().items()}
    x_ND = x_ND.float()
    group_size = slices(moe.rule.top_k, moe.num_experts, width, ffn.width)
    groups = moe.num_experts // group_size
    group_N = token_groups(x_ND, groups, generator)
    kept = group_size * width
    strength_NF = ffn.neurons(x_ND.to(ffn.down.weight.dtype)).float().square() * own["down_SD"].square().sum(1)
    rows = []
    for q in range(groups):
        if kept == ffn.width:
            rows.append(torch.arange(ffn.width, device=x_ND.device))
            continue
        best = strength_NF[group_N == q].mean(0).topk(kept).indices
        rows += [best[g::group_size] for g in range(group_size)]  # dealt out, so that none has all that is strong
    row_S = torch.cat(rows)
    for name, parameter in moe.per_neuron.items():
        scale = group_size if name == "down_SD" else 1
        parameter.copy_(own[name][row_S] * scale)
    if moe.bias_D is not None:
        moe.bias_D.copy_(own["bias_D"])
    moe.router_ED.copy_(_router(x_ND, group_N, groups, generator).repeat_interleave(group_size, 0))


@torch.no_grad()
def start_at_random(moe: MoE, std: float, generator: torch.Generator) -> None:
    """Draw all weights from a normal distribution of this standard deviation, and biases as zero, in place."""
    for name, parameter in moe.named_parameters():
        if "bias" in name:
            parameter.zero_()
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def token_groups(x_ND: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means into groups of about one size: the group of each token [N]."""
    unit_ND = F.normalize(x_ND, dim=1)
    first = torch.randperm(len(x_ND), generator=generator)[:groups].to(x_ND.device)
    centre_QD = unit_ND[first]
    group_N = torch.zeros(len(x_ND), dtype=torch.int64, device=x_ND.device)
    for _ in range(KMEANS_ROUNDS):
        group_N = _balanced(unit_ND @ centre_QD.T)
        sums_QD = torch.zeros_like(centre_QD).index_add(0, group_N, unit_ND)
        centre_QD = F.normalize(sums_QD, dim=1)
    return group_N


def _balanced(score_NQ: Tensor) -> Tensor:
    """The best group of each token once every group has a price, which rises while it is asked for too often."""
    groups = score_NQ.shape[1]
    price_Q = torch.zeros(groups, device=score_NQ.device)
    step = score_NQ.std() / 2
    for _ in range(PRICE_ROUNDS):
        asked_Q = torch.bincount((score_NQ - price_Q).argmax(1), minlength=groups) / len(score_NQ)
        price_Q += step * (asked_Q * groups - 1).clamp(-1, 1)
        step = step * 0.95
    return (score_NQ - price_Q).argmax(1)


@torch.enable_grad()
def _router(x_ND: Tensor, group_N: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Rows [Q, D] that tell the groups apart: logistic regression without a bias.

    It ends up certain (logits of a standard deviation above 10), and is left so: a router that is not lets the experts
    of a group part within the first steps, and ends with twice the error.
    """
    rows_QD = torch.zeros(groups, x_ND.shape[1], device=x_ND.device, requires_grad=True)
    scale = x_ND.std()
    optimizer = torch.optim.Adam([rows_QD], lr=0.05)
    for _ in range(ROUTER_STEPS):
        batch = torch.randint(len(x_ND), (ROUTER_BATCH,), generator=generator).to(x_ND.device)
        loss = F.cross_entropy(x_ND[batch] @ rows_QD.T / scale, group_N[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (rows_QD / scale).detach()


# ---- neurons change hands


@dataclass
class Reallocation:
    """When and how experts of high loss grow at the cost of those of low loss; the neurons of a layer stay as many.

    At each end of the order by loss stand `share` of the experts; the highest takes from the lowest, the second from
    the second, and so on. An expert's loss is the running mean over optimizer steps of its part in the layer's error:
    the errors of its tokens, weighted by the router and so by its load.

    No gain was seen from it in short runs from a dense start (layers 1 and 3 of a trained Qwen3 with D 128 and F 384,
    16 experts of F/4, 800 steps, every 200): relative errors 0.025 and 0.078, against 0.013 and 0.057 without, and
    0.018 and 0.070 for static experts of as many active neurons: those that grew had less than their share of the
    tokens.

    Args:
        every_n_steps: Optimizer steps between two reallocations.
        growth_factor: How much wider an expert gets at most.
        shrink_factor: How much narrower at most.
        min_width: Neurons that are never taken from an expert.
        max_width: Neurons that an expert never exceeds.
        multiple_of: Neurons change hands in such portions; GPUs like 64.
        share: Of the experts that grow, and of those that shrink, each time.
        decay: Weight of the past in the running mean, per optimizer step.
    """

    every_n_steps: int = 500
    growth_factor: float = 1.25
    shrink_factor: float = 0.8
    min_width: int = 256
    max_width: int = 8192
    multiple_of: int = 64
    share: float = 0.25
    decay: float = 0.98

    def __post_init__(self) -> None:
        rules = (
            ("every_n_steps", self.every_n_steps >= 1, "at least 1"),
            ("growth_factor", self.growth_factor > 1, "above 1"),
            ("shrink_factor", 0 < self.shrink_factor < 1, "between 0 and 1"),
            ("multiple_of", self.multiple_of >= 1, "at least 1"),
            ("min_width", 1 <= self.min_width <= self.max_width, f"between 1 and max_width, {self.max_width}"),
            ("share", 0 < self.share <= 0.5, "above 0 and at most 0.5"),
            ("decay", 0 <= self.decay < 1, "at least 0 and below 1"),
        )
        for key, holds, demand in rules:
            if not holds:
                raise ValueError(f"model.reallocation.{key} is {getattr(self, key)}: it must be {demand}.")

    def check(self, width: int) -> None:
        """Find out whether experts of this width can be reallocated.

        Raises:
            ValueError: If not.
        """
        if not self.min_width <= width <= self.max_width or width % self.multiple_of:
            raise ValueError(
                f"model.reallocation: experts begin with {width:,} neurons, which must lie between min_width "
                f"{self.min_width:,} and max_width {self.max_width:,} and be a multiple of multiple_of "
                f"{self.multiple_of}."
            )

    def widths(self, widths: Sequence[int], losses: Sequence[float]) -> list[int]:
        """The next widths, of the same sum."""
        order = sorted(range(len(widths)), key=lambda e: losses[e])
        found = list(widths)
        for low, high in zip(order, reversed(order), strict=True):
            if order.index(low) >= math.floor(self.share * len(widths)) or losses[high] <= losses[low]:
                break
            room = min(
                widths[high] * (self.growth_factor - 1),
                widths[low] * (1 - self.shrink_factor),
                self.max_width - widths[high],
                widths[low] - self.min_width,
            )
            # 0.2 of 80 is 15.999999999999996 in floating point.
            portion = max(math.floor(room / self.multiple_of + 1e-9), 0) * self.multiple_of
            found[high] += portion
            found[low] -= portion
        return found


class Move(NamedTuple):
    """Where each row of the new order comes from."""

    row_S: Tensor  # int64: the old row
    split_S: Tensor  # 0: as it was; 1 and -1: one of the two halves of a neuron


def plan_move(moe: MoE, widths: Sequence[int], strength_S: Tensor) -> Move:
    """Which neurons stay with each expert, and which are split.

    An expert that shrinks keeps its strongest, by the mean square of what they add on its own tokens; one that grows
    splits its strongest. The norms of the weights are a worse guide: half of a dense network's neurons, kept by them,
    miss its answer by 0.47 and 0.62 in layers 3 and 5 of a trained Qwen3 (D 128, F 384); kept by what they add, by 0.32
    and 0.30.
    """
    rows, splits = [], []
    for span, old, new in zip(moe.spans(), moe.widths, widths, strict=True):
        strongest = strength_S[span].topk(min(old, new)).indices.sort().values
        twice = strength_S[span].topk(max(new - old, 0)).indices
        split = torch.zeros(new, dtype=torch.int64, device=strength_S.device)
        split[: min(old, new)] = torch.isin(strongest, twice).long()
        split[min(old, new) :] = -1
        rows.append(torch.cat([strongest, twice]) + span.start)
        splits.append(split)
    return Move(torch.cat(rows), torch.cat(splits))


@torch.no_grad()
def move_neurons(
    moe: MoE, widths: Sequence[int], move: Move, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Carry out a move, in the weights and in AdamW's moments, in place.

    The halves of a split neuron read with the weights of the whole, moved apart by SPLIT in opposite directions, since
    equal halves would get equal gradients for ever; each writes half. The answer changes by the square of that only.
    Halves have half the gradient where they read, so half the first moment and a quarter of the second, and the whole
    one where they write.
    """
    for name, parameter in moe.per_neuron.items():
        writes = name == "down_SD"
        values = parameter[move.row_S]
        halves = (move.split_S != 0).view(-1, *[1] * (parameter.ndim - 1))
        if writes:
            values = values.where(~halves, values / 2)
        elif parameter.ndim > 1:
            # A neuron's two halves get the same noise, with opposite signs.
            noise_SD = torch.randn(parameter.shape, generator=generator).to(parameter)[move.row_S]
            values = values + SPLIT * move.split_S[:, None] * values.std(1, keepdim=True) * noise_SD
        parameter.copy_(values)
        state = optimizer.state.get(parameter, {})
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            if key in state:
                moments = state[key][move.row_S]
                state[key].copy_(moments if writes else moments.where(~halves, moments / 2**power))
    moe.set_widths(widths)
