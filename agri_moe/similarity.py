"""How alike two trained models are, layer by layer and expert by expert, measured with torch-cka.

torch-cka counts what a module puts out for one item of a batch as one sample. Here an item is a token, not a row, so
the models are read first and torch-cka is given tokens by their numbers. It calls `.item()`, sets its modules to eval
mode, leaves its hooks behind and needs whole batches of more than 3: it sees only stand-ins, and never a loss.

Shapes: N tokens, M of them through every expert, D width, L layers, E experts, K experts per token, G groups, X and Y
layers (or experts) of two models.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_cka import CKA

from agri_moe.data.chat import Chat, Segment
from agri_moe.data.groups import group_of
from agri_moe.data.packing import PackedRow, StepTotals, collate
from agri_moe.data.sources import Source, find_sources, read_rows
from agri_moe.models.causal import CausalModel, Reads
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.source import ModelConfig, check_vocabulary
from agri_moe.trained import load_checkpoint

Array = np.ndarray[Any, Any]

COLUMNS = ("system", "scenario", "thought", "advisory")
ROWS_AT_ONCE = 8
EXPERT_TOKENS = 512
"""Tokens that go through every expert of every layer: their outputs are held in memory all at once."""


@dataclass(frozen=True)
class Row:
    """A row's tokens, and the group it belongs to."""

    input_ids: list[int]
    segment_ids: list[int]
    group: str


class Features(NamedTuple):
    """What a model made of the tokens, on the CPU."""

    layers: list[Tensor]  # [N, D] each: the residual stream after every layer
    experts: list[Tensor]  # [E, M, D] for each layer with experts: what each of them makes of the first M tokens
    chosen: list[Tensor]  # [N, K] for each layer with experts: those that the router chose
    expert_layers: list[int]


# ---------------------------------------------------------------------- models and rows


def load_chat(source: str) -> Chat:
    """The tokenizer that comes with a checkpoint."""
    chat = Chat.load(str(Path(source).parent.parent / "tokenizer") if _is_run_checkpoint(source) else source)
    # One that a run has saved holds the markers already. Whichever model never learned them starts as in training.
    chat.new_marker_pieces = {
        token: chat.encode_text(chat.format.markers[name]) for name, token in chat.marker_ids.items()
    }
    return chat


def check_model(source: str, key: str, chat: Chat) -> None:
    """Refuse a model that reads other tokens, before weights are loaded.

    Raises:
        ValueError: If it is not there, or its tokenizer is another one than the source's.
    """
    if not _is_run_checkpoint(source):
        check_vocabulary(source, load_config(source, key), chat, key)
        return
    if not Path(source).exists():
        raise ValueError(f"{key}: {source} does not exist.")
    if load_chat(source).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise ValueError(f"{key}: the tokenizer of {source} is not that of --source; both must read the same tokens.")


def load_model(source: str, key: str, chat: Chat) -> CausalModel:
    """A checkpoint of a run, or a Hugging Face folder or name, in the type it is stored in."""
    if _is_run_checkpoint(source):
        return CausalModel(load_checkpoint(Path(source), key)[0])
    dtype = load_config(source, key).dtype or torch.float32
    return CausalModel(ModelConfig(source).load(key, chat, dtype).eval())


def _is_run_checkpoint(source: str) -> bool:
    return Path(source).suffix == ".ckpt"


