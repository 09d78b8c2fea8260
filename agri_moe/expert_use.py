"""Which experts serve the text that a model writes, prompts and answers apart.

What was written is read once more, all of it in one pass: the experts are chosen as they were token by token, padding
and answers that ended before others are out of the way, and the writing itself is not touched.

Shapes: P parts (prompt and answer), L layers with experts, E experts.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agri_moe.data.chat import Segment
from agri_moe.data.packing import PackedRow, StepTotals, collate
from agri_moe.losses import routing
from agri_moe.metrics import balance_score, load_by_group
from agri_moe.models.causal import CausalModel

Array = np.ndarray[Any, Any]

PARTS = {"prompt": Segment.USER, "answer": Segment.ASSISTANT}
SHOWN = 16
"""Experts of a layer up to which the table has a column for each; of more it names the busiest."""
BUSIEST = 3


@dataclass(frozen=True)
class ExpertUse:
    """What routers did with prompts and answers.

    Args:
        layers: [L] numbers of the layers with experts.
        load: [P, L, E] assignments that each expert received.
        entropy_sum: [P, L] sum over tokens of the entropy of the router's distribution, nats.
        tokens: [P] tokens.
    """

    layers: Array
    load: Array
    entropy_sum: Array
    tokens: Array

    @classmethod
    def add(cls, several: Iterable["ExpertUse"]) -> "ExpertUse":
        """The sum over several batches of one model."""
        uses = list(several)
        sums = (sum(getattr(use, name) for use in uses) for name in ("load", "entropy_sum", "tokens"))
        return cls(uses[0].layers, *sums)

    @classmethod
    def read(cls, path: Path) -> "ExpertUse":
        """What `save` wrote."""
        with np.load(path) as file:
            return cls(*(file[name] for name in ("layers", "load", "entropy_sum", "tokens")))

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all.

        It holds the fields of this class, `parts` [P], and what `statistics` tells of them.
        """
        unfinished = path.with_name(f".unfinished-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(unfinished, allow_pickle=False, parts=np.array(list(PARTS)), **vars(self), **self.statistics())
        unfinished.replace(path)

    def statistics(self) -> dict[str, Array]:
        """As validation tells them, [P, L] each; of a part without tokens all are 0, but everyone is dead.

        entropy   mean entropy of the router's distribution over log E: 1 is undecided
        balance   `agri_moe.metrics.balance_score` of the load: 1 is even
        dead      experts that received nothing, their number
        """
        experts = self.load.shape[2]
        entropy = self.entropy_sum / np.maximum(self.tokens, 1)[:, None] / max(math.log(experts), 1e-9)
        balance = balance_score(torch.from_numpy(self.load)).numpy()
        return {"entropy": entropy, "balance": balance, "dead": (self.load == 0).sum(2)}

    def table(self) -> str:
        """The same for a reader, with the share of each expert of its layer's assignments."""
        experts = self.load.shape[2]
        told = self.statistics()
        share = self.load / np.maximum(self.load.sum(2, keepdims=True), 1)
        shares = "".join(f"{expert:4}" for expert in range(experts)) if experts <= SHOWN else "  the busiest"
        counts = " and ".join(
            f"{tokens:,.0f} tokens of {part}s" for part, tokens in zip(PARTS, self.tokens, strict=True)
        )
        lines = [
            f"Experts over {counts}. Entropy: 1 undecided, 0 certain; balance: 1 even, 0 one expert for all; "
            "dead: experts that got nothing; then the share of each, %.",
            f"{'layer':>5}  {'':6}  {'entropy':>7}  {'balance':>7}  {'dead':>4}  {shares}",
        ]
        for i, layer in enumerate(self.layers.tolist()):
            for p, part in enumerate(PARTS):
                numbers = f"{told['entropy'][p, i]:7.3f}  {told['balance'][p, i]:7.3f}  {told['dead'][p, i]:4}"
                lines.append(f"{'' if p else layer:>5}  {part:6}  {numbers}  {_shares(share[p, i])}")
        return "\n".join(lines)


def _shares(share_E: Array) -> str:
    if len(share_E) <= SHOWN:
        return "".join(f"{100 * share:4.0f}" for share in share_E)
    busiest = np.argsort(-share_E, kind="stable")[:BUSIEST]
    return "  " + ", ".join(f"{expert} ({100 * share_E[expert]:.0f})" for expert in busiest)


def expert_layers(model: PreTrainedModel | CausalModel) -> list[int]:
    """Numbers of the layers whose experts transformers routes."""
    hf: Any = model.hf if isinstance(model, CausalModel) else model
    return [i for i, layer in enumerate(hf.model.layers) if hasattr(layer.mlp, "experts")]


@torch.no_grad()
def expert_use(
    model: PreTrainedModel | CausalModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> ExpertUse:
    """What the routers do with prompts and the answers to them.

    The last token of an answer is left out: the model has written it, and never read it.

    Args:
        model: With experts (see `expert_layers`), on its device, in eval mode.
        prompts: Token ids.
        answers: Of each prompt the ids that were written after it, up to and with the one that ended it.
    """
    causal = model if isinstance(model, CausalModel) else CausalModel(model)
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt, *answer[:-1]]
        segments = np.array([PARTS["prompt"]] * len(prompt) + [PARTS["answer"]] * (len(ids) - len(prompt)))
        rows.append([PackedRow(i, np.array(ids), segments)])
    totals = StepTotals(np.zeros((2, len(Segment))), 0, 0)  # of the losses, of which there are none
    batch = collate(rows, totals, max(len(row[0].input_ids) for row in rows), pad_id=0)
    batch = {name: tensor.to(causal.device) for name, tensor in batch.items()}
    with choices(causal.routers) as chosen:
        out = causal(batch, batch["row_ids"].flatten()[:0], lambda hidden, head: None)
    in_part_PT = torch.stack([(batch["segment_ids"] == segment).flatten() for segment in PARTS.values()])
    found = [routing(out.router_logits, causal.top_k, in_part_T) for in_part_T in in_part_PT]
    sums = (
        load_by_group(torch.stack(chosen), in_part_PT, causal.num_experts).transpose(0, 1),
        torch.stack([part.entropy_L for part in found]),
        torch.stack([part.tokens for part in found]),
    )
    return ExpertUse(np.array(expert_layers(model)), *(value.double().cpu().numpy() for value in sums))


@contextmanager
def choices(routers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the experts [N, K] that each router chooses for the tokens of one forward pass without gradient.

    Raises:
        ValueError: If experts choose their tokens, and not tokens their experts.
    """
    chosen: list[Tensor] = []

    def keep(router: nn.Module, _: Any, output: tuple[Tensor, ...]) -> None:
        if len(output) < 3:
            raise ValueError(
                "with expert choice a token has no experts of its own: leave data.group_by, or --utilisation, out."
            )
        chosen.append(output[2])

    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
