"""What `select` finds out about a row while it is read: its score, what it repeats, whether it is text at all.

Shapes: R rows of a batch, N tokens of them all.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from agri_moe.data.selection import (
    RECORD,
    Array,
    bigram_entropy,
    letter_share,
    plain,
    repetition,
    signatures,
    unigram_entropy,
)
from agri_moe.data.selection_output import ADDED, write_json

Score = Literal["unigram", "bigram", "model_entropy", "model_loss"]
LISTED = 1000  # bad rows of a shard that are kept by name
_MODEL_TOKENS = 2048  # of a row, that a model is shown
_POSITIONS = 256  # whose logits are held at a time
_BLOCK = 1 << 16  # rows whose records are held until they are written


class Batch(NamedTuple):
    """Usable rows that are scored together; the hash is of all columns."""

    ordinals: list[int]
    texts: list[str]
    groups: list[str]
    hashes: list[int]
    sizes: list[int]


Scorer = Callable[[list[str]], tuple[Array, Array, Array]]
"""Texts -> the ids of all [N], tokens of each [R], score of each [R]."""


@functools.lru_cache(maxsize=1)
def load_scorer(tokenizer: str | None, score: Score, model: str | None, device: str) -> Scorer:
    """What scores texts, loaded once in a process."""
    if model is not None:
        return _model_scorer(model, device, score)
    assert tokenizer is not None
    backend = load_tokenizer(tokenizer)
    entropy = bigram_entropy if score == "bigram" else unigram_entropy

    def scores(texts: list[str]) -> tuple[Array, Array, Array]:
        """Ids [N] uint32, tokens of each row [R], entropy of each [R] in nats; of at least one text."""
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths_R = np.array([len(row) for row in ids])
        ids_N = np.concatenate([np.array(row, np.uint32) for row in ids])
        return ids_N, lengths_R, entropy(ids_N, lengths_R)

    return scores


def _model_scorer(source: str, device: str, score: Score) -> Scorer:
    """Scores by a causal model: the mean of its loss on a row's tokens but the first, or of its predictions' entropy.

    A row is read by itself, on one core: what a matrix product makes of it changes in the last digits with what stands
    beside it, and the choice must not hang on that. Of a row longer than 2,048 tokens the first 2,048 count.
    """
    import torch

    from agri_moe.trained import load_trained

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, chat = load_trained(source, "--model")
    model.to(device).eval()
    head = model.get_output_embeddings()

    @torch.inference_mode()
    def score_row(ids: list[int]) -> float:
        """Mean loss or entropy, in nats, over the row's tokens but the first; 0 for a row of fewer than two."""
        tokens = torch.tensor([ids[:_MODEL_TOKENS]], device=device)
        if tokens.shape[1] < 2:
            return 0.0
        hidden_TD = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
        total = 0.0
        for start in range(0, len(hidden_TD), _POSITIONS):
            logp_PV = head(hidden_TD[start : start + _POSITIONS]).float().log_softmax(-1)
            if score == "model_loss":
                nexts = tokens[0, start + 1 : start + 1 + len(logp_PV), None]
                total -= float(logp_PV.gather(1, nexts).sum())
            else:
                total -= float((logp_PV.exp() * logp_PV).nansum())
        return total / len(hidden_TD)

    def scores(texts: list[str]) -> tuple[Array, Array, Array]:
        """Ids [N] uint32, tokens of each row [R] before any are cut off, score of each [R] in nats."""
        ids = [chat.encode_text(text) for text in texts]
        lengths_R = np.array([len(row) for row in ids])
        ids_N = np.concatenate([np.array(row, np.uint32) for row in ids])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return ids_N, lengths_R, np.array([score_row(row) for row in ids])
        finally:
            torch.set_num_threads(threads)

    return scores


