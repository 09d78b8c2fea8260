"""Where rows come from: files (Parquet, JSONL, CSV, plain text), folders, globs, datasets of the hub.

The same readers serve cached and streamed loading. They count rows within the file from 0, and pass on a row
that cannot be read with the reason, so that no row is lost in silence.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".txt": "text",
}
_KNOWN = "Parquet, JSONL, CSV or text files"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_SAMPLE = 100  # rows of a file without a schema that are read to learn its columns


@dataclass(frozen=True)
class Source:
    """A file, or a dataset of the Hugging Face hub."""

    name: str
    kind: str  # parquet, jsonl, csv, text or hub


@dataclass(frozen=True)
class RawRow:
    """A row as it was read; `reason` says why it could not be."""

    number: int
    values: dict[str, Any]
    reason: str = ""


def find_sources(value: str | list[str] | None, key: str) -> list[Source]:
    """The sources that a config value names, in a fixed order; ValueError names `key` and what is wrong."""
    if value is None:
        raise ValueError(f"{key} is not set: name a file, a folder, a glob or a dataset of the hub.")
    values = [value] if isinstance(value, str) else list(value)
    if not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"{key} is {value!r}: name a file, a folder, a glob, a dataset of the hub, or a list of them.")
    found = [source for one in values for source in _find(one, key)]
    twice = {source.name for source in found if found.count(source) > 1}
    if twice:
        raise ValueError(f"{key} names {sorted(twice)[0]} twice: each row would count double; leave one out.")
    return found


def _find(value: str, key: str) -> list[Source]:
    path = Path(value).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise ValueError(f"{key}: the folder {value} holds no {_KNOWN}.")
        return [_file(p) for p in files]
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{key}: {value} is of no known kind; give {_KNOWN} ({', '.join(SUFFIXES)}).")
        return [_file(path)]
    if glob.has_magic(value):
        pattern = str(path.relative_to(path.anchor))
        files = sorted(p for p in Path(path.anchor).glob(pattern) if p.is_file())
        unknown = [p for p in files if p.suffix.lower() not in SUFFIXES]
        if not files:
            raise ValueError(f"{key}: no file matches {value}.")
        if unknown:
            raise ValueError(f"{key}: {value} matches {unknown[0]}, which is none of {_KNOWN}; narrow the pattern.")
        return [_file(p) for p in files]
    if path.suffix.lower() in SUFFIXES or not _HUB_NAME.fullmatch(value):
        raise ValueError(f"{key}: {value} does not exist; name a file, a folder, a glob, or a dataset of the hub.")
    return [Source(value, "hub")]


def _file(path: Path) -> Source:
    return Source(str(path), SUFFIXES[path.suffix.lower()])


def source_columns(source: Source) -> list[str] | None:
    """The columns of a file, read cheaply (footer, header or first rows); None for a dataset of the hub.

    Opening the file is the check that it can be read: a truncated Parquet file has no footer.
    """
    if source.kind == "hub":
        return None
    if source.kind in ("jsonl", "text"):
        sample = list(itertools.islice(read_rows(source), _SAMPLE))
        names = list(dict.fromkeys(name for row in sample for name in row.values))
        if sample and not names:
            raise ValueError(f"{source.name} row 0: {sample[0].reason or 'row has no columns'}.")
        return names
    try:
        if source.kind == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(source.name) as file:
                return list(file.schema_arrow.names)
        with _open_csv(source.name) as file:
            return next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise unreadable(source, error) from error


def check_columns(source: Source, wanted: Mapping[str, str], remedy: str = "") -> None:
    """Refuses a source without the columns `wanted` (our name -> theirs); says which there are instead."""
    present = source_columns(source)
    if present is None:
        return
    if not present:
        raise ValueError(f"{source.name} has no rows: name a file that has some.")
    for ours, theirs in wanted.items():
        if theirs not in present:
            raise ValueError(
                f"{source.name} has no column {theirs}; it has {', '.join(present)}: "
                f"name the right one as {remedy or f'data.columns: {{{ours}: NAME}}'}."
            )


def unreadable(source: Source, error: Exception) -> ValueError:
    """One sentence for a file that cannot be read."""
    return ValueError(
        f"{source.name} cannot be read as {source.kind} ({_first_line(error)}): "
        "it is truncated, damaged or of another kind."
    )


def read_rows(
    source: Source, start: int = 0, columns: set[str] | None = None, streaming: bool = False
) -> Iterator[RawRow]:
    """The rows of a source from number `start` on.

    Args:
        source: What to read.
        start: Number of the first row wanted.
        columns: Of a Parquet file, only these are read, where they are there.
        streaming: Whether a dataset of the hub is read from there row by row, not downloaded first.
    """
    readers = {
        "parquet": _read_parquet,
        "jsonl": _read_jsonl,
        "csv": _read_csv,
        "text": _read_text,
        "hub": _read_hub,
    }
    reader = _read_hub_stream if streaming and source.kind == "hub" else readers[source.kind]
    try:
        yield from reader(source.name, start, columns)
    except (OSError, csv.Error) as error:
        raise unreadable(source, error) from error


def _read_parquet(path: str, start: int, columns: set[str] | None) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            wanted = [n for n in file.schema_arrow.names if columns is None or n in columns]
            number = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size <= start:  # a resumed stream skips what it has seen without reading it
                    number += size
                    continue
                for batch in file.iter_batches(1024, row_groups=[group], columns=wanted):
                    for row in _batch_rows(batch, number):
                        if row.number >= start:
                            yield row
                    number += batch.num_rows
    except pa.ArrowInvalid as error:
        raise unreadable(Source(path, "parquet"), error) from error


def _batch_rows(batch: Any, first: int) -> list[RawRow]:
    """The rows of a record batch. Text that is not UTF-8 loads in silence and fails only here, on access."""
    try:
        return [RawRow(first + i, values) for i, values in enumerate(batch.to_pylist())]
    except UnicodeDecodeError:
        rows = []
        for i in range(batch.num_rows):
            try:
                rows.append(RawRow(first + i, batch.slice(i, 1).to_pylist()[0]))
            except UnicodeDecodeError:
                rows.append(RawRow(first + i, {}, "text is not valid UTF-8"))
        return rows


def _read_jsonl(path: str, start: int, columns: set[str] | None) -> Iterator[RawRow]:
    """One object a line; a file that begins with `[` is one JSON array. Blank lines are no rows."""
    with Path(path).open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            file.seek(0)
            try:
                items = json.load(file)
            except ValueError as error:
                raise unreadable(Source(path, "jsonl"), error) from error
            for number, item in enumerate(items[start:], start):
                yield _json_row(number, item)
            return
        file.seek(0)
        lines = (line.lstrip(b"\xef\xbb\xbf") for line in file)
        for number, line in enumerate(line for line in lines if line.strip()):
            if number < start:
                continue
            try:
                item = json.loads(line)
            except UnicodeDecodeError:
                yield RawRow(number, {}, "text is not valid UTF-8")
            except ValueError as error:
                yield RawRow(number, {}, f"line is not valid JSON ({error})")
            else:
                yield _json_row(number, item)


def _json_row(number: int, item: object) -> RawRow:
    if isinstance(item, dict):
        return RawRow(number, item)
    return RawRow(number, {}, f"row is a JSON {type(item).__name__}, not an object")


def _read_csv(path: str, start: int, columns: set[str] | None) -> Iterator[RawRow]:
    """Every cell is text: an advisory that says 308 is no number, one that says NA is not missing."""
    csv.field_size_limit(1 << 30)  # the default of 128 KB cuts no advisory, but a long passage may pass it
    with _open_csv(path) as file:
        for number, values in enumerate(csv.DictReader(file)):
            if number < start:
                continue
            if None in values:
                yield RawRow(number, {}, "row has more cells than the header has columns")
            else:
                yield RawRow(number, dict(values))


def _open_csv(path: str) -> TextIO:
    # Bytes that are no UTF-8 become lone surrogates here, and a reason against their row where text is checked.
    return Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_text(path: str, start: int, columns: set[str] | None) -> Iterator[RawRow]:
    """One document a line; blank lines are no rows."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(line for line in file if line.strip()):
            if number < start:
                continue
            try:
                yield RawRow(number, {"text": line.decode("utf-8-sig").rstrip("\r\n")})
            except UnicodeDecodeError:
                yield RawRow(number, {}, "text is not valid UTF-8")


def hub_dataset(name: str, streaming: bool = False) -> Any:
    """`name` or `name:split` (train by default) of the Hugging Face hub."""
    from datasets import load_dataset

    dataset, _, split = name.partition(":")
    try:
        return load_dataset(dataset, split=split or "train", streaming=streaming)
    except Exception as error:  # the hub client raises its own classes, requests' and Python's
        raise ValueError(
            f"dataset {name} cannot be loaded from the Hugging Face hub ({_first_line(error)}): "
            "name a file that exists, or a dataset as NAME or NAME:SPLIT."
        ) from error


def _read_hub(name: str, start: int, columns: set[str] | None) -> Iterator[RawRow]:
    for number, values in enumerate(hub_dataset(name).skip(start), start):
        yield RawRow(number, dict(values))


def _read_hub_stream(name: str, start: int, columns: set[str] | None) -> Iterator[RawRow]:
    for number, values in enumerate(hub_dataset(name, streaming=True).skip(start), start):
        yield RawRow(number, dict(values))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
