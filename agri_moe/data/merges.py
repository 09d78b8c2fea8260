"""New pieces for a byte-level BPE tokenizer: learned as merges of the pieces that it has, and listed beside it.

    words, as the tokenizer cuts them -> MergeLearner -> merges: two pieces -> a new one
                                                      -> what each new piece is made of: pieces.json

Old merges come first and new ones after all of them: text is first cut as before, and its pieces are then joined. A
word is a tuple of ids throughout, and a piece's bytes are the UTF-8 that it stands for.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PIECES_FILE = "pieces.json"
_FORMAT = 1
_OFTEN = 2  # a pair that was seen once says nothing about the language

Word = tuple[int, ...]
Pair = tuple[int, int]


class Merge(NamedTuple):
    """Two pieces that stand side by side, and the piece that takes their place."""

    left: int
    right: int
    piece: int


# ---- which pieces may be


def piece_rule(script: str, whole_aksharas: bool = False) -> Callable[[bytes], bool]:
    """Whether bytes may become a piece: whole letters and marks of one script, after one space at most.

    Args:
        script: As Unicode names its characters, such as Devanagari or Tamil.
        whole_aksharas: Refuse a piece of several characters that begins with a mark (vowel sign, virama, nukta), and so
            cuts what is written as one sign; a mark alone may be a piece, for signs are built of it. Measured with
            Qwen3 on Hindi, 2,000 pieces: 2.8 tokens a word instead of 1.8, because its own pieces join a vowel sign to
            the first bytes of the next letter, and what such a piece begins can then not be joined to anything.
    """
    prefix = f"{script.upper()} "

    @functools.cache
    def of_script(char: str) -> bool:
        return unicodedata.category(char)[0] in "LM" and unicodedata.name(char, "").startswith(prefix)

    def allowed(piece: bytes) -> bool:
        """Whether it is whole characters of the script, after one space at most."""
        try:
            text = piece.decode("utf-8").removeprefix(" ")
        except UnicodeDecodeError:  # ends within a character
            return False
        if not text or not all(map(of_script, text)):
            return False
        return not (whole_aksharas and len(text) > 1 and unicodedata.category(text[0])[0] == "M")

    return allowed


# ---- learning


class MergeLearner:
    """Learns merges of the most frequent pairs, as byte pair encoding does, going on from pieces that are there.

    The trainer of the tokenizers library begins with characters, and drops the merges of the model that it trains:
    hence this one. A pair knows the words that it stands in, so that a merge recounts those and no others.

    Bytes that are a piece already are never merged a second time: the same old pieces are always joined in the same
    order, so a second way would be made of other old pieces, and a piece stands for one sequence of them: what a
    teacher without new pieces reads.

    Args:
        words: Word in old pieces -> how often it was seen.
        piece_bytes: Id -> bytes, of all old pieces.
        first_id: Id of the first new piece; the others follow it.
        allowed: Whether bytes may become a piece.

    Attributes:
        merges: In the order in which they are to be applied.
        pieces: Id of each new piece -> ids of the old pieces that it is made of.
        bytes: Id -> bytes, of old and new pieces.
        words: The words given, in their order, in the pieces that they are in now.
    """

    def __init__(
        self,
        words: Mapping[Word, int],
        piece_bytes: Mapping[int, bytes],
        first_id: int,
        allowed: Callable[[bytes], bool],
    ) -> None:
        self.merges: list[Merge] = []
        self.pieces: dict[int, Word] = {}
        self.bytes = dict(piece_bytes)
        self._first_id = first_id
        self._allowed = allowed
        self.words, self._weights = list(words), list(words.values())
        self._known = set(self.bytes.values())
        self._counts: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, set[int]] = defaultdict(set)
        self._heap: list[tuple[int, bytes, bytes, Pair]] = []
        self._refused: dict[Pair, bool] = {}
        for place in range(len(self.words)):
            self._count(place, 1)
        for pair in self._counts:
            self._offer(pair)

    def learn(self, pieces: int) -> Iterator[int]:
        """Yields the id of each new piece, until there are so many or no usable pair is left that was seen twice."""
        while len(self.pieces) < pieces and (pair := self._most_frequent()) is not None:
            yield self._merge(pair)

    def _most_frequent(self) -> Pair | None:
        """The pair seen most often; of equals the first by its bytes, left and then right."""
        while self._heap:
            count, left, right, pair = heapq.heappop(self._heap)
            if -count == self._counts[pair] and left + right not in self._known:  # else the count has changed since
                return pair
        return None

    def _merge(self, pair: Pair) -> int:
        """Makes a pair a piece, wherever it stands; the piece's id."""
        piece = self._first_id + len(self.pieces)
        self.bytes[piece] = self.bytes[pair[0]] + self.bytes[pair[1]]
        self._known.add(self.bytes[piece])
        self.pieces[piece] = tuple(old for part in pair for old in self.pieces.get(part, (part,)))
        self.merges.append(Merge(*pair, piece))
        changed: set[Pair] = set()
        for place in list(self._places[pair]):
            changed |= self._count(place, -1)
            self.words[place] = _joined(self.words[place], pair, piece)
            changed |= self._count(place, 1)
        for one in changed:
            self._offer(one)
        return piece

    def _count(self, place: int, sign: int) -> set[Pair]:
        """Counts the pairs of a word in (1) or out (-1), and returns them."""
        pairs = list(itertools.pairwise(self.words[place]))
        for pair in pairs:
            self._counts[pair] += sign * self._weights[place]
            if sign > 0:
                self._places[pair].add(place)
            else:
                self._places[pair].discard(place)
        return set(pairs)

    def _offer(self, pair: Pair) -> None:
        """Puts a pair with its present count where the most frequent is taken from, if it may become a piece."""
        left, right = self.bytes[pair[0]], self.bytes[pair[1]]
        if pair not in self._refused:
            self._refused[pair] = not self._allowed(left + right)
        if self._counts[pair] >= _OFTEN and not self._refused[pair]:
            heapq.heappush(self._heap, (-self._counts[pair], left, right, pair))


