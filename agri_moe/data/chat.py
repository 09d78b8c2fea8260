"""Chat rows as token ids with a segment for each token, and the same text as a jinja chat template.

    row -> render -> the text of a row
        -> encode -> its ids and segments     (what training sees)
        -> chat_template                      (what a server sees: the same bytes, the same ids)

Text can never become a control token: what stands between two control tokens is encoded by a private copy of
the tokenizer that splits every added token into plain pieces.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agri_moe.data.merges import PIECES_FILE, read_pieces, write_pieces

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

FORMAT_FILE = "chat_format.json"

Row = Mapping[str, Any]


class Segment(IntEnum):
    """What a token is part of. Prompt means SYSTEM or USER."""

    PAD = 0
    SYSTEM = 1
    USER = 2
    THOUGHT = 3
    ASSISTANT = 4


@dataclass(frozen=True)
class ChatFormat:
    """The strings that frame a row.

    Args:
        system: Marker before the instruction.
        user: Marker before the scenario.
        thought: Marker before the reasoning.
        assistant: Marker before the advisory.
        end: Marker after the advisory; generation stops there.
        scenario_header: Line between the user marker and the scenario.
        default_system: Instruction of the rows that bring none.
    """

    system: str = "<|system|>"
    user: str = "<|user|>"
    thought: str = "<|thought|>"
    assistant: str = "<|assistant|>"
    end: str = "<|endoftext|>"
    scenario_header: str = "स्थिति (Scenario):"
    default_system: str = "आप एक अनुभवी कृषि सलाहकार हैं; किसान की स्थिति पर पहले विचार करें और फिर हिंदी में स्पष्ट, सुरक्षित सलाह दें।"

    def __post_init__(self) -> None:
        markers = self.markers
        for name, marker in markers.items():
            if not marker or marker != marker.strip():
                raise ValueError(f"format.{name} is {marker!r}: a marker is text without space around it.")
        if len(set(markers.values())) < len(markers):
            raise ValueError(f"format: two markers are the same ({', '.join(markers.values())}); make them differ.")
        if not self.default_system.strip():
            raise ValueError("format.default_system is empty: give the instruction of rows that bring none.")

    @property
    def markers(self) -> dict[str, str]:
        """Name -> string of the five control tokens."""
        return {name: getattr(self, name) for name in ("system", "user", "thought", "assistant", "end")}


DEFAULT_FORMAT = ChatFormat()


class Encoded(NamedTuple):
    """A row as token ids, and the `Segment` of each."""

    input_ids: list[int]
    segment_ids: list[int]


class Answer(NamedTuple):
    """What a model said; `complete` when it closed every part and the text ended in the end marker."""

    thought: str | None
    advisory: str
    complete: bool


class Piece(NamedTuple):
    """The tokens of the text of one part, with those of the plain text around it that were encoded along.

    `spans` are the characters of each token, counted from the start of the text: what stands before it is negative.
    """

    segment: Segment
    text: str
    first: int  # where in the row the first of these tokens stands
    ids: list[int]
    spans: list[tuple[int, int]]


class _Part(NamedTuple):
    """A marker and the text up to the next marker: `MARKER \\n TEXT \\n`."""

    marker: str
    marker_segment: Segment
    newline_segment: Segment  # of the newline that follows the marker
    text: str
    text_segment: Segment  # of the text and the newline after it


class Chat:
    """A tokenizer and the format of its rows.

    The markers that the tokenizer lacks become added special tokens of it (the tokenizer given is changed).
    In Qwen3 they take free rows of the padded embedding, so the matrix does not grow.

    Args:
        tokenizer: A fast tokenizer of transformers.
        format: Markers, scenario header and default instruction.
        merged: Id of each token that joins several of another tokenizer's -> the ids of those (see `data/merges.py`):
            the last ids of the tokenizer, without a gap.

    Attributes:
        marker_ids: Name of a marker -> its id.
        control_ids: The ids of all markers, the end marker among them.
        new_marker_pieces: Id of a marker that the tokenizer lacked -> ids of its string as plain text, whose
            embeddings' mean is where the new row starts.
        merged: As given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        format: ChatFormat = DEFAULT_FORMAT,
        merged: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        from tokenizers import AddedToken

        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer {tokenizer.name_or_path} has no tokenizer.json: a fast tokenizer is needed.")
        self.tokenizer = tokenizer
        self.format = format
        vocabulary = tokenizer.get_vocab()
        missing = [marker for marker in format.markers.values() if marker not in vocabulary]
        # A marker that is there but not special (as </think> is in Qwen3) is made special too, so that
        # decoding with skip_special_tokens leaves out all five.
        tokenizer.add_tokens(
            [AddedToken(m, special=True, normalized=False) for m in format.markers.values()],
            special_tokens=True,
        )
        tokenizer.eos_token = format.end
        self.marker_ids: dict[str, int] = {
            name: tokenizer.convert_tokens_to_ids(marker) for name, marker in format.markers.items()
        }
        self.control_ids = frozenset(self.marker_ids.values())
        self.end_id = self.marker_ids["end"]
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = format.end
        self.pad_id: int = tokenizer.pad_token_id
        self._plain = without_added_tokens(tokenizer)
        self.merged: dict[int, tuple[int, ...]] = {token: tuple(pieces) for token, pieces in (merged or {}).items()}
        if self.merged and missing:
            raise ValueError(
                f"format: tokenizer {tokenizer.name_or_path} was extended by `tokens` with other markers than "
                f"{missing[0]}; extend it anew with these."
            )
        self.new_marker_pieces: dict[int, list[int]] = {
            tokenizer.convert_tokens_to_ids(marker): self._marker_pieces(marker) for marker in missing
        }
        self.chat_template = chat_template(format)
        tokenizer.chat_template = self.chat_template
        tokenizer.response_template = response_template(format)
        self._check_pieces()

    @classmethod
    def load(cls, tokenizer: str, format: ChatFormat | None = None) -> Chat:
        """Loads from a folder or by hub name; without `format`, the one saved there, or else the default."""
        from transformers import AutoTokenizer

        folder = Path(tokenizer).expanduser()
        if folder.exists() and not (folder / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer {tokenizer} has no tokenizer.json in it: name a folder with a fast tokenizer.")
        if not folder.exists() and (tokenizer.startswith((".", "/", "~")) or tokenizer.count("/") > 1):
            raise ValueError(f"tokenizer {tokenizer} does not exist: name a folder with a tokenizer, or a hub name.")
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(folder) if folder.exists() else tokenizer, trust_remote_code=False
            )
        except Exception as error:  # a dozen classes, from OSError to the Rust parser's bare Exception
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"tokenizer {tokenizer} cannot be loaded ({why}): name another folder or hub name."
            ) from error
        home = folder if folder.exists() else _fetched(tokenizer, folder)
        if format is None:
            saved = home / FORMAT_FILE
            format = _saved_format(saved) if saved.is_file() else DEFAULT_FORMAT
        return cls(loaded, format, read_pieces(home))

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer with the chat template, the end marker as eos, and the format."""
        self.tokenizer.save_pretrained(str(folder))
        text = json.dumps(dataclasses.asdict(self.format), ensure_ascii=False, indent=2)
        (Path(folder) / FORMAT_FILE).write_text(text + "\n", "utf-8")
        if self.merged:
            write_pieces(folder, self.merged)
            # TokenizersBackend, as version 5 writes, is unknown to transformers 4; both know this name of it.
            config = Path(folder) / "tokenizer_config.json"
            told = json.loads(config.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            config.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", "utf-8")

    @property
    def untrained_pieces(self) -> dict[int, list[int]]:
        """Id of every marker and merged token -> the ids whose rows' mean is where its own row starts, where needed."""
        markers = {i: self._marker_pieces(self.format.markers[name]) for name, i in self.marker_ids.items()}
        return markers | {token: list(pieces) for token, pieces in self.merged.items()}

    @functools.cached_property
    def token_bytes(self) -> list[int] | None:
        """Bytes of text of each token by its id, 0 of added ones; None unless the tokenizer is byte-level."""
        decoder = json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        if "ByteLevel" not in {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}:
            return None
        added = self.tokenizer.get_added_vocab()
        sizes = [0] * (1 + max(self.tokenizer.get_vocab().values()))
        for token, i in self.tokenizer.get_vocab().items():
            sizes[i] = 0 if token in added else len(token)  # a character of a byte-level token is a byte
        return sizes

    def normalized(self, text: str) -> str:
        """Text as the tokenizer reads it, before it cuts it up (Qwen's: NFC)."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def render(self, row: Row) -> str:
        """The text of a row, markers as their strings."""
        return "".join(f"{part.marker}\n{part.text}\n" for part in self._parts(row)) + self.format.end

    def messages(self, row: Row) -> list[dict[str, str]]:
        """The row as chat messages: `chat_template` renders them to the bytes of `render`."""
        system, scenario, thought, advisory = _fields(row, self.format)
        answer = {"role": "assistant", "content": advisory}
        if thought is not None:
            answer["reasoning_content"] = thought
        return [{"role": "system", "content": system}, {"role": "user", "content": scenario}, answer]

    def encode(self, row: Row) -> Encoded:
        """Token ids and segments of a row; ValueError says what is wrong with a row that cannot be used."""
        ids: list[int] = []
        segments: list[int] = []
        for part, piece in self._encoded_parts(row):
            ids.append(self.tokenizer.convert_tokens_to_ids(part.marker))
            segments.append(int(part.marker_segment))
            ids += piece.ids
            # Character 0 is the newline after the marker. A token that spans it and the text ends later, and
            # belongs to the text.
            segments += [int(part.text_segment if end > 1 else part.newline_segment) for _, end in piece.offsets]
        return Encoded([*ids, self.end_id], [*segments, int(Segment.ASSISTANT)])

    def pieces(self, row: Row) -> list[Piece]:
        """The same tokens without the markers, part by part, each with the characters it covers."""
        pieces: list[Piece] = []
        first = 1
        for part, piece in self._encoded_parts(row):
            spans = [(start - 1, end - 1) for start, end in piece.offsets]  # character 0 is the newline before
            pieces.append(Piece(part.text_segment, part.text, first, piece.ids, spans))
            first += len(piece.ids) + 1
        return pieces

    def encode_text(self, text: str) -> list[int]:
        """Plain text as ids, none of them an added token, whatever the text says."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _marker_pieces(self, marker: str) -> list[int]:
        """A marker as plain text, in tokens that are no merges."""
        return [piece for token in self.encode_text(marker) for piece in self.merged.get(token, (token,))]

    def encode_prompt(
        self, scenario: str | Mapping[str, Any], system: str | None = None, thought: bool = True
    ) -> list[int]:
        """The ids to generate from: they end in the thought marker and a newline, or in the assistant's."""
        system = usable_text("system", system) or self.format.default_system
        header = f"{self.format.scenario_header}\n{render_scenario(scenario)}"
        markers = self.marker_ids
        return [
            markers["system"],
            *self.encode_text(f"\n{system}\n"),
            markers["user"],
            *self.encode_text(f"\n{header}\n"),
            markers["thought" if thought else "assistant"],
            *self.encode_text("\n"),
        ]

    def parse(self, ids: Sequence[int], thought: bool = True) -> Answer:
        """Splits what was generated after `encode_prompt(..., thought=thought)` into thought and advisory."""
        ids = list(ids)
        ended = self.end_id in ids
        if ended:
            ids = ids[: ids.index(self.end_id)]
        marker = self.marker_ids["assistant"]
        if not thought:
            return Answer(None, self._read(ids), ended)
        if marker not in ids:
            return Answer(self._read(ids), "", False)
        split = ids.index(marker)
        return Answer(self._read(ids[:split]), self._read(ids[split + 1 :]), ended)

    def colored(self, input_ids: Sequence[int], segment_ids: Sequence[int]) -> str:
        """The tokens as text for a terminal: a colour for each segment, control tokens in reverse video."""
        runs: list[tuple[int, bool, list[int]]] = []
        for token, segment in zip(input_ids, segment_ids, strict=True):
            control = token in self.control_ids
            if runs and not control and runs[-1][:2] == (segment, False):
                runs[-1][2].append(token)  # a Hindi letter may take several tokens: decode whole runs
            else:
                runs.append((segment, control, [token]))
        return "".join(paint(self.tokenizer.decode(tokens), segment, control) for segment, control, tokens in runs)

    def _encoded_parts(self, row: Row) -> Iterator[tuple[_Part, Encoding]]:
        for part in self._parts(row):
            yield part, self._plain.encode(f"\n{part.text}\n", add_special_tokens=False)

    def _parts(self, row: Row) -> list[_Part]:
        """The segment rules, one line per part (see the design: prompt, thought, answer)."""
        system, scenario, thought, advisory = _fields(row, self.format)
        mark = self.format
        header = f"{mark.scenario_header}\n{scenario}"
        parts = [
            _Part(mark.system, Segment.SYSTEM, Segment.SYSTEM, system, Segment.SYSTEM),
            _Part(mark.user, Segment.USER, Segment.USER, header, Segment.USER),
        ]
        if thought is None:  # the generation prompt ends in the assistant marker and its newline
            return [*parts, _Part(mark.assistant, Segment.USER, Segment.USER, advisory, Segment.ASSISTANT)]
        return [
            *parts,
            _Part(mark.thought, Segment.USER, Segment.USER, thought, Segment.THOUGHT),
            _Part(mark.assistant, Segment.THOUGHT, Segment.ASSISTANT, advisory, Segment.ASSISTANT),
        ]

    def _read(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode([i for i in ids if i not in self.control_ids])).strip()

    def _check_pieces(self) -> None:
        """Refuses a tokenizer whose training ids are not serving ids, or whose text can become control."""
        name = self.tokenizer.name_or_path or "given"
        row = {
            "scenario": "फसल: धान (Paddy) 12.5 kg\n\n  पत्ती",
            "thought": "भूरे धब्बे ",
            "advisory": " छिड़काव: 2 g/l।",
        }
        whole = self.tokenizer.encode(self.render(row), add_special_tokens=False)
        if self.encode(row).input_ids != whole:
            raise ValueError(
                f"tokenizer {name} encodes text after a marker differently than inside a string (it adds "
                "a space or eats a newline): use a byte-level BPE tokenizer such as Qwen's or Llama 3's."
            )
        added = self.tokenizer.get_added_vocab()
        hidden = set(self.encode_text("\n".join(added))) & set(added.values())
        if hidden:
            names = ", ".join(sorted(token for token, i in added.items() if i in hidden))
            raise ValueError(f"tokenizer {name} turns the plain text of {names} into control tokens: use another.")


