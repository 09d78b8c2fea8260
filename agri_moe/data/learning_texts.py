"""Text that new pieces are learned from: lines of any files that training reads, and those that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agri_moe.data.chat import shown, usable_text
from agri_moe.data.merges import piece_rule
from agri_moe.data.sources import RawRow, Source, find_sources, read_rows, source_columns

_COLUMNS = ("scenario", "thought", "advisory", "system", "text")


@dataclass(frozen=True)
class LearningTexts:
    """Lines, each once however often it stands in the files: rows repeat whole passages.

    Args:
        learn: Line -> how often it counts.
        held_out: Lines that are not learned from.
        counted: What the held-out lines are, in words.
        inputs: Name, lines, bytes and times of each input.
    """

    learn: dict[str, int]
    held_out: list[str]
    counted: str
    inputs: list[dict[str, Any]]

    def told(self) -> dict[str, Any]:
        """The same in numbers, for a report."""
        size = sum(one["bytes"] for one in self.inputs)
        return {"lines": len(self.learn), "bytes": size, "inputs": self.inputs}

    def check_script(self, script: str) -> None:
        """Refuses texts without a letter of the script, as ValueError."""
        allowed = piece_rule(script)
        for lines, key in ((self.learn, "--input"), (self.held_out, "what is held out of --input, or --validation")):
            if not any(allowed(char.encode("utf-8")) for char in set().union(*lines)):
                raise ValueError(f"{key} has no letter of the script {script}: give text of the language, or --script.")


def read_texts(
    inputs: Sequence[str], validation: str | Sequence[str] | None, held_out: float, column: str | None, balance: bool
) -> LearningTexts:
    """Reads all lines and holds some out.

    Args:
        inputs: What `data.train` takes, each.
        validation: Lines to be held out instead of a share of the inputs.
        held_out: That share, by a hash of the line: at least one line is held out, and one learned from.
        column: Column of the text; None for those of a chat row, and `text`.
        balance: Let each input count as often as brings it nearest to the largest one.

    Raises:
        ValueError: In one sentence, for what cannot be read or holds too little.
    """
    find_sources(list(inputs), "--input")  # a file that is named twice is refused
    seen: set[str] = set()
    by_input = {one: [line for line in _lines([one], "--input", column) if _first(line, seen)] for one in inputs}
    if validation:
        named = [validation] if isinstance(validation, str) else list(validation)
        out = dict.fromkeys(_lines(named, "--validation", column))
        counted = ", ".join(named)
    else:
        out = dict.fromkeys(_held_out([line for lines in by_input.values() for line in lines], held_out))
        counted = f"{held_out:.0%} of the lines, held out"
    by_input = {one: [line for line in lines if line not in out] for one, lines in by_input.items()}
    sizes = {one: sum(len(line.encode("utf-8")) for line in lines) for one, lines in by_input.items()}
    if not any(sizes.values()) or not out:
        raise ValueError("--input or --validation has no text that is not in the other: give more text.")
    times = {one: round(max(sizes.values()) / size) if balance and size else 1 for one, size in sizes.items()}
    return LearningTexts(
        {line: times[one] for one, lines in by_input.items() for line in lines},
        list(out),
        counted,
        [{"name": one, "lines": len(by_input[one]), "bytes": sizes[one], "times": times[one]} for one in inputs],
    )


def read_lines(inputs: Sequence[str], key: str) -> list[str]:
    """All lines of files of text, or of the texts of rows, in their order; `key` names the setting in messages.

    Raises:
        ValueError: In one sentence, for what cannot be read, or holds no line.
    """
    lines = list(_lines(inputs, key, None))
    if not lines:
        raise ValueError(f"{key} {', '.join(inputs)} has no text.")
    return lines


def _first(line: str, seen: set[str]) -> bool:
    """Whether a line is seen for the first time."""
    new = line not in seen
    seen.add(line)
    return new


def _held_out(lines: Sequence[str], share: float) -> list[str]:
    """The lines whose hash is below the share; neither none nor all of them."""
    if len(lines) < 2:
        raise ValueError(f"--input holds {len(lines)} line of text: give more, or --validation FILES.")
    place = {line: int.from_bytes(hashlib.sha256(line.encode("utf-8")).digest()[:8], "big") / 2**64 for line in lines}
    ordered = sorted(place.values())
    limit = min(max(share, ordered[0]), ordered[-2])
    return [line for line in lines if place[line] <= limit]


def _lines(inputs: Sequence[str], key: str, column: str | None) -> Iterator[str]:
    """The lines of all texts of all files, without blank ones."""
    for source in find_sources(list(inputs), key):
        columns = _columns(source, column)
        for row in read_rows(source, columns=columns):
            try:
                texts = list(_texts(row, columns))
            except ValueError as error:
                raise ValueError(f"{source.name} row {row.number}: {error}.") from error
            yield from (line.strip() for text in texts for line in text.splitlines() if line.strip())


def _columns(source: Source, column: str | None) -> set[str]:
    """The columns to read of a source."""
    wanted = set(_COLUMNS) if column is None or source.kind == "text" else {column}
    present = source_columns(source)
    if present is None or wanted & set(present):
        return wanted
    names = column or ", ".join(_COLUMNS)
    raise ValueError(
        f"{source.name} has no column {names}; it has {shown(', '.join(present))}: name one with --text_column."
    )


def _texts(row: RawRow, columns: set[str]) -> Iterator[str]:
    """The texts of a row. Of a scenario with fields only what they say: their names stand in every row alike."""
    if row.reason:
        raise ValueError(row.reason)
    for name in sorted(columns & row.values.keys()):
        value = row.values[name]
        for part in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(part, Mapping | list):
                raise ValueError(f"{name} is a {type(value).__name__}, not text")
            if part is not None and (text := usable_text(name, part if isinstance(part, str) else str(part))):
                yield text
