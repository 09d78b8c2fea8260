"""Metrics that are right across ranks: torchmetrics whose states are sums, so that adding them up is merging.

Shape legend: N tokens, M tokens with a teacher's signal, T tokens of whole rows, L layers, E experts, K experts of a
token, G groups of rows, X and Y layers of two models.

Sums and counts are held in float64, which counts exactly up to 2^53 tokens. `compute` never returns NaN for
want of data: a mapping leaves the key out (all of them, if nothing was seen), a matrix says what it returns.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from agri_moe.losses import MinibatchHSIC, Routing, cka_from_hsic, minibatch_hsic

PADDING = 0  # agri_moe.data.chat.Segment.PAD, which cannot be imported from here without a cycle


class _Sealed:
    """A result that torchmetrics hands on as it is, see `_Sums`."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Sums(Metric):
    """A metric whose states are float64 sums and whose results keep their shape.

    torchmetrics 1.9 does neither by itself: `module.to(torch.bfloat16)` (Lightning's bf16-true) rounds the
    states, and bf16 stops counting at 256; and a result of one element, [L] with a single layer, loses its
    dimensions. Both of its hooks that are overridden here are pinned by tests.
    """

    full_state_update = False
    is_differentiable = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state that ranks and batches add up."""
        self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def move(tensor: Tensor) -> Tensor:
            device = fn(tensor).device
            # Apple's GPUs have no float64.
            return tensor.to(device, torch.float32 if device.type == "mps" else tensor.dtype)

        return super()._apply(move, exclude_state)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        sealed = super()._wrap_compute(functools.wraps(compute)(lambda: _Sealed(compute())))
        return functools.wraps(compute)(lambda: sealed().value)


def tokens_seen(metric: Metric) -> Tensor:
    """What `metric` has counted in its state `tokens`, over all ranks; to be asked for on every rank."""
    with metric.sync_context():
        tokens = metric.tokens
        assert isinstance(tokens, Tensor), "a metric that counts tokens"
        return tokens.clone()


class SegmentLoss(_Sums):
    """Mean loss (nats) and perplexity per segment, and over all the reported segments together.

    Where the bytes of text behind the tokens are given, in bits per byte too, in which models with other tokenizers can
    be compared.

    Args:
        segments: name -> segment id of what to report, e.g. {"thought": 3, "assistant": 4}. Tokens of any
            other segment, padding among them, count in nothing; to ask for padding (0) is a ValueError.

    compute() returns {"loss": ..., "perplexity": ..., "loss_<name>": ..., "perplexity_<name>": ...} as
    float32 scalars, without the names of which no token was seen; and "bits_per_byte" and "bits_per_byte_<name>",
    without those of which no byte was seen.
    """

    higher_is_better = False
    nll_sum: Tensor
    tokens: Tensor
    text_bytes: Tensor

    def __init__(self, segments: Mapping[str, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not segments or PADDING in segments.values():
            raise ValueError(f"segments to report must be named and none be padding, got {dict(segments)}")
        self.segments = {name: int(segment) for name, segment in segments.items()}
        self.add_sum("nll_sum", len(segments))
        self.add_sum("tokens", len(segments))
        self.add_sum("text_bytes", len(segments))

    def update(self, nll_N: Tensor, segment_N: Tensor, bytes_N: Tensor | None = None) -> None:
        """Add tokens: their negative log-likelihood in nats [N], the segment id of each [N], and its bytes of text [N].

        The bytes are given always or never. A marker has none, and its likelihood counts with the text.
        """
        ids = torch.tensor(list(self.segments.values()), device=segment_N.device)
        chosen_SN = segment_N[None, :] == ids[:, None]
        self.nll_sum += nll_N.detach().to(self.nll_sum.dtype).where(chosen_SN, 0.0).sum(-1)
        self.tokens += chosen_SN.sum(-1)
        if bytes_N is not None:
            self.text_bytes += bytes_N.where(chosen_SN, 0).sum(-1)

    def compute(self) -> dict[str, Tensor]:
        """Return the means over everything seen by all ranks."""
        result: dict[str, Tensor] = {}
        states_3S = torch.stack([self.nll_sum, self.tokens, self.text_bytes])
        sums = [("", states_3S.sum(1))] + [(f"_{name}", states_3S[:, i]) for i, name in enumerate(self.segments)]
        for suffix, (nll_sum, tokens, text_bytes) in sums:
            if tokens > 0:
                result[f"loss{suffix}"] = (nll_sum / tokens).float()
                result[f"perplexity{suffix}"] = (nll_sum / tokens).exp().float()
            if text_bytes > 0:
                result[f"bits_per_byte{suffix}"] = (nll_sum / (math.log(2) * text_bytes)).float()
        return result


class TeacherAgreement(_Sums):
    """How close student and teacher are, token by token.

    compute() returns {"kl": mean KL(teacher || student) in nats at temperature 1, "agreement": share of
    tokens for which both name the same token first}; {} when no token was seen.
    """

    higher_is_better = None
    kl_sum: Tensor
    agreed: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("kl_sum", "agreed", "tokens"):
            self.add_sum(name)

    def update(self, kl_M: Tensor, agree_M: Tensor) -> None:
        """Add tokens: `kl_M` and `agree_M` of `losses.token_statistics`."""
        self.kl_sum += kl_M.detach().sum(dtype=self.kl_sum.dtype)
        self.agreed += agree_M.sum()
        self.tokens += agree_M.numel()

    def compute(self) -> dict[str, Tensor]:
        """Return the means over everything seen by all ranks."""
        if self.tokens == 0:
            return {}
        return {
            "kl": (self.kl_sum / self.tokens).float(),
            "agreement": (self.agreed / self.tokens).float(),
        }


class TermMean(_Sums):
    """Mean of one term of the objective: its totals over its tokens (or samples).

    compute() returns a float32 scalar, or None when nothing was seen.
    """

    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("total")
        self.add_sum("tokens")

    def update(self, total: Tensor, tokens: Tensor) -> None:
        """Add one micro-batch, 0-d each."""
        self.total += total.detach()
        self.tokens += tokens

    def compute(self) -> Tensor | None:
        """Return the mean over everything seen by all ranks."""
        return (self.total / self.tokens).float() if self.tokens > 0 else None


def balance_score(load_LE: Tensor) -> Tensor:
    """Normalised entropy of each layer's expert load, [L]: 1 is perfect balance, 0 a single expert.

    The load may be counts or shares. A layer without any load scores 0, a layer with one expert only 1.
    """
    experts = load_LE.shape[-1]
    if experts == 1:
        return torch.ones_like(load_LE[..., 0])
    total_L1 = load_LE.sum(-1, keepdim=True)
    share_LE = load_LE / total_L1.where(total_L1 > 0, 1.0)
    # 0 log 0 is 0, which special.entr knows.
    return torch.special.entr(share_LE).sum(-1) / math.log(experts)


def balanced_perplexity(ce: float | Tensor, balance: float | Tensor, beta: float = 1.0) -> Tensor:
    """exp(CE) * exp(beta * (1 - B)): perplexity that a collapsed router cannot hide behind.

    Args:
        ce: mean cross-entropy in nats.
        balance: balance score B in [0, 1], see `balance_score`; mean over layers for one number.
        beta: weight of imbalance; 1 multiplies the perplexity of a fully collapsed router by e.
    """
    return torch.exp(torch.as_tensor(ce) + beta * (1.0 - torch.as_tensor(balance)))


class RoutingStatistics(_Sums):
    """What the routers did, per layer, over all valid tokens of all ranks.

    compute() returns float32 tensors, or {} when no token was seen:

        load                [L, E] share of the layer's assignments that each expert received
        entropy             [L]    mean entropy of the router's distribution, nats
        normalized_entropy  [L]    the same over log E: 1 is an undecided router (also by definition at E = 1)
        balance             [L]    `balance_score` of the load
        dead                [L]    share of experts that received not a single token
    """

    higher_is_better = None
    load: Tensor
    entropy_sum: Tensor
    tokens: Tensor

    def __init__(self, num_layers: int, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.add_sum("load", num_layers, num_experts)
        self.add_sum("entropy_sum", num_layers)
        self.add_sum("tokens")

    def update(self, routing: Routing) -> None:
        """Add one micro-batch, as `losses.routing` summarised it (padding already left out)."""
        self.load += routing.load_LE
        self.entropy_sum += routing.entropy_L
        self.tokens += routing.tokens

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics of everything seen by all ranks."""
        if self.tokens == 0:
            return {}
        entropy_L = self.entropy_sum / self.tokens
        normalized_L = entropy_L / math.log(self.num_experts) if self.num_experts > 1 else 1.0 + entropy_L
        result = {
            "load": self.load / self.load.sum(-1, keepdim=True),
            "entropy": entropy_L,
            "normalized_entropy": normalized_L,
            "balance": balance_score(self.load),
            "dead": (self.load == 0).float().mean(-1),
        }
        return {name: value.float() for name, value in result.items()}