def _fetched(name: str, otherwise: Path) -> Path:
    """Where what `save` writes beside a tokenizer lies once it is fetched from the hub; `otherwise` if it has none."""
    from transformers.utils import cached_file

    try:
        files = [
            cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in (FORMAT_FILE, PIECES_FILE)
        ]
    except OSError as error:
        raise ValueError(f"tokenizer {name} cannot be loaded ({error}): try again, or name a folder.") from error
    return next((Path(file).parent for file in files if file is not None), otherwise)


def _saved_format(path: Path) -> ChatFormat:
    """The format that was saved with a tokenizer."""
    try:
        options = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: copy it from where the tokenizer was saved.") from error
    known = {field.name for field in dataclasses.fields(ChatFormat)}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise ValueError(f"{path} is no chat format: its keys are {', '.join(sorted(known))}.")
    wrong = [name for name, value in options.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is no text: copy it from where the tokenizer was saved.")
    return ChatFormat(**options)


def render_scenario(scenario: object) -> str:
    """A scenario as text: a string as it is, a struct one `key: value` line each without the empty fields."""
    if scenario is None:
        raise ValueError("scenario is missing")
    if not isinstance(scenario, Mapping):
        text = usable_text("scenario", scenario)
    else:
        for key, value in scenario.items():
            if value is not None and not isinstance(value, str | int | float | date):
                raise ValueError(
                    f"scenario.{shown(str(key))} is a {type(value).__name__}, not text, a number or a date"
                )
        text = usable_text(
            "scenario", "\n".join(f"{key}: {value}" for key, value in scenario.items() if value is not None)
        )
    if text is None:
        raise ValueError("scenario is empty")
    return text


def shown(text: str, width: int = 200) -> str:
    """What a file says, as part of a message: on one line, its control characters not obeyed, not too long."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= width else text[: width - 1] + "…"


def chat_template(format: ChatFormat) -> str:
    """The jinja template that renders messages to the bytes of `Chat.render`.

    Every tag trims both sides, so it does not depend on the environment's trim_blocks and lstrip_blocks.
    """

    def quote(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r") + "'"

    opening = {name: quote(f"{marker}\n") for name, marker in format.markers.items()}
    scenario = quote(f"{format.user}\n{format.scenario_header}\n")
    default = quote(format.default_system)
    return f"""\
{{%- if not messages or messages[0]['role'] != 'system' -%}}
  {{{{- {opening["system"]} + {default} + '\\n' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
  {{%- set content = message['content'] or '' -%}}
  {{%- if message['role'] == 'system' -%}}
    {{{{- {opening["system"]} + (content if content | trim else {default}) + '\\n' -}}}}
  {{%- elif message['role'] == 'user' -%}}
    {{{{- {scenario} + content + '\\n' -}}}}
  {{%- elif message['role'] == 'assistant' -%}}
    {{%- set thought = message['reasoning_content'] or '' -%}}
    {{%- if thought | trim -%}}
      {{{{- {opening["thought"]} + thought + '\\n' -}}}}
    {{%- endif -%}}
    {{{{- {opening["assistant"]} + content + '\\n' + {quote(format.end)} -}}}}
  {{%- else -%}}
    {{{{- raise_exception('role ' + message['role'] + ' is not system, user or assistant') -}}}}
  {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
  {{%- if enable_thinking is defined and not enable_thinking -%}}
    {{{{- {opening["assistant"]} -}}}}
  {{%- else -%}}
    {{{{- {opening["thought"]} -}}}}
  {{%- endif -%}}
{{%- endif -%}}"""


def response_template(format: ChatFormat) -> dict[str, Any]:
    """How an answer is taken apart again, for `tokenizer.parse_response` and `transformers serve`.

    Without it, servers of this model type look for `<think>` and find neither thought nor advisory.
    """
    thought, assistant = re.escape(format.thought), re.escape(format.assistant)
    return {
        "defaults": {"role": "assistant"},
        # The prompt ends in one of the two: the thought's marker opens its field, after the other all is content.
        "start_anchor_pattern": rf"(?={thought}\n\Z)|{assistant}\n\Z",
        "fields": {
            "reasoning_content": {"open": format.thought, "close": format.assistant, "content": "text"},
            "content": {"close": format.end, "content": "text"},
        },
    }


def _fields(row: Row, format: ChatFormat) -> tuple[str, str, str | None, str]:
    """System, scenario, thought and advisory of a row; ValueError with the reason when one cannot be used."""
    scenario = render_scenario(row.get("scenario"))
    if row.get("advisory") is None:
        raise ValueError("advisory is missing")
    advisory = usable_text("advisory", row["advisory"])
    if advisory is None:
        raise ValueError("advisory is empty")
    system = usable_text("system", row.get("system")) or format.default_system
    return system, scenario, usable_text("thought", row.get("thought")), advisory


def usable_text(name: str, value: object) -> str | None:
    """The value when it is text with something in it, None when it is blank; never anything else."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid UTF-8 text") from None
    return value if value.strip() else None


def without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the backend that splits every added token.

    Splitting special tokens is not enough: 12 of Qwen3's added tokens (`</think>`, ...) are not marked
    special, so each is added again as special first.
    """
    from tokenizers import AddedToken

    plain = copy.deepcopy(tokenizer.backend_tokenizer)
    plain.no_truncation()
    plain.no_padding()
    plain.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokenizer.get_added_vocab()]
    )
    plain.encode_special_tokens = True
    return plain


_COLORS = {
    Segment.PAD: "90",  # grey
    Segment.SYSTEM: "35",  # magenta
    Segment.USER: "36",  # cyan
    Segment.THOUGHT: "33",  # yellow
    Segment.ASSISTANT: "32",  # green
}


def paint(text: str, segment: int, control: bool) -> str:
    """Text in the colour of its segment for a terminal, a control token in reverse video."""
    code = _COLORS[Segment(segment)] + (";7" if control else "")
    # The data's own escape sequences are shown, not obeyed.
    return f"\x1b[{code}m{text.replace(chr(27), '␛')}\x1b[0m"
