"""What the teacher reads of a row when that is not the student's ids, and which of its tokens are the student's.

    row -> the teacher's own chat template -> its ids
        -> for each of the student's tokens: where the teacher has the same token of the same content, or -1

Both models have one tokenizer, so the same text gives the same tokens, except beside the frame, where a token may take
in a newline that the other frame does not have there. Where the student's tokenizer has merges of the teacher's pieces
beside them (`merges.py`), one of its tokens is several of the teacher's, and the same row in the same form is read in
other ids.

As in `chat`, text can never become a control token: the template is rendered with placeholders once, and a row's texts
are put in their places as plain text. What stands between two control tokens is encoded as one piece, so that the ids
are those of the rendered string wherever the texts hold no control token.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from agri_moe.data.chat import Chat, ChatFormat, Piece, Row, Segment, without_added_tokens
from agri_moe.data.merged_tokens import same_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Texts = Mapping[Segment, str]


class TeacherRow(NamedTuple):
    """A row as the teacher reads it."""

    input_ids: list[int]
    tokens: list[int]  # for each of the student's tokens, the place in input_ids of the same one or its pieces, or -1
    answer: int  # tokens of the student that hold text the teacher is asked about: advisory, and in native thought
    aligned: int  # those of them that the teacher predicts too


@dataclass(frozen=True)
class TeacherView:
    """The teacher's own rendering of rows, or the student's in the teacher's tokens, aligned with the student's.

    With `native` the thought stands where the template puts reasoning (`reasoning_content`, as in Qwen3), or in
    `<think>` before the answer when the template knows no reasoning. With `no_thought` the answer follows whatever the
    template writes for an assistant that did not think (in Qwen3 an empty think block). With `same` it is the student's
    own rendering, markers included, in the tokens of the teacher; `of` tells whether those are others.

    Tokenizer and template are loaded when first needed; `check` does it at once.

    Args:
        source: Folder or hub name of the teacher (`model.teacher.source`), with its own tokenizer and, unless the view
            is `same`, chat template.
        view: Whether the teacher reads the thought.
        min_aligned: A row of whose answer a smaller share aligns is a bad row.
    """

    source: str
    view: Literal["same", "native", "no_thought"]
    min_aligned: float = 0.5

    def __post_init__(self) -> None:
        if self.view not in ("same", "native", "no_thought"):
            raise ValueError(f"model.teacher.view is {self.view!r}: it must be same, native or no_thought.")
        if not 0 <= self.min_aligned <= 1:
            raise ValueError(f"model.teacher.min_aligned is {self.min_aligned}: it must be between 0 and 1.")

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process loads a tokenizer of its own: a pickled one forgets to split added tokens.
        return TeacherView, (self.source, self.view, self.min_aligned)

    def of(self, chat: Chat) -> TeacherView | None:
        """This view, or None where the teacher reads just what `chat` writes.

        Raises:
            ValueError: If the tokenizers differ in more than merges, or cannot be aligned.
        """
        if self.view != "same":
            return self
        return self if self.lacks(chat) else None

    def lacks(self, chat: Chat) -> bool:
        """Whether the teacher's tokenizer lacks merged tokens that the student's has.

        Raises:
            ValueError: If it has some of them, or other ids for the rest, or the teacher brings no tokenizer.
        """
        if not chat.merged:
            return False
        theirs = self.chat(chat.format).tokenizer.get_vocab()
        ours = chat.tokenizer.get_vocab()
        known = [token for token, i in ours.items() if i in chat.merged and token in theirs]
        if len(known) == len(chat.merged):
            return False
        other = next((t for t, i in ours.items() if i not in chat.merged and theirs.get(t) != i), None)
        if known or other is not None:
            raise ValueError(
                f"data.tokenizer was extended from another tokenizer than that of model.teacher.source {self.source}, "
                f"which has {(known or [other])[0]!r} elsewhere or not at all: extend the teacher's with `tokens`."
            )
        return True

    def chat(self, format: ChatFormat) -> Chat:
        """The teacher's tokenizer with the markers of a format."""
        if format not in self._chats:
            folder = Path(self.source).expanduser()
            if folder.is_dir() and not (folder / "tokenizer.json").is_file():
                raise ValueError(
                    f"model.teacher.source {self.source} has no tokenizer.json: a student with merged tokens needs the "
                    "teacher's own."
                )
            self._chats[format] = Chat.load(self.source, format)
        return self._chats[format]

    @functools.cached_property
    def _chats(self) -> dict[ChatFormat, Chat]:
        return {}

    def check(self) -> None:
        """Raises a ValueError when the teacher has no chat template that this view can use."""
        if self.view != "same":
            _ = self._template

    def fingerprint(self, chat: Chat) -> str:
        """Changes when a row's ids or alignment may; `min_aligned` is applied afterwards."""
        if self.view == "same":
            text = self.chat(chat.format).tokenizer.backend_tokenizer.to_str()
            return hashlib.sha256(repr((text, chat.merged)).encode()).hexdigest()
        return self._template.fingerprint

    def encode(self, chat: Chat, row: Row) -> TeacherRow:
        """The teacher's ids of a row, aligned with those of `chat.encode(row)`.

        Raises:
            ValueError: With the reason, if the row cannot be used or the template does more to its texts than strip.
        """
        pieces = chat.pieces(row)
        asked = {Segment.ASSISTANT} if self.view == "no_thought" else {Segment.THOUGHT, Segment.ASSISTANT}
        tokens = [-1] * (pieces[-1].first + len(pieces[-1].ids) + 1)
        if self.view == "same":
            ids = self._same(chat, row, pieces, tokens)
        else:
            prompt = {Segment.SYSTEM, Segment.USER}
            ids, theirs = self._template.encode({p.segment: p.text for p in pieces if p.segment in prompt | asked})
            match = _same_bytes if chat.merged else _same_tokens
            for ours in pieces:
                if ours.segment in theirs:
                    for i, j in match(chat, ours, theirs[ours.segment]).items():
                        tokens[ours.first + i] = j
        answer = aligned = 0
        for ours in pieces:
            if ours.segment in asked:
                held = [
                    i for i, (start, end) in enumerate(ours.spans, ours.first) if start < len(ours.text) and end > 0
                ]
                answer += len(held)
                aligned += sum(tokens[i] > 0 for i in held)  # nothing predicts the teacher's first token
        return TeacherRow(ids, tokens, answer, aligned)

    def _same(self, chat: Chat, row: Row, pieces: Sequence[Piece], tokens: list[int]) -> list[int]:
        """The ids of the student's own rendering in the teacher's tokens; fills in where each of the student's is."""
        theirs = self.chat(chat.format)
        for ours, other in zip(pieces, theirs.pieces(row), strict=True):
            tokens[ours.first - 1] = other.first - 1  # the markers
            for i, j in same_bytes(ours.ids, other.ids, chat.merged, _token_bytes(chat)).items():
                tokens[ours.first + i] = other.first + j
        tokens[-1] = other.first + len(other.ids)
        return theirs.encode(row).input_ids

    @functools.cached_property
    def _template(self) -> _Template:
        assert self.view != "same", "which has no template of its own"
        return _Template(self.source, self.view)