def mutual_information(counts_LGE: Tensor) -> Tensor:
    """What an assignment's expert tells of its group, per layer, [L], in nats: sum of p(g, e) log(p(g, e) / p(g) p(e)).

    0 where every group spreads over the experts alike, at most log G and log E (Cover & Thomas, Elements of Information
    Theory, eq. 2.28). Of n independent assignments it comes out too large by about (G - 1)(E - 1) / 2n (Miller 1955);
    those of one text are not independent, so a small value says little.

    Args:
        counts_LGE: Assignments of each group to each expert.
    """
    total_L11 = counts_LGE.sum((1, 2), keepdim=True)
    joint_LGE = counts_LGE / total_L11.where(total_L11 > 0, 1.0)
    entropies = [torch.special.entr(p).flatten(1).sum(1) for p in (joint_LGE.sum(2), joint_LGE.sum(1), joint_LGE)]
    return (entropies[0] + entropies[1] - entropies[2]).clamp(min=0.0)


def load_by_group(chosen_LTK: Tensor, in_group_GT: Tensor, num_experts: int) -> Tensor:
    """[L, G, E] float32: assignments of each group's tokens that each expert received, without waiting for the device.

    Args:
        chosen_LTK: Experts of each token in each layer.
        in_group_GT: Which tokens are of which group; those of none count in nothing.
        num_experts: E.
    """
    shape = (*chosen_LTK.shape[:2], num_experts)
    served_LTE = torch.zeros(shape, dtype=torch.float32, device=chosen_LTK.device).scatter_(2, chosen_LTK, 1.0)
    # Exact in float32 up to 2^24 assignments; autocast would round them to bf16.
    with torch.autocast(chosen_LTK.device.type, enabled=False):
        return in_group_GT.float() @ served_LTE


