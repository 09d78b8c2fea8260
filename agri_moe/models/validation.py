"""What a validation or a test measures of a language model, gathered over its batches and ranks.

Shapes: N positions at which something is predicted, T tokens of a micro-batch, L layers with experts, E experts, K
experts per token.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from agri_moe.evaluation import Measure
from agri_moe.losses import Routing
from agri_moe.losses.logits import TokenStatistics
from agri_moe.metrics import (
    GroupRouting,
    RoutingStatistics,
    SegmentLoss,
    TeacherAgreement,
    TermMean,
    balanced_perplexity,
    tokens_seen,
)
from agri_moe.models.training import layer_name
from agri_moe.objective import Batch, Term

STATISTICS = ("cka", "attention", "diversity", "balance")
"""Terms of which each micro-batch has one value, and not each token."""


class Validation(nn.Module):
    """The metrics of a language module, and what is logged of them.

    Args:
        segments: Name -> segment id of what losses are told of.
        terms: Names of the terms that are measured, and of their layers (see `layer_name`).
        routers: L; 0 for a dense model.
        experts: E.
        balance_beta: Weight of imbalance in the balanced perplexity.

    Attributes:
        groups: Where rows are sorted into groups, what is known of them; None elsewhere.
        token_bytes: Bytes of text of each token by its id, on the device; None where they are not known.
    """

    routing: RoutingStatistics | None

    def __init__(
        self, segments: Mapping[str, int], terms: Sequence[str], routers: int, experts: int, balance_beta: float
    ):
        super().__init__()
        self.balance_beta = balance_beta
        self.loss = SegmentLoss(segments)
        self.teacher = TeacherAgreement()
        self.terms = nn.ModuleDict({name: TermMean() for name in terms})
        self.routing = RoutingStatistics(routers, experts) if routers else None
        self.groups: GroupRouting | None = None
        self.token_bytes: Tensor | None = None

    # ------------------------------------------------------------------ a micro-batch

    def update(
        self, read: TokenStatistics, batch: Batch, routed: Routing | None, chosen: Sequence[Tensor], taught: bool
    ) -> None:
        """Take in what a forward pass made of a micro-batch.

        Args:
            read: Of its tokens.
            batch: With `positions` and `segments` [N], and `row_ids` where rows are sorted into groups.
            routed: What the routers did; None for a dense model.
            chosen: For each layer the experts of each token [T, K], where rows are sorted into groups.
            taught: Whether there is a teacher to agree with.
        """
        text_bytes = None if self.token_bytes is None else self.token_bytes[batch["targets"]]
        self.loss.update(read.nll_N, batch["segments"], text_bytes)
        if taught:
            self.teacher.update(read.kl_M, read.agree_M)
        if routed is not None and self.routing is not None:
            self.routing.update(routed)
        if self.groups is not None:
            # The tokens that the loss counts, so that it is the mean of the groups' losses.
            counted = torch.isin(batch["segments"], batch["segments"].new_tensor(list(self.loss.segments.values())))
            row_T = batch["row_ids"].flatten()
            row_N = row_T[batch["positions"]].where(counted, -1)
            self.groups.update(read.nll_N, row_N, torch.stack(list(chosen)) if chosen else None, row_T)

    def update_term(self, name: str, term: Term, layers: Sequence[int]) -> None:
        """Take in one term of the objective, and of each of these layers where it has them."""
        self._term(name).update(term.total, term.tokens)
        if term.layers is not None and layers:
            for layer, value in zip(layers, term.layers, strict=True):
                self._term(layer_name(name, layer)).update(value, term.tokens)

    def _term(self, name: str) -> TermMean:
        return cast(TermMean, self.terms[name])

    # ------------------------------------------------------------------ what came of them

    def values(self) -> dict[str, Tensor]:
        """Everything that was measured, by name, over all ranks. To be asked for on every rank."""
        losses = self.loss.compute()
        values = {{"loss": "ce"}.get(name, name): value for name, value in losses.items()}
        if self.teacher.update_called:
            values |= self.teacher.compute()
        for name in self.terms:
            metric = self._term(name)
            if metric.update_called and (value := metric.compute()) is not None:
                values[name] = value
        return values | self._routing_values(losses) | self._group_values()

    def _routing_values(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the layers; nothing if no token was routed."""
        stats = {} if self.routing is None else self.routing.compute()
        if not stats:
            return {}
        values = {
            "router_entropy": stats["normalized_entropy"].mean(),
            "balance_score": stats["balance"].mean(),
            "dead_experts": stats["dead"].mean(),
        }
        if losses:
            balance = values["balance_score"]
            values["balanced_perplexity"] = balanced_perplexity(losses["loss"], balance, self.balance_beta)
        return values

    def _group_values(self) -> dict[str, Tensor]:
        """The loss of each group of rows, and what experts tell of groups, mean over the layers."""
        stats = {} if self.groups is None else self.groups.compute()
        if not stats or self.groups is None:
            return {}
        values = {f"ce/{name}": stats["ce"][i] for i, name in enumerate(self.groups.names) if stats["tokens"][i]}
        if self.routing is not None:
            values["group_information"] = stats["mutual_information"].mean()
        return values

    def measures(self, values: Mapping[str, Tensor]) -> dict[str, Measure]:
        """Values with the tokens, or for a statistic of each micro-batch those, that are behind them."""
        by_segment = tokens_seen(self.loss)
        seen: dict[str, Tensor] = {name: tokens_seen(self._term(name)) for name in self.terms}
        for segment, tokens in zip(self.loss.segments, by_segment, strict=True):
            names = (f"loss_{segment}", f"perplexity_{segment}", f"bits_per_byte_{segment}")
            seen |= dict.fromkeys(names, tokens)
        seen |= dict.fromkeys(("ce", "perplexity", "balanced_perplexity", "bits_per_byte"), by_segment.sum())
        seen |= dict.fromkeys(("kl", "agreement"), tokens_seen(self.teacher))
        if self.routing is not None:
            seen |= dict.fromkeys(("router_entropy", "balance_score", "dead_experts"), tokens_seen(self.routing))
        if self.groups is not None:
            by_group = tokens_seen(self.groups)
            seen |= {f"ce/{name}": tokens for name, tokens in zip(self.groups.names, by_group, strict=True)}
            seen["group_information"] = by_group.sum()
        measures = {}
        for name, value in values.items():
            statistic = name.split("/")[0].removeprefix("anchor_") in STATISTICS
            measures[name] = Measure(float(value), int(seen[name]), "micro-batches" if statistic else "tokens")
        return measures

    def reset(self) -> None:
        """Begin anew, without groups."""
        for metric in (self.loss, self.teacher, *map(self._term, self.terms), self.routing):
            if metric is not None:
                metric.reset()
        self.groups = None
