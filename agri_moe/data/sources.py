"""Where rows come from: files (Parquet, JSONL, CSV, plain text), folders, globs, datasets of the hub.

Files may lie on this machine or behind any URL that fsspec opens (s3://, gs://, hf://, https://, ...); credentials are
where fsspec looks for them. The same readers serve cached and streamed loading. They count rows within the file from 0,
and pass on a row that cannot be read with the reason, so that no row is lost in silence.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from agri_moe.data.chat import shown

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".txt": "text",
}
_KNOWN = "Parquet, JSONL, CSV or text files"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_BUFFER = 1 << 20  # bytes; a file behind a URL is slow to ask line by line
_AT_ONCE = 16  # files opened at a time: a store far away answers late, but many at once
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_SAMPLE = 100  # rows of a file without a schema that are read to learn its columns


@dataclass(frozen=True)
class Source:
    """A file, or a dataset of the Hugging Face hub."""

    name: str
    kind: str  # parquet, jsonl, csv, text or hub


@dataclass(frozen=True)
class Shard:
    """A part of a source that can be read without the rest of it.

    Args:
        source: What it is a part of.
        part: Which row group of a Parquet file, or which shard of a hub dataset; any other file is one shard, 0.
        size: Bytes (of a row group, before compression); 1 where they are not known.
    """

    source: Source
    part: int = 0
    size: int = 1


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
    if value.startswith("file://"):
        value = fsspec.core.strip_protocol(value)
    what, names = _list_url(value, key) if _URL.match(value) else _list_path(value)
    known = [name for name in names if _suffix(name) in SUFFIXES]
    if what == "folder":
        if not known:
            raise ValueError(f"{key}: the folder {value} holds no {_KNOWN}.")
        return [_file(name) for name in known]
    if what == "file":
        if not known:
            raise ValueError(f"{key}: {value} is of no known kind; give {_KNOWN} ({', '.join(SUFFIXES)}).")
        return [_file(name) for name in known]
    if what == "glob":
        unknown = [name for name in names if name not in known]
        if not names:
            raise ValueError(f"{key}: no file matches {value}.")
        if unknown:
            raise ValueError(f"{key}: {value} matches {unknown[0]}, which is none of {_KNOWN}; narrow the pattern.")
        return [_file(name) for name in known]
    if _suffix(value) in SUFFIXES or not _HUB_NAME.fullmatch(value):
        raise ValueError(f"{key}: {value} does not exist; name a file, a folder, a glob, or a dataset of the hub.")
    return [Source(value, "hub")]


def _list_path(value: str) -> tuple[str, list[str]]:
    """What a value is on this machine (folder, file, glob or nothing), and the files that it names."""
    path = Path(value).expanduser()
    if path.is_dir():
        return "folder", [str(p) for p in sorted(path.rglob("*")) if p.is_file()]
    if path.is_file():
        return "file", [str(path)]
    if glob.has_magic(value):
        pattern = str(path.relative_to(path.anchor))
        return "glob", [str(p) for p in sorted(Path(path.anchor).glob(pattern)) if p.is_file()]
    return "nothing", []


def _list_url(value: str, key: str) -> tuple[str, list[str]]:
    """The same for a URL."""
    if "::" in value:
        raise ValueError(f"{key}: {value} chains file systems; name the files as they lie in one, as s3://bucket/path.")
    try:
        files, path = fsspec.core.url_to_fs(value)
        if glob.has_magic(path):
            what, found = "glob", [name for name, info in files.glob(path, detail=True).items() if _is_file(info)]
        elif not files.exists(path):
            return "nothing", []
        elif files.isdir(path):
            what, found = "folder", files.find(path)
        else:
            what, found = "file", [path]
        return what, sorted(files.unstrip_protocol(name) for name in found)
    except ImportError as error:
        raise ValueError(
            f"{key}: {value} needs a package that is not here ({_first_line(error)}): add it, or copy the rows."
        ) from error
    except Exception as error:  # every file system raises classes of its own
        raise ValueError(
            f"{key}: {value} cannot be looked up ({_first_line(error)}): see that the name is right, and that this "
            "machine may read it."
        ) from error


def _is_file(info: Mapping[str, Any]) -> bool:
    return bool(info["type"] == "file")


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _file(name: str) -> Source:
    return Source(name, SUFFIXES[_suffix(name)])


def file_stamp(name: str) -> object:
    """What changes when a file does: its place, size and time of change, or what its store says of it."""
    if _URL.match(name):
        files, path = fsspec.core.url_to_fs(name)
        return files.ukey(path)
    stat = Path(name).stat()
    return str(Path(name).resolve()), stat.st_size, stat.st_mtime_ns


_Found = TypeVar("_Found")


def of_each(sources: Sequence[Source], ask: Callable[[Source], _Found]) -> list[_Found]:
    """What `ask` says of each source, many asked at a time; raises what it raises of the first that it refuses."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, sources))


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
    with _telling(source):
        if source.kind == "parquet":
            with _open_parquet(source.name) as file:
                return list(file.schema_arrow.names)
        with _open_csv(source.name) as file:
            return next(csv.reader(file), [])


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
                f"{source.name} has no column {theirs}; it has {shown(', '.join(present))}: "
                f"name the right one as {remedy or f'data.columns: {{{ours}: NAME}}'}."
            )


