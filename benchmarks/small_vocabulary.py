"""A tokenizer cut down to the tokens that occur in some rows, and models moved between the two vocabularies.

Byte-level BPE joins two pieces at a time, always by the earliest merge in its list that applies. On the texts that the
tokens were collected from, every piece that ever stands in between was joined into a token that occurs. So the merges
of those pieces alone join the same texts in the same way, and the ids that occur are merely renumbered. Those pieces
take ids too, although they do not occur by themselves. The cut is checked on every row.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from agri_moe.data.chat import Chat, ChatFormat

CUT_FILE = "cut.json"


class Cut(NamedTuple):
    """What was kept: tokens of the whole tokenizer, of them in the rows, of them kept; the kept ones in no row."""

    whole: int
    occurring: int
    kept: int
    unseen: list[str]


def pieces(tokens: Iterable[str], merges: Mapping[str, tuple[str, str]]) -> set[str]:
    """The tokens with every piece that they are merged from; `merges` maps a token to its two parts."""
    kept: set[str] = set()
    stack = list(tokens)
    while stack:
        token = stack.pop()
        if token not in kept:
            kept.add(token)
            stack += merges.get(token, ())
    return kept


def cut_tokenizer(definition: dict[str, Any], occurring: set[int]) -> dict[str, Any]:
    """The content of a tokenizer.json with the tokens that occur, their pieces, all bytes and the added tokens.

    Ids keep their order and lose their gaps. Raises a ValueError unless the tokenizer is a BPE of one merge a token.
    """
    model = definition["model"]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    merges = {left + right: (left, right) for left, right in pairs}
    if model["type"] != "BPE" or model.get("ignore_merges") or len(merges) < len(pairs):
        raise ValueError("the tokenizer is no BPE with one merge for each token, so it cannot be cut down.")
    vocabulary: dict[str, int] = model["vocab"]
    tokens = [token for token, i in vocabulary.items() if i in occurring]
    kept = pieces([*tokens, *pre_tokenizers.ByteLevel.alphabet()], merges)
    ordered = sorted(kept, key=vocabulary.__getitem__)
    added = [token | {"id": len(ordered) + i} for i, token in enumerate(definition["added_tokens"])]
    small = model | {
        "vocab": {token: i for i, token in enumerate(ordered)},
        "merges": [list(pair) for pair in pairs if pair[0] + pair[1] in kept],
    }
    return definition | {"model": small, "added_tokens": added}


def write_small_tokenizer(
    source: Path, folder: Path, rows: Sequence[Mapping[str, Any] | str], chat_format: ChatFormat
) -> Cut:
    """Write a tokenizer folder that holds what the rows need, and check that every row keeps its tokens.

    Args:
        source: Folder of the whole tokenizer.
        folder: Folder to write.
        rows: Chat rows (system, scenario, thought, advisory), or plain texts.
        chat_format: How they are rendered.
    """
    whole = Chat.load(str(source), chat_format)
    encoded = [_encode(whole, row) for row in rows]
    occurring = {i for ids in encoded for i in ids}
    definition = json.loads((source / "tokenizer.json").read_text("utf-8"))
    backend = Tokenizer.from_str(json.dumps(cut_tokenizer(definition, occurring), ensure_ascii=False))
    end = chat_format.end
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end).save_pretrained(str(folder))
    small = Chat.load(str(folder), chat_format)
    seen: set[str] = set()
    for row, ids in zip(rows, encoded, strict=True):
        tokens = whole.tokenizer.convert_ids_to_tokens(ids)
        if small.tokenizer.convert_ids_to_tokens(_encode(small, row)) != tokens:
            raise RuntimeError(f"the small tokenizer splits a row in another way: {row!r}.")
        seen.update(tokens)
    kept = small.tokenizer.get_vocab()
    cut = Cut(len(whole.tokenizer), len(occurring), len(kept), sorted(kept.keys() - seen))
    (folder / CUT_FILE).write_text(json.dumps(cut._asdict(), ensure_ascii=False))
    return cut


def _encode(chat: Chat, row: Mapping[str, Any] | str) -> list[int]:
    return [*chat.encode_text(row), chat.end_id] if isinstance(row, str) else chat.encode(row).input_ids


def read_cut(folder: Path) -> Cut:
    """What `write_small_tokenizer` kept."""
    return Cut(**json.loads((folder / CUT_FILE).read_text()))


def widen(source: Path, target: Path, whole: Chat, vocabulary: int, unseen: Sequence[str]) -> None:
    """Write a model of the small vocabulary as one of the whole vocabulary, its rows at the ids that they had.

    The row of an id that the small vocabulary lacks is the mean of the rows of `unseen`, tokens of the small vocabulary
    that stand in no row: what training at the whole vocabulary would have made of it, up to noise.

    Args:
        source: Folder of a dense model with a tied head, and its small tokenizer.
        target: Folder to write, with `whole`'s tokenizer.
        whole: The whole tokenizer.
        vocabulary: Rows of the whole embedding.
        unseen: Tokens of the small vocabulary that stand in no row.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    small = Chat.load(str(source)).tokenizer
    narrow_VD = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    wide_VD = model.get_input_embeddings().weight
    places = whole.tokenizer.get_vocab()
    shared = [(places[token], i) for token, i in small.get_vocab().items() if token in places]
    to, at = torch.tensor(shared).T
    with torch.no_grad():
        wide_VD[:] = narrow_VD[small.convert_tokens_to_ids(list(unseen))].mean(0)
        wide_VD[to] = narrow_VD[at]
    model.save_pretrained(target)
    whole.save(target)