class _Read(NamedTuple):
    """A text of a row as it stands in what the teacher reads."""

    piece: Piece  # its tokens, with those of the plain text around it
    kept: tuple[int, int]  # range of its characters that is there
    before: str  # what stands before it in the run of plain text that was encoded


def _same_tokens(_: Chat, ours: Piece, theirs: _Read) -> dict[int, int]:
    return same_tokens(ours, theirs.piece, theirs.kept)


def _same_bytes(chat: Chat, ours: Piece, theirs: _Read) -> dict[int, int]:
    """As `same_tokens`, where tokens of ours are merges."""

    def size(text: str) -> int:
        return len(chat.normalized(text).encode())

    first, last = (size(ours.text[:end]) for end in theirs.kept)
    found = same_bytes(
        *(ours.ids, theirs.piece.ids, chat.merged, _token_bytes(chat)),
        begins=(1, size(theirs.before) - first),  # after the newline that follows a marker
        kept=(first, last),
    )
    return {i: theirs.piece.first + j for i, j in found.items()}


def _token_bytes(chat: Chat) -> list[int]:
    assert chat.token_bytes is not None, "`tokens` extends byte-level tokenizers only"
    return chat.token_bytes


def same_tokens(ours: Piece, theirs: Piece, kept: tuple[int, int]) -> dict[int, int]:
    """The place of a token in our piece -> the place in their row of the same token of the same characters.

    Tokens match when id and characters are equal and nothing but these characters' own bytes can differ before them:
    several tokens may share a character (Hindi is nearly byte level), so one that begins inside a character matches
    only after the one before it did. `kept` is the range of the text that stands in their row.
    """
    places = {key: j for j, key in enumerate(_numbered(theirs.spans))}
    matched: dict[int, int] = {}
    for i, key in enumerate(_numbered(ours.spans)):
        start, end, _ = key
        j = places.get(key)
        if j is None or ours.ids[i] != theirs.ids[j] or start < kept[0] or end > kept[1]:
            continue
        if matched.get(i - 1) == j - 1 or (_begins_anew(ours.spans, i) and _begins_anew(theirs.spans, j)):
            matched[i] = j
    return {i: theirs.first + j for i, j in matched.items()}