class GroupRouting(_Sums):
    """What the rows of each group cost, and which experts serve them.

    Args:
        names: Of the groups.
        group_of_row: [rows] number of the group of each row.
        num_layers: Layers with experts, 0 of a dense model.
        num_experts: Experts of each.

    compute() returns float32 tensors, or {} when no token was seen:

        ce                  [G]        mean loss of the group's predicted tokens, nats; 0 where there were none
        tokens              [G]        so many there were
        load                [L, G, E]  share of the group's assignments that each expert received; 0 where it had none
        mutual_information  [L]        see `mutual_information`
    """

    higher_is_better = None
    group_of_row: Tensor
    nll_sum: Tensor
    tokens: Tensor
    load: Tensor

    def __init__(
        self, names: Sequence[str], group_of_row: Tensor, num_layers: int = 0, num_experts: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.register_buffer("group_of_row", group_of_row, persistent=False)
        self.add_sum("nll_sum", len(names))
        self.add_sum("tokens", len(names))
        self.add_sum("load", num_layers, len(names), num_experts)

    def update(self, nll_N: Tensor, row_N: Tensor, chosen_LTK: Tensor | None, row_T: Tensor) -> None:
        """Add one micro-batch.

        Args:
            nll_N: [N] loss of the predicted tokens, nats.
            row_N: [N] the row of each; -1 is none, and counts in nothing.
            chosen_LTK: [L, T, K] experts of each token in each layer; None of a dense model.
            row_T: [T] the row of each token; -1, padding, counts in nothing.
        """
        in_group_GN = self._in_group(row_N)
        self.nll_sum += nll_N.detach().to(self.nll_sum.dtype).where(in_group_GN, 0.0).sum(1)
        self.tokens += in_group_GN.sum(1)
        if chosen_LTK is not None:
            self.load += load_by_group(chosen_LTK, self._in_group(row_T), self.load.shape[2])

    def _in_group(self, row_N: Tensor) -> Tensor:
        group_N = self.group_of_row[row_N.clamp(min=0)].where(row_N >= 0, -1)
        return group_N == torch.arange(len(self.names), device=row_N.device)[:, None]

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics of everything seen by all ranks."""
        if self.tokens.sum() == 0:
            return {}
        result = {
            "ce": self.nll_sum / self.tokens.clamp(min=1.0),
            "tokens": self.tokens,
            "load": self.load / self.load.sum(-1, keepdim=True).clamp(min=1.0),
            "mutual_information": mutual_information(self.load),
        }
        return {name: value.float() for name, value in result.items()}


class ReplicationError(_Sums):
    """How well layers answer as others would, per layer, over all tokens of all ranks.

    compute() returns float32 tensors [L], zeros for a layer of which no token was seen:

        mse             mean over tokens and width of (answer - target)^2
        relative_error  norm of all errors over the norm of all targets
        cosine          mean over tokens of the cosine between answer and target
    """

    higher_is_better = None
    squared: Tensor
    power: Tensor
    cosine: Tensor
    tokens: Tensor

    def __init__(self, num_layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("squared", "power", "cosine", "tokens"):
            self.add_sum(name, num_layers)

    def update(self, layer: int, squared_N: Tensor, power_N: Tensor, cosine_N: Tensor) -> None:
        """Add a layer's tokens: mean square of the error, mean square of the target, cosine."""
        for name, values in (("squared", squared_N), ("power", power_N), ("cosine", cosine_N)):
            getattr(self, name)[layer] += values.detach().sum(dtype=torch.float64).to(self.squared.dtype)
        self.tokens[layer] += len(squared_N)

    def compute(self) -> dict[str, Tensor]:
        """Return the means over everything seen by all ranks."""
        return replication_means(torch.stack([self.squared, self.power, self.cosine, self.tokens], -1))


def replication_means(sums_L4: Tensor) -> dict[str, Tensor]:
    """mse, relative_error and cosine [L] from sums over tokens: squared error, squared target, cosine, tokens."""
    squared_L, power_L, cosine_L, tokens_L = sums_L4.unbind(-1)
    some_L = tokens_L.clamp(min=1)
    result = {
        "mse": squared_L / some_L,
        "relative_error": (squared_L / power_L.where(power_L > 0, 1.0)).sqrt(),
        "cosine": cosine_L / some_L,
    }
    return {name: value.float() for name, value in result.items()}


class CKAMatrix(_Sums):
    """Linear CKA of every layer x with every layer y, from minibatches that need not be kept.

    Accumulates the HSIC of each minibatch and takes the ratio at the end (Nguyen, Raghu & Kornblith 2021,
    eq. 3 and 4): with the unbiased HSIC the expectation does not depend on the minibatch size. Memory is
    three small matrices, however many updates.

    Args:
        num_x: number of layers on the first side.
        num_y: number of layers on the second side.
        debiased: unbiased HSIC; minibatches of fewer than 4 samples (plain: 2) are left out.

    compute() returns [num_x, num_y] in float32; an entry is 0 where it is not defined (nothing seen, or
    constant features), as in `losses.linear_cka`.
    """

    higher_is_better = True
    cross: Tensor
    self_x: Tensor
    self_y: Tensor

    def __init__(self, num_x: int, num_y: int, debiased: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.debiased = debiased
        self.add_sum("cross", num_x, num_y)
        self.add_sum("self_x", num_x)
        self.add_sum("self_y", num_y)

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Add one minibatch: the features [N, D] of each layer of both sides, for the same N samples."""
        if (len(xs), len(ys)) != tuple(self.cross.shape):
            raise ValueError(f"expected {tuple(self.cross.shape)} layers of features, got {(len(xs), len(ys))}")
        hsic = minibatch_hsic(xs, ys, debiased=self.debiased)
        # Sums serve as well as means: the number of minibatches cancels in the ratio.
        self.cross += hsic.cross_XY
        self.self_x += hsic.self_X
        self.self_y += hsic.self_Y

    def compute(self) -> Tensor:
        """Return the matrix of everything seen by all ranks."""
        return cka_from_hsic(MinibatchHSIC(self.cross, self.self_x, self.self_y)).float()