def unreadable(source: Source, error: Exception) -> ValueError:
    """One sentence for a file that cannot be read."""
    return ValueError(
        f"{source.name} cannot be read as {source.kind} ({_first_line(error)}): "
        "it is truncated, damaged or of another kind."
    )


@contextlib.contextmanager
def _telling(source: Source) -> Iterator[None]:
    """Says of an error that is about the file which file it is."""
    try:
        yield
    except Exception as error:
        import pyarrow as pa

        about_the_file = isinstance(error, (OSError, csv.Error, UnicodeError, pa.ArrowException))
        # A store that is asked over the network raises classes of its own.
        if about_the_file or (_URL.match(source.name) and not isinstance(error, ValueError)):
            raise unreadable(source, error) from error
        raise


def read_rows(source: Source, start: int = 0, columns: set[str] | None = None) -> Iterator[RawRow]:
    """The rows of a source from number `start` on.

    Args:
        source: What to read.
        start: Number of the first row wanted.
        columns: Of a Parquet file, only these are read, where they are there.
    """
    readers = {
        "parquet": _read_parquet,
        "jsonl": _read_jsonl,
        "csv": _read_csv,
        "text": _read_text,
        "hub": _read_hub,
    }
    with _telling(source):
        yield from readers[source.kind](source.name, start, columns)


def find_shards(sources: Sequence[Source]) -> list[Shard]:
    """The shards of the sources that hold rows, in order; of Parquet files only the footers are read."""
    return list(itertools.chain.from_iterable(of_each(sources, _shards)))


def _shards(source: Source) -> list[Shard]:
    if source.kind == "hub":
        return [Shard(source, part) for part in range(hub_dataset(source.name, streaming=True).num_shards)]
    with _telling(source):
        if source.kind == "parquet":
            with _open_parquet(source.name) as file:
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                return [Shard(source, i, group.total_byte_size) for i, group in enumerate(groups) if group.num_rows]
        files, path = fsspec.core.url_to_fs(source.name)
        size = files.size(path)
        return [] if size == 0 else [Shard(source, 0, size or 1)]


def read_shard(shard: Shard, start: int = 0, columns: set[str] | None = None) -> Iterator[RawRow]:
    """The rows of a shard from number `start` on, and nothing else of its source, as far as that can be.

    Of a Parquet file one row group is held in memory at most, and only the columns asked for; rows keep their number
    in the file. Rows of a hub dataset are counted within the shard.
    """
    with _telling(shard.source):
        if shard.source.kind == "parquet":
            yield from _read_parquet(shard.source.name, start, columns, shard.part)
        elif shard.source.kind == "hub":
            yield from _read_hub_shard(shard.source.name, start, shard.part)
        else:
            yield from read_rows(shard.source, start, columns)


def _read_parquet(path: str, start: int, columns: set[str] | None, only: int | None = None) -> Iterator[RawRow]:
    """The rows of all row groups, or of one."""
    with _open_parquet(path) as file:
        wanted = [n for n in file.schema_arrow.names if columns is None or n in columns]
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if only not in (None, group) or number + size <= start:  # skipped without reading it
                number += size
                continue
            for batch in file.iter_batches(1024, row_groups=[group], columns=wanted):
                for row in _batch_rows(batch, number):
                    if row.number >= start:
                        yield row
                number += batch.num_rows


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    if not _URL.match(path):
        with pq.ParquetFile(path) as parquet:
            yield parquet
        return
    # Arrow knows which bytes it wants, and asks for those of a row group together; a cache would fetch others too.
    with _open_url(path, cache_type="none") as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
        yield parquet


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
    with _open(path) as file:
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


def _open_csv(path: str) -> io.TextIOWrapper:
    # Bytes that are no UTF-8 become lone surrogates here, and a reason against their row where text is checked.
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _open(path: str) -> BinaryIO:
    if not _URL.match(path):
        return Path(path).open("rb")
    return cast(BinaryIO, io.BufferedReader(_open_url(path), _BUFFER))


def _open_url(path: str, **options: str) -> Any:
    files, name = fsspec.core.url_to_fs(path)
    file = files.open(name, "rb", **options)
    # memory:// has one position for all who read a file.
    return io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else file


def _read_text(path: str, start: int, columns: set[str] | None) -> Iterator[RawRow]:
    """One document a line; blank lines are no rows."""
    with _open(path) as file:
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


def _read_hub_shard(name: str, start: int, part: int) -> Iterator[RawRow]:
    dataset = hub_dataset(name, streaming=True)
    for number, values in enumerate(dataset.shard(dataset.num_shards, part).skip(start), start):
        yield RawRow(number, dict(values))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return shown(text.splitlines()[0].rstrip(".:")) if text else type(error).__name__