def read_sample(
    data: str | list[str], chat: Chat, columns: dict[str, str], group_by: str | None, tokens: int, max_length: int
) -> tuple[list[Row], int]:
    """Rows in a seeded random order until they hold enough tokens that are thought or advisory; and how many were bad.

    Args:
        data: As `data.train` takes it.
        chat: Of the source.
        columns: Our column -> the one in the files.
        group_by: Column, or struct.field, that sorts rows into groups.
        tokens: How many.
        max_length: Longer rows are bad.

    Raises:
        ValueError: If there are not so many, or a row has no group.
    """
    raw = [(source, row) for source in find_sources(data, "--data") for row in read_rows(source)]
    random.Random(0).shuffle(raw)  # files are often sorted
    rows: list[Row] = []
    found = bad = 0
    for source, one in raw:
        if found >= tokens:
            break
        try:
            ids, segments = chat.encode({name: one.values.get(columns.get(name, name)) for name in COLUMNS})
        except ValueError:
            bad += 1  # told by the caller, and by `preview` with the reason
            continue
        if len(ids) > max_length:
            bad += 1
            continue
        rows.append(Row(ids, segments, "" if group_by is None else _group(one.values, group_by, source, one.number)))
        found += sum(segment >= Segment.THOUGHT for segment in segments[1:])
    if found < tokens:
        raise ValueError(
            f"--data {data} holds {found:,} tokens of thoughts and advisories in usable rows, fewer than --tokens "
            f"{tokens:,}: give more rows, or fewer --tokens."
        )
    return rows, bad


def _group(values: Any, group_by: str, source: Source, number: int) -> str:
    group = group_of(values, group_by)
    if group is None:
        raise ValueError(
            f"--group_by {group_by}: {source.name} row {number} has no such value; name a column, or struct.field."
        )
    return group


# ---------------------------------------------------------------------- reading models


@torch.no_grad()
def read_features(model: CausalModel, chat: Chat, rows: Sequence[Row], tokens: int, device: str) -> Features:
    """What a model makes of the first `tokens` tokens of thoughts and advisories.

    The prompt is left out, as in training: the first token of a row, on which models lean, is like no other.
    """
    model.to(device)
    layers: list[list[Tensor]] = [[] for _ in range(model.num_layers)]
    experts: list[list[Tensor]] = [[] for _ in model.routers]
    chosen: list[list[Tensor]] = [[] for _ in model.routers]
    read = 0
    for batch in _batches(rows, chat):
        batch["sample"] = batch["sample"][: tokens - read]
        batch["expert_sample"] = batch["sample"][: max(EXPERT_TOKENS - read, 0)]
        read += len(batch["sample"])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        reads = Reads(layers=range(model.num_layers), experts=bool(model.routers))
        out = model(batch, batch["sample"][:0], lambda hidden, head: None, reads)
        for kept, stream_ND in zip(layers, out.layers.values(), strict=True):
            kept.append(stream_ND.cpu())
        for kept, outputs_EMD in zip(experts, out.experts, strict=True):
            kept.append(outputs_EMD.cpu())
        for kept, logits_TE in zip(chosen, out.router_logits, strict=True):
            kept.append(logits_TE[batch["sample"]].topk(model.top_k).indices.cpu())
    return Features(
        [torch.cat(kept) for kept in layers],
        [torch.cat(kept, 1) for kept in experts],
        [torch.cat(kept) for kept in chosen],
        [i for i, layer in enumerate(model.hf.model.layers) if hasattr(layer.mlp, "experts")],
    )


def _batches(rows: Sequence[Row], chat: Chat) -> Iterator[dict[str, Tensor]]:
    """Rows beside each other, one to a sequence, with the places of the tokens of their thoughts and advisories."""
    totals = StepTotals(np.zeros((2, len(Segment))), 0, 0)  # of the losses, of which there are none
    for start in range(0, len(rows), ROWS_AT_ONCE):
        packed = [
            [PackedRow(i, np.array(row.input_ids), np.array(row.segment_ids))]
            for i, row in enumerate(rows[start : start + ROWS_AT_ONCE], start)
        ]
        batch = collate(packed, totals, max(len(row.input_ids) for row in rows), chat.pad_id)
        batch["sample"] = (batch["target_segments"] >= Segment.THOUGHT).flatten().nonzero()[:, 0]
        yield batch


# ---------------------------------------------------------------------- comparing


