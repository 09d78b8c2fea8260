"""A tokenizer with new pieces: what may be extended, the words of a text, the extended tokenizer, and what it brings.

    texts -> Extension.words -> MergeLearner (merges.py) -> Extension.build -> a Chat with the new tokenizer
                                                                            -> Usage of text, before and after

The new tokenizer.json is the old one with three changes: marks count as letters where text is split into words, added
tokens stand in the model's vocabulary too, and new pieces and merges follow the old.
"""

from __future__ import annotations

import functools
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agri_moe.data.merges import MergeLearner, Word

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from agri_moe.data.chat import Chat

# What stays token for token: the languages of programs and of the model's other rows.
ENGLISH = """The leaves of the rice plant turn yellow at 25-30 days; it isn't a nitrogen deficiency (N < 1.5%).
Spray 2.5 ml of Propiconazole 25% EC per litre of water, and don't repeat it within 15 days:
we've seen café-brown spots.

def share(counts: dict[str, int], name: str) -> float:
    \"\"\"How much of all is this; 0.0 if there is nothing.\"\"\"
    total = sum(counts.values())
    return counts.get(name, 0) / total if total != 0 else 0.0

SELECT crop, AVG(yield_kg) FROM fields WHERE year >= 2020 GROUP BY crop;
for (int i = 0; i < n; ++i) { a[i] += b[i] * 3; }  // https://example.org/a?b=c&d=%20
"""