def _numbered(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Each span with the count of equal ones before it."""
    seen: Counter[tuple[int, int]] = Counter()
    numbered = []
    for span in spans:
        numbered.append((*span, seen[span]))
        seen[span] += 1
    return numbered


def _begins_anew(spans: Sequence[tuple[int, int]], i: int) -> bool:
    """Whether a token begins with a character that the token before it has no part in."""
    return i == 0 or spans[i - 1][1] <= spans[i][0]


class _Frame(NamedTuple):
    """What a template writes around the texts of a row."""

    segments: list[Segment]  # the texts, in their order
    between: list[str]  # what stands before the first, between them and after the last
    items: list[int | list[str | Segment]]  # the same as control tokens, and runs of plain text with texts in them


class _Template:
    """A teacher's tokenizer and chat template, taken apart."""

    def __init__(self, source: str, view: str) -> None:
        self.source, self.view = source, view
        self.tokenizer = _load_tokenizer(source, view)
        self._plain = without_added_tokens(self.tokenizer)
        self._added = frozenset(self.tokenizer.get_added_vocab().values())
        self._writes_reasoning = True
        quick = (Segment.SYSTEM, Segment.USER, Segment.ASSISTANT)
        thinking = (Segment.SYSTEM, Segment.USER, Segment.THOUGHT, Segment.ASSISTANT)
        if view == "native":
            self._writes_reasoning = _mark(Segment.THOUGHT) in self._render_marks(thinking)
        kinds = [quick, thinking] if view == "native" else [quick]
        self._frames = {kind: self._frame(kind) for kind in kinds}
        for kind in kinds:
            self._check_ids(kind)

    @property
    def fingerprint(self) -> str:
        """Hash of all that ids and alignment come from; some templates write the date."""
        frames = [frame.between for frame in self._frames.values()]
        parts = (self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.view, frames)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def encode(self, texts: Texts) -> tuple[list[int], dict[Segment, _Read]]:
        """The ids of a row; of each text its tokens, and the range of its characters that the template keeps."""
        frame = self._frames[tuple(sorted(texts))]
        kept = _kept(self._render(texts), frame.between, [texts[segment] for segment in frame.segments])
        if kept is None:
            raise ValueError(f"the chat template of {self.source} changes more of it than the space around its texts")
        ranges = dict(zip(frame.segments, kept, strict=True))
        ids: list[int] = []
        found: dict[Segment, _Read] = {}
        for item in frame.items:
            if isinstance(item, int):
                ids.append(item)
                continue
            strings = [part if isinstance(part, str) else texts[part][slice(*ranges[part])] for part in item]
            encoded = self._plain.encode("".join(strings), add_special_tokens=False)
            begins = itertools.accumulate(map(len, strings), initial=0)
            for part, begin in zip(item, begins, strict=False):
                if not isinstance(part, str):
                    shift = ranges[part][0] - begin  # from characters of the run to those of the text
                    spans = [(start + shift, end + shift) for start, end in encoded.offsets]
                    piece = Piece(part, texts[part], len(ids), encoded.ids, spans)
                    found[part] = _Read(piece, ranges[part], "".join(strings)[:begin])
            ids += encoded.ids
        return ids, found

    def _messages(self, texts: Texts) -> list[dict[str, str]]:
        thought, content = texts.get(Segment.THOUGHT, ""), texts[Segment.ASSISTANT]
        if thought and not self._writes_reasoning:
            content = f"<think>\n{thought}\n</think>\n\n{content}"
        # An empty thought is said: where it is missing, Qwen3's template looks for `</think>` in the advisory.
        reasoning = {"reasoning_content": thought if self._writes_reasoning else ""}
        return [
            {"role": "system", "content": texts[Segment.SYSTEM]},
            {"role": "user", "content": texts[Segment.USER]},
            {"role": "assistant", "content": content, **reasoning},
        ]

    def _render(self, texts: Texts) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(self._messages(texts), tokenize=False))
        except Exception as error:  # a template is a program: it raises what it likes
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"the chat template of {self.source} refuses it ({why})") from error

    def _render_marks(self, kind: Sequence[Segment]) -> str:
        try:
            return self._render({segment: _mark(segment) for segment in kind})
        except ValueError as error:
            raise ValueError(
                f"model.teacher.view {self.view} needs a template for system, user and assistant, but {error}; "
                "use view: same."
            ) from error

    def _frame(self, kind: Sequence[Segment]) -> _Frame:
        rendered = self._render_marks(kind)
        between: list[str] = []
        items: list[int | list[str | Segment]] = []
        for segment in kind:
            before, mark, rendered = rendered.partition(_mark(segment))
            if not mark or _mark(segment) in rendered:
                raise ValueError(
                    f"model.teacher.view {self.view}: the chat template of {self.source} does not write the "
                    f"{segment.name.lower()} text of a row once and in its place; use view: same."
                )
            between.append(before)
            self._add_text(items, before)
            _add_plain(items, segment)
        self._add_text(items, rendered)
        return _Frame(list(kind), [*between, rendered], items)

    def _add_text(self, items: list[int | list[str | Segment]], text: str) -> None:
        """Adds text of the template to a frame's items, its control tokens recognised."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        at = 0
        controls = [
            (token, span)
            for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if token in self._added
        ]
        for token, (start, end) in [*controls, (None, (len(text), len(text)))]:
            if start > at:
                _add_plain(items, text[at:start])
            if token is not None:
                items.append(token)
            at = end

    def _check_ids(self, kind: Sequence[Segment]) -> None:
        """Refuses a template around which text is encoded differently than inside the rendered string."""
        texts = {segment: f"फसल: धान (Paddy) 12.5 kg\n\n  पत्ती {segment}।" for segment in kind}
        whole = self.tokenizer.apply_chat_template(self._messages(texts), tokenize=True)["input_ids"]
        try:
            ids, _ = self.encode(texts)
        except ValueError as error:
            raise ValueError(f"model.teacher.view {self.view} cannot read a row: {error}; use view: same.") from error
        if ids != list(whole):
            raise ValueError(
                f"model.teacher.view {self.view}: the tokenizer of {self.source} encodes text after a control token "
                "of its template differently than inside a string; use view: same."
            )


def _add_plain(items: list[int | list[str | Segment]], part: str | Segment) -> None:
    """Adds plain text, or the place of one, to the run that a frame's items end in."""
    if items and isinstance(items[-1], list):
        items[-1].append(part)
    else:
        items.append([part])


