"""How well a model predicts plain text, by bytes, so that models with other tokenizers can be compared."""

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agri_moe.data.chat import Chat
from agri_moe.losses import token_statistics
from agri_moe.models.causal import CausalModel

_TOKENS = 1024  # of a forward pass


@torch.inference_mode()
def bits_per_byte(hf: PreTrainedModel, chat: Chat, lines: Iterable[str]) -> float:
    """Bits that a model needs for text, over the bytes that it has; the end of a line costs nothing.

    Each line by itself, after the end of another text, so that every byte of it is predicted.

    Args:
        hf: The model.
        chat: Its tokenizer.
        lines: Longer ones than 1,024 tokens are cut into several.

    Raises:
        ValueError: If there is no text, or the tokenizer is not byte-level.
    """
    if chat.token_bytes is None:
        raise ValueError("the tokenizer is not byte-level, so that the bytes of its tokens are not known.")
    sizes = torch.tensor(chat.token_bytes)
    model = CausalModel(hf.eval())
    nats = text = 0.0
    for rows in _sequences(chat, lines):
        ids_1T = torch.tensor([[i for row in rows for i in row]])
        position_ids_1T = torch.cat([torch.arange(len(row)) for row in rows])[None]
        targets_T = ids_1T[0].roll(-1)
        positions_N = (position_ids_1T[0].roll(-1) != 0).nonzero()[:, 0]
        targets_N = targets_T[positions_N]
        batch = {"input_ids": ids_1T, "position_ids": position_ids_1T}
        read = partial(_nll, targets_N=targets_N)
        nats += float(model(batch, positions_N, read).read.double().sum())
        text += int(sizes[targets_N].sum())
    if not text:
        raise ValueError("there is no text to predict.")
    return nats / math.log(2) / text


def _nll(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    return token_statistics(hidden_ND, head_VD, targets_N).nll_N


def _sequences(chat: Chat, lines: Iterable[str]) -> Iterator[list[list[int]]]:
    """Lines as ids, as many together as fit."""
    held: list[list[int]] = []
    for line in lines:
        ids = chat.encode_text(line)
        for start in range(0, len(ids), _TOKENS - 1):
            row = [chat.end_id, *ids[start : start + _TOKENS - 1]]
            if held and sum(map(len, held)) + len(row) > _TOKENS:
                yield held
                held = []
            held.append(row)
    if held:
        yield held