class _Stand(nn.Module):
    """Puts out, module by module, what a model made of the tokens with these numbers: what torch-cka hooks into."""

    def __init__(self, features: Sequence[Tensor]):
        super().__init__()
        self.features = features
        self.layers = nn.ModuleList(nn.Identity() for _ in features)

    @property
    def names(self) -> list[str]:
        return [f"layers.{i}" for i in range(len(self.features))]

    def forward(self, tokens_N: Tensor) -> None:
        for layer, feature_ND in zip(self.layers, self.features, strict=True):
            layer(feature_ND[tokens_N])


def torch_cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor], batch_size: int, names: tuple[str, str]) -> Array:
    """Debiased linear CKA of every x with every y by torch-cka, [X, Y].

    The unbiased HSIC of each batch of tokens is averaged over batches before the ratio is taken (Nguyen, Raghu &
    Kornblith 2021, eq. 3 and 4), as `agri_moe.metrics.CKAMatrix` does; tokens that fill no batch are left out.

    Args:
        xs: Features of the same N tokens, [N, D] each, in any type.
        ys: The same, of any width.
        batch_size: Tokens to a batch: at least 4, at most N.
        names: What the two sides are, for messages.

    Raises:
        ValueError: If a feature is the same for every token.
    """
    sides = [
        _Stand([_scaled(x_ND, f"{name} {i}") for i, x_ND in enumerate(side)])
        for side, name in zip((xs, ys), names, strict=True)
    ]
    whole = len(xs[0]) // batch_size * batch_size
    loader = DataLoader(TensorDataset(torch.arange(whole)), batch_size=batch_size)
    cka = CKA(
        *sides,
        model1_name=f"{names[0]} (rows)",
        model2_name=f"{names[1]} (columns)",
        model1_layers=sides[0].names,
        model2_layers=sides[1].names,
    )
    cka.compare(loader, loader)
    matrix: Array = cka.export()["CKA"].numpy()
    return matrix


def experts_within(features: Features, batch_size: int) -> dict[int, Array]:
    """Layer -> CKA of each of its experts with each, [E, E]."""
    found = {}
    for number, outputs_EMD in zip(features.expert_layers, features.experts, strict=True):
        names = (f"layer {number}, expert", f"layer {number}, expert again")
        size = min(batch_size, outputs_EMD.shape[1])
        found[number] = torch_cka_matrix(list(outputs_EMD), list(outputs_EMD), size, names)
    return found


def _scaled(x_ND: Tensor, name: str) -> Tensor:
    """Centred, and of length 1 on the mean: CKA does not see it, but torch-cka's float32 sums of squares do."""
    x_ND = x_ND.float()
    x_ND = x_ND - x_ND.mean(0, keepdim=True)
    length = x_ND.square().sum(1).mean().sqrt()
    if length == 0:
        raise ValueError(f"{name} gives the same for every token, so there is nothing to compare it with.")
    return x_ND / length


def load_by_group(features: Features, rows: Sequence[Row], experts: int) -> tuple[Array, list[str]]:
    """[L, G, E] shares of each group's assignments that each expert got, and the groups' names, most tokens first."""
    lengths = [sum(segment >= Segment.THOUGHT for segment in row.segment_ids[1:]) for row in rows]
    of_token = [row.group for row, length in zip(rows, lengths, strict=True) for _ in range(length)]
    of_token = of_token[: len(features.chosen[0])]
    names = sorted(set(of_token), key=lambda name: (-of_token.count(name), name))
    group_N = torch.tensor([names.index(name) for name in of_token])
    counts_LGE = torch.zeros(len(features.chosen), len(names), experts)
    for counts_GE, chosen_NK in zip(counts_LGE, features.chosen, strict=True):
        places = (group_N[:, None] * experts + chosen_NK).flatten()
        counts_GE += torch.bincount(places, minlength=counts_GE.numel()).view_as(counts_GE)
    shares: Array = (counts_LGE / counts_LGE.sum(-1, keepdim=True)).numpy()
    return shares, names