def load_tokenizer(name: str) -> Any:
    """A tokenizer without transformers, which would take most of a scoring process's memory; text is never control.

    As in `chat.without_added_tokens`, every added token is made special, and special ones are split.
    """
    from tokenizers import AddedToken, Tokenizer

    folder = Path(name).expanduser()
    if folder.exists() and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"--tokenizer {name} has no tokenizer.json in it: name a folder with a fast tokenizer.")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--tokenizer {name} does not exist: name a folder with a tokenizer, or a hub name.")
    try:
        file = folder / "tokenizer.json"
        loaded = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the Rust parser and the hub client raise bare Exceptions and classes of their own
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"--tokenizer {name} cannot be loaded ({first[0] if first else type(error).__name__}): name another "
            "folder or hub name."
        ) from error
    added = [token.content for token in loaded.get_added_tokens_decoder().values()]
    loaded.no_truncation()
    loaded.no_padding()
    loaded.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    loaded.encode_special_tokens = True
    return loaded


class Found:
    """What scoring a shard finds: records and signatures, written block by block, and what else is to be known."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:06}"
        self.blocks = 0
        self.groups: dict[str, int] = {}
        self.shapes: dict[str, set[tuple[str, ...]]] = {}
        self.rejected: list[str] = []
        self.bad = 0
        self._records: list[Array] = []
        self._signatures: list[Array] = []

    def reject(self, reason: str) -> None:
        """Note a row that is left out."""
        self.bad += 1
        if len(self.rejected) < LISTED:
            self.rejected.append(reason)

    def see(self, values: Mapping[str, Any]) -> None:
        """Note the columns of a row, and the fields of its structs, in their order."""
        self.shapes.setdefault("", set()).add(tuple(values))
        for name, value in values.items():
            if isinstance(value, dict):
                self.shapes.setdefault(name, set()).add(tuple(value))

    def add(self, batch: Batch, ids_N: Array, lengths_R: Array, scores_R: Array, seed: int) -> None:
        """Note the rows of a batch."""
        records = np.zeros(len(batch.texts), RECORD)
        plains = [plain(text) for text in batch.texts]
        records["ordinal"], records["row"], records["bytes"] = batch.ordinals, batch.hashes, batch.sizes
        records["group"] = [self.groups.setdefault(name, len(self.groups)) for name in batch.groups]
        records["tokens"], records["entropy"] = lengths_R, scores_R
        records["text"] = [content_hash(text, seed) for text in plains]
        records["repetition"] = repetition(ids_N, lengths_R)
        records["density"] = [len(text.encode()) for text in batch.texts] / np.maximum(lengths_R, 1)
        records["letters"] = letter_share(batch.texts)
        self._records.append(records)
        self._signatures.append(signatures(plains))
        if sum(map(len, self._records)) >= _BLOCK:
            self._write_block()

    def write(self) -> None:
        """Write what is left; the JSON file comes last, and says that the shard is done."""
        if self._records:
            self._write_block()
        shapes = {name: sorted(found) for name, found in self.shapes.items()}
        facts = {"blocks": self.blocks, "groups": list(self.groups), "shapes": shapes}
        write_json(self.path.with_suffix(".json"), facts | {"bad": self.bad, "rejected": self.rejected})

    def _write_block(self) -> None:
        name = f"{self.path.name}-{self.blocks:04}"
        np.save(self.path.with_name(f"{name}.records.npy"), np.concatenate(self._records))
        np.save(self.path.with_name(f"{name}.signatures.npy"), np.concatenate(self._signatures, 1))
        self._records, self._signatures = [], []
        self.blocks += 1


def row_content(values: Mapping[str, Any]) -> str:
    """All that a row says, whatever the order of its columns; columns of an earlier selection do not count."""
    return repr(sorted((name, value) for name, value in values.items() if name not in ADDED))


def content_hash(text: str, seed: int = 0) -> int:
    """64 bits of BLAKE2b, salted with the seed: among ten million texts two collide with a chance of 3 in a million."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little")