def _mark(segment: Segment) -> str:
    """A placeholder that no template has of its own; it never meets a row's text."""
    return f"\ue000{int(segment)}\ue001"


def _kept(rendered: str, between: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]] | None:
    """Which characters of each text a rendering holds, if it strips the texts and does nothing else to them."""
    if not rendered.startswith(between[0]):
        return None
    at, kept = len(between[0]), []
    for text, after in zip(texts, between[1:], strict=True):
        fits = ((a, b) for a, b in _stripped(text) if rendered.startswith(text[a:b] + after, at))
        found = next(fits, None)
        if found is None:
            return None
        kept.append(found)
        at += found[1] - found[0] + len(after)
    return kept if at == len(rendered) else None


def _stripped(text: str) -> dict[tuple[int, int], None]:
    """The ranges that a text, stripped of newlines or of all space on either side or both, can be."""
    begins = (0, len(text) - len(text.lstrip("\n")), len(text) - len(text.lstrip()))
    ends = (len(text), len(text.rstrip("\n")), len(text.rstrip()))
    return dict.fromkeys((begin, end) for begin in begins for end in ends)


def _load_tokenizer(source: str, view: str) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer as it is: `Chat.load` would put our template in the place of its own."""
    from transformers import AutoTokenizer

    needs = f"model.teacher.view {view} needs a chat template, and model.teacher.source {source}"
    folder = Path(source).expanduser()
    if folder.exists() and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{needs} has no tokenizer.json in it: name a folder with a tokenizer, or use view: same.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else source, trust_remote_code=False)
    except Exception as error:  # a dozen classes, from OSError to the Rust parser's bare Exception
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{needs} has no tokenizer that can be loaded ({why}); use view: same.") from error
    if not tokenizer.chat_template:
        raise ValueError(f"{needs} has none; use view: same.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{needs} has no fast tokenizer; use view: same.")
    return tokenizer