def _joined(word: Word, pair: Pair, piece: int) -> Word:
    """A word with a pair joined wherever it stands, from the left as the tokenizer does it."""
    joined: list[int] = []
    for one in word:
        if joined and (joined[-1], one) == pair:
            joined[-1] = piece
        else:
            joined.append(one)
    return tuple(joined)


# ---- the table beside the tokenizer


def write_pieces(folder: str | Path, pieces: Mapping[int, Word]) -> None:
    """Writes what new pieces are made of beside their tokenizer; without new pieces there is to be no file.

    Args:
        folder: The tokenizer's.
        pieces: Id of a new piece -> ids of the source tokenizer's pieces, in order.
    """
    path = Path(folder) / PIECES_FILE
    if not pieces:
        path.unlink(missing_ok=True)
        return
    lines = ",\n".join(f'  "{piece}": {json.dumps(list(made_of))}' for piece, made_of in sorted(pieces.items()))
    path.write_text(f'{{"format": {_FORMAT}, "pieces": {{\n{lines}\n}}}}\n', "utf-8")


def read_pieces(folder: str | Path) -> dict[int, Word]:
    """The table that `write_pieces` wrote: id of a new piece -> ids of what it is made of; empty if there is none.

    Raises:
        ValueError: In one sentence, for a file that is damaged or of another format.
    """
    path = Path(folder) / PIECES_FILE
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: write the tokenizer again with `tokens`.") from error
    if not isinstance(table, dict) or table.get("format") != _FORMAT or not isinstance(table.get("pieces"), dict):
        raise ValueError(f"{path} is no table of pieces of format {_FORMAT}: write the tokenizer again with `tokens`.")
    wrong = _wrong(table["pieces"])
    if wrong:
        raise ValueError(f"{path}: {wrong}: write the tokenizer again with `tokens`.")
    return {int(piece): tuple(made_of) for piece, made_of in table["pieces"].items()}


def _wrong(pieces: dict[str, Any]) -> str:
    """What is wrong with a table of pieces; empty if nothing is."""
    if not pieces:
        return "it lists no piece"
    # More digits than any id has: Python refuses to read very long numbers, with an error of its own.
    if not all(piece.isascii() and piece.isdecimal() and len(piece) < 10 for piece in pieces):
        return "a new piece is named by something else than its id"
    ids = [int(piece) for piece in pieces]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        return "the ids of new pieces do not follow one another"
    for piece, made_of in pieces.items():
        if not isinstance(made_of, list) or len(made_of) < 2 or not all(type(old) is int for old in made_of):
            return f"piece {piece} is not made of two ids or more"
        if not all(0 <= old < ids[0] for old in made_of):
            return f"piece {piece} is made of an id that does not stand before all new ones ({ids[0]})"
    return ""