def byte_of_char() -> dict[str, int]:
    """The characters in which a byte-level vocabulary is written -> the bytes they stand for.

    Bytes that print as one character of Latin-1 are written as that, the 68 others as U+0100 and up, in their order.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


def with_marks(pattern: str) -> str:
    r"""A pattern that splits text into words, with marks counted as letters.

    Without that, a word of an Indic script is cut at every vowel sign, and no piece can be longer. Of Qwen3's pattern
    this makes Qwen3.5's, which llama.cpp knows by the name qwen35.
    """
    if r"\p{M}" in pattern:
        return pattern
    letters = pattern.replace(r"\p{L}+", r"[\p{L}\p{M}]+")
    return letters.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")


class Extension:
    """A tokenizer that is to get new pieces.

    Args:
        chat: The source tokenizer with its markers.

    Attributes:
        first_id: The id of the first new piece: after all others, markers included.
        piece_bytes: Id -> bytes, of the pieces of text that there are.

    Raises:
        ValueError: If the tokenizer is no byte-level BPE that splits words by a pattern which counts letters.
    """

    def __init__(self, chat: Chat) -> None:
        from tokenizers import Tokenizer

        self.chat = chat
        self.name = chat.tokenizer.name_or_path or "given"
        self._json: dict[str, Any] = json.loads(chat.tokenizer.backend_tokenizer.to_str())
        self._check_model()
        split = self._split_step()
        pattern = with_marks(split["pattern"].get("Regex", ""))
        if r"\p{M}" not in pattern:
            raise ValueError(
                f"--source {self.name} splits words by a rule without \\p{{L}}+, so that marks cannot be counted as "
                "letters: use a tokenizer with Qwen's or Llama 3's rule."
            )
        split["pattern"] = {"Regex": pattern}
        self._tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(self._json))
        self.first_id = max(chat.tokenizer.get_vocab().values()) + 1
        byte = byte_of_char()
        self._char = {value: char for char, value in byte.items()}
        added = set(chat.tokenizer.get_added_vocab())
        texts = {i: token for token, i in self._json["model"]["vocab"].items() if token not in added}
        self.piece_bytes = {i: bytes(byte[char] for char in token) for i, token in texts.items()}

    def _check_model(self) -> None:
        model, decoder = self._json["model"], self._json.get("decoder") or {}
        plain = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or not plain:
            raise ValueError(
                f"--source {self.name} is no byte-level BPE tokenizer, so its pieces cannot be merged further: use one "
                "such as Qwen's or Llama 3's."
            )

    def _split_step(self) -> dict[str, Any]:
        """The step in which text is split into words by a pattern."""
        first = self._json.get("pre_tokenizer") or {}
        steps = first.get("pretokenizers", [first])
        splits = [step for step in steps if step.get("type") == "Split"]
        if len(splits) != 1 or any(step.get("use_regex") for step in steps):
            raise ValueError(
                f"--source {self.name} does not split words by one pattern of its own: use a tokenizer that does, such "
                "as Qwen's or Llama 3's."
            )
        step: dict[str, Any] = splits[0]
        return step

    def words(self, texts: Mapping[str, int]) -> Counter[Word]:
        """The words of texts, in old pieces under the new rule for words, and how often each was seen.

        Args:
            texts: Text -> how often it counts.
        """
        split = Counter[str]()
        for text, weight in texts.items():
            for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(self.normalized(text)):
                split[word] += weight
        words = Counter[Word]()
        for word, count in split.items():
            words[tuple(piece.id for piece in self._tokenizer.model.tokenize(word))] += count
        return words

    def normalized(self, text: str) -> str:
        """Text as the tokenizer reads it, and as decoding gives it back (NFC, with Qwen's)."""
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def build(self, learner: MergeLearner) -> Chat:
        """The tokenizer with the pieces that were learned, in the same chat format."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        from agri_moe.data.chat import Chat

        old, model = self.chat.tokenizer, self._json["model"]
        written = {i: "".join(self._char[byte] for byte in piece) for i, piece in learner.bytes.items()}
        # The library gives an added token that the model does not have the id after the model's last: with new pieces
        # in the model that would be another id than before.
        vocab = model["vocab"] | old.get_added_vocab() | {written[merge.piece]: merge.piece for merge in learner.merges}
        joined = [[written[merge.left], written[merge.right]] for merge in learner.merges]
        whole = self._json | {"model": model | {"vocab": vocab, "merges": model["merges"] + joined}}
        named = {name: getattr(old, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        # A class of the model's own, as Qwen2Tokenizer, would split words by its own pattern whatever the file says.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(whole)),
            model_max_length=old.model_max_length,
            clean_up_tokenization_spaces=False,
            **{name: token for name, token in named.items() if token is not None},
        )
        return Chat(tokenizer, self.chat.format, learner.pieces)


# ---- what it brings


@dataclass
class Usage:
    """What texts are in the tokens of one tokenizer.

    Args:
        words: Runs of text without space.
        size: Bytes of the texts as the tokenizer reads them.
        ids: Id -> how often.
        ends: For each text, the bytes of it after which a token ends.
        exact: How many of the texts come back from their tokens as they were read.
    """

    words: int = 0
    size: int = 0
    ids: Counter[int] = field(default_factory=Counter)
    ends: list[set[int]] = field(default_factory=list)
    exact: int = 0

    @classmethod
    def of(cls, chat: Chat, extension: Extension, texts: Iterable[str], piece_bytes: Mapping[int, bytes]) -> Usage:
        """Of texts, with the tokenizer of `chat`: the source's, or one that the extension has built."""
        found = cls()
        for text in texts:
            read, ids = extension.normalized(text), chat.encode_text(text)
            ends = list(itertools.accumulate(len(piece_bytes[i]) for i in ids))
            found.words += len(read.split())
            found.size += len(read.encode())
            found.ids.update(ids)
            found.ends.append(set(ends))
            found.exact += chat.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == read
        return found

    def numbers(self) -> dict[str, float]:
        """Tokens per word, bytes per token, distinct ids, and tokens."""
        tokens = self.ids.total()
        return {
            "tokens_per_word": tokens / max(self.words, 1),
            "bytes_per_token": self.size / max(tokens, 1),
            "distinct_ids": len(self.ids),
            "tokens": tokens,
        }


def unshared(before: Usage, after: Usage) -> tuple[int, int]:
    """How many boundaries between the tokens after are none between those before, and how many there are in all."""
    alone = sum(len(new - old) for old, new in zip(before.ends, after.ends, strict=True))
    return alone, sum(map(len, after.ends))


def first_change(before: Chat, after: Chat, texts: Iterable[str]) -> str | None:
    """The first text that the two tokenizers cut differently; None if there is none."""
    return next((text for text in texts if before.encode_text(text) != after.encode_text(text)), None)


def latin_words(texts: Iterable[str]) -> list[str]:
    """The distinct words with Latin letters and no others, in order. A word with marks of its own is none of them."""

    @functools.cache
    def fits(char: str) -> bool:
        kind = unicodedata.category(char)[0]
        return kind not in "LM" or (kind == "L" and unicodedata.name(char, "").startswith("LATIN "))

    words = {word for text in texts for word in unicodedata.normalize("NFC", text).split()}
    return sorted(word for word in words if all(map(fits, word)) and any(map(str.isalpha, word)))
