"""What `select` writes: pieces left by many tasks, put together in order as one Parquet file, whole or not at all.

The output falls into parts of some 16 MB, whose bounds hang on the chosen rows alone. A piece holds rows of one shard,
in a batch for each part.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agri_moe.data.sources import Source

ADDED = ("selection_score", "selection_tokens", "selection_group")
PART = 16 << 20  # characters of a part of the output, and of what a copying process holds
PLACE = "__place__"


class UnusableError(ValueError):
    """A row or file that ends the selection; its text is for the user."""


class Pieces:
    """The chosen rows of a shard, written whenever there are enough, each part of the output in a batch of its own."""

    def __init__(self, folder: Path, number: int, source: Source) -> None:
        self.files: list[str] = []
        self._folder, self._number, self._source = folder, number, source
        self._schema = _parquet_schema(source) if source.kind == "parquet" else None
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._size = 0

    def add(self, values: dict[str, Any], part: int, size: int) -> None:
        """Take a row of this size in bytes."""
        self._rows.append((part, values))
        self._size += size
        if self._size >= PART:
            self.flush()

    def flush(self) -> None:
        """Write the rows in hand."""
        if not self._rows:
            return
        import pyarrow as pa

        self._rows.sort(key=lambda row: row[0])
        parts = np.array([part for part, _ in self._rows])
        table = self._table([values for _, values in self._rows])
        starts = np.flatnonzero(np.diff(parts, prepend=-1))
        table = table.replace_schema_metadata({"parts": json.dumps(parts[starts].tolist())})
        name = f"{self._number:06}-{len(self.files):04}.arrow"
        with pa.OSFile(str(self._folder / name), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
                for batch in table.slice(start, end - start).combine_chunks().to_batches():
                    writer.write_batch(batch)
        self.files.append(name)
        self._rows, self._size = [], 0

    def _table(self, rows: list[dict[str, Any]]) -> Any:
        """As the file types its columns, or as Arrow makes them out."""
        import pyarrow as pa

        ours = {ADDED[0]: pa.float32(), ADDED[1]: pa.int32(), ADDED[2]: pa.string(), PLACE: pa.int64()}
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ours))
        types = {} if self._schema is None else {field.name: field.type for field in self._schema}
        try:
            arrays = [_array([row.get(name) for row in rows], types.get(name)) for name in names]
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise UnusableError(
                f"{self._source.name}: a column cannot be written ({str(error).splitlines()[0]}): give it values of "
                "one type, or leave it out."
            ) from error
        arrays += [pa.array([row[name] for row in rows], kind) for name, kind in ours.items()]
        return pa.table(arrays, names=[*names, *ours])


def _array(values: list[Any], kind: Any | None) -> Any:
    """Values of one type; where no file tells it, the order of rows must not decide in which order fields stand."""
    import pyarrow as pa

    array = pa.array(values, kind)
    ordered = array.type if kind is not None else _by_name(array.type)
    return array if ordered.equals(array.type) else pa.array(values, ordered)


def _by_name(kind: Any) -> Any:
    """The type with the fields of all its structs in the order of their names."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = [field.with_type(_by_name(field.type)) for field in kind]
        return pa.struct(sorted(fields, key=lambda field: field.name))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_by_name(kind.value_type)))
    return kind


def _parquet_schema(source: Source) -> Any:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(source.name, "rb") as file:
        return pq.read_schema(file)


def part_batches(files: Iterable[Path]) -> tuple[dict[int, list[tuple[Path, int]]], list[Any]]:
    """Part of the output -> the batches that hold its rows; and the schemas of all files."""
    import pyarrow as pa

    by_part: dict[int, list[tuple[Path, int]]] = {}
    schemas = []
    for path in files:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
        schemas.append(schema.remove_metadata())
        for batch, part in enumerate(json.loads(schema.metadata[b"parts"])):
            by_part.setdefault(part, []).append((path, batch))
    return by_part, schemas


def read_batch(path: Path, number: int) -> Any:
    """A batch of a piece, as a table."""
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as file:
        return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(number)]).replace_schema_metadata(None)


def output_schema(schemas: list[Any], shapes: list[dict[str, list[list[str]]]]) -> Any:
    """The columns of all pieces, in the order of the rows' own where they agree, by name where they do not.

    The pieces differ with the number of processes, the rows do not: so it is the rows that decide.
    """
    import pyarrow as pa

    if not schemas:
        return pa.schema([])
    try:
        each = sorted(set(schemas), key=lambda schema: schema.serialize().to_pybytes())
        unified = pa.unify_schemas(each, promote_options="permissive")
    except pa.ArrowException as error:
        raise UnusableError(
            f"--input: the columns of its files do not fit together ({str(error).splitlines()[0]}): give a column one "
            "type in all of them."
        ) from error
    orders: dict[str, set[tuple[str, ...]]] = {}
    for shape in shapes:
        for name, found in shape.items():
            orders.setdefault(name, set()).update(map(tuple, found))

    def ordered(name: str, fields: Iterable[str]) -> list[str]:
        known = next(iter(orders[name])) if len(orders.get(name, ())) == 1 else ()
        return sorted(fields, key=lambda field: (known.index(field) if field in known else len(known), field))

    fields = []
    for name in [*ordered("", set(unified.names) - {*ADDED, PLACE}), *ADDED]:
        field = unified.field(name)
        if len({schema.field(name).type for schema in each if name in schema.names}) > 1:
            field = field.with_type(_by_name(field.type))
        if pa.types.is_struct(field.type) and name in orders:
            by_name = {inner.name: inner for inner in field.type}
            field = field.with_type(pa.struct([by_name[inner] for inner in ordered(name, by_name)]))
        fields.append(field)
    return pa.schema(fields)


# ---------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file that takes the place of the one named when all has gone well."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file that says that what stands before it has been done."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
