"""The passes of `select` over its files: score every row, choose, copy the chosen ones, write them in order.

    Selection.score   any number of tasks   shards -> WORK/scores: what is kept of each row, and its signature
    Selection.choose  one task              -> WORK/wanted: which rows of which shard, and where in the output
    Selection.copy    any number of tasks   shards -> WORK/pieces: the chosen rows, in parts of the output
    Selection.finish  one task              pieces -> the output, part by part

Tasks meet in the folder WORK alone and are told which of how many they are, so an engine for many machines (datatrove,
a SLURM array) runs them as `select` does with its own processes: docs/selecting.md. Memory holds RECORD for every row
while rows are chosen, and otherwise a few tens of megabytes for each process, whatever the corpus.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agri_moe.data.chat import render_scenario, usable_text
from agri_moe.data.selection import BANDS, RECORD, Array, Choice, Fate, Rule, choose
from agri_moe.data.selection_output import (
    ADDED,
    PART,
    PLACE,
    Pieces,
    UnusableError,
    output_schema,
    part_batches,
    read_batch,
    read_json,
    replacing,
    write_json,
)
from agri_moe.data.selection_scoring import (
    LISTED,
    Batch,
    Found,
    Score,
    content_hash,
    load_scorer,
    row_content,
)
from agri_moe.data.sources import (
    RawRow,
    Shard,
    Source,
    check_columns,
    find_shards,
    find_sources,
    of_each,
    read_rows,
    read_shard,
    source_columns,
)

Tell = Callable[[int], None]
"""Is told how many rows have been read since it was last told."""

CHAT, TEXT = ("scenario", "thought", "advisory"), ("text",)
NO_VALUE = "(none)"
EXAMPLES = 5
EXCERPT = 600  # characters of an example
_SAMPLE = 100  # rows of each input that are looked at before anything else
_BATCH_TEXT, _BATCH_ROWS = 1 << 17, 512  # characters, rows: arrays that stay in the processor's cache


@dataclass(frozen=True)
class Selection:
    """What is read, how it is scored and chosen, and where it goes.

    Args:
        input: As `data.train` takes it.
        output: Parquet file.
        work: Folder in which the tasks meet; on many machines a folder that all of them see.
        rule: Budget, allocation, what counts as a repeat.
        columns: Our column -> the one in the files. `text` makes rows of plain text, scenario, thought and advisory
            make chat rows; by default whichever are there.
        group_by: Columns, or struct.field.
        tokenizer: Folder or hub name; by default that of `model`.
        score_by: Entropy of the tokens or of their pairs, or the mean entropy or loss of a model's predictions.
        model: For the last two: an exported folder, a checkpoint or a hub name.
        device: Where the model runs; `auto` takes a GPU if there is one.
        bad_rows: What a row that cannot be used does: `error` stops, `skip` leaves it out.
        seed: Of the hash that settles ties, and draws where rows are drawn.
    """

    input: str | list[str]
    output: str
    work: str
    rule: Rule
    columns: Mapping[str, str] = field(default_factory=dict)
    group_by: tuple[str, ...] = ()
    tokenizer: str | None = None
    score_by: Score = "unigram"
    model: str | None = None
    device: str = "auto"
    bad_rows: Literal["error", "skip"] = "error"
    seed: int = 0

    @functools.cached_property
    def sources(self) -> list[Source]:
        """The files and hub datasets that are read."""
        return find_sources(self.input, "--input")

    @functools.cached_property
    def shards(self) -> list[Shard]:
        """Their parts, which tasks share out."""
        return find_shards(self.sources)

    # ------------------------------------------------------------------ before anything is read

    def check(self) -> None:
        """Raises a ValueError on missing columns and groups, having read a few rows."""
        wanted = {name: self.columns.get(name, name) for name in self.required}
        remedy = "--columns '{\"" + self.required[-1] + '": "NAME"}\''
        of_each(self.sources, functools.partial(check_columns, wanted=wanted, remedy=remedy))
        top = {name: name.split(".")[0] for name in self.group_by}
        of_each(self.sources, functools.partial(check_columns, wanted=top, remedy="--group_by NAME"))
        for name in self.group_by:
            if not any(_has(row.values, name) for source in self.sources for row in islice(read_rows(source), _SAMPLE)):
                raise ValueError(f"--group_by {name}: no row has such a value; name a column, or struct.field.")

    @functools.cached_property
    def text_columns(self) -> tuple[str, ...]:
        """Ours that make up a row's text."""
        if unknown := sorted(set(self.columns) - {*CHAT, *TEXT}):
            raise ValueError(f"--columns names {unknown[0]}, which is no column of ours: {', '.join(CHAT + TEXT)}.")
        if "text" in self.columns:
            return TEXT
        if self.columns:
            return CHAT
        first = self.sources[0]
        present = source_columns(first)
        if present is None:
            present = [name for row in islice(read_rows(first), 1) for name in row.values]
        for columns, needed in ((CHAT, {"scenario", "advisory"}), (TEXT, {"text"})):
            if needed <= set(present):
                return columns
        raise ValueError(
            f"{first.name} has neither scenario and advisory nor text; it has {', '.join(present)}: name the right one "
            'as --columns \'{"text": "NAME"}\'.'
        )

    @property
    def required(self) -> tuple[str, ...]:
        """Those that every row must have."""
        return tuple(name for name in self.text_columns if name != "thought")

    # ------------------------------------------------------------------ pass 1

    def score(self, _: Any = None, rank: int = 0, world_size: int = 1, tell: Tell | None = None) -> None:
        """Scores the rows of every `world_size`-th shard, from number `rank` on."""
        for number in range(rank, len(self.shards), world_size):
            self._score_shard(number, tell or _nothing)

    def _score_shard(self, number: int, tell: Tell) -> None:
        try:
            scorer = load_scorer(self.tokenizer, self.score_by, self.model, self.device)
        except ValueError as error:
            raise UnusableError(str(error)) from error
        found = Found(self._folder("scores"), number)
        for batch in self._batches(number, found):
            ids_N, lengths_R, scores_R = scorer(batch.texts)
            found.add(batch, ids_N, lengths_R, scores_R, self.seed)
            tell(len(batch.texts))
        found.write()

    def _batches(self, number: int, found: Found) -> Iterator[Batch]:
        """The usable rows of a shard, a few at a time."""
        batch, size = Batch([], [], [], [], []), 0
        for ordinal, raw in enumerate(_rows(self.shards[number])):
            try:
                text, group = self._text(raw), self._group(raw)
            except ValueError as error:
                if self.bad_rows == "error":
                    raise UnusableError(
                        f"{self.shards[number].source.name} row {raw.number}: {error}; rows count from 0: mend the "
                        "row, or give --bad_rows skip."
                    ) from error
                found.reject(f"{self.shards[number].source.name} row {raw.number}: {error}")
                continue
            content = row_content(raw.values)
            found.see(raw.values)
            batch.ordinals.append(ordinal)
            batch.texts.append(text)
            batch.groups.append(group)
            batch.hashes.append(content_hash(content))
            batch.sizes.append(len(content))
            size += len(text)
            if size >= _BATCH_TEXT or len(batch.texts) == _BATCH_ROWS:
                yield batch
                batch, size = Batch([], [], [], [], []), 0
        if batch.texts:
            yield batch

    def _text(self, raw: RawRow) -> str:
        """The text of a row that is scored; ValueError with the reason against it."""
        if raw.reason:
            raise ValueError(raw.reason)
        parts = []
        for name in self.text_columns:
            value = raw.values.get(self.columns.get(name, name))
            part = render_scenario(value) if name == "scenario" else usable_text(name, value)
            if part is None and name in self.required:
                raise ValueError(f"{name} is missing or empty")
            parts.append(part)
        return "\n".join(part for part in parts if part is not None)

    def _group(self, raw: RawRow) -> str:
        names = []
        for path in self.group_by:
            value: Any = raw.values
            for part in path.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, dict | list):
                raise ValueError(f"{path} is a {type(value).__name__}, which is no name of a group")
            names.append(usable_text(path, None if value is None else str(value)) or NO_VALUE)
        return " · ".join(names) or "all"

    # ------------------------------------------------------------------ choice

    def choose(self, _: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Chooses among all rows that have been scored, and tells each shard what of it is wanted."""
        if rank:
            return
        scored = self._scored()
        signed = np.zeros((BANDS, 0), np.uint64)
        if 0 < self.rule.near < 1 and len(scored.records):
            signed = self._signatures(scored)
        if not len(scored.records):
            raise UnusableError("--input holds no row that can be used: name files that have some.")
        choice = choose(scored.records, signed, scored.groups, self.rule)
        if not len(choice.order):
            raise UnusableError(
                f"none of the {len(scored.records):,} rows was chosen: {(choice.fates == Fate.GARBLED).sum():,} are "
                f"noise, and none of the rest fits into a budget of {choice.budget:,} {self.rule.unit}: give a larger "
                "--budget, or --damp false."
            )
        examples = _examples(scored.records, choice)
        self._tell_shards(scored, choice, examples)
        summary = summarise(scored, choice, examples)
        write_json(Path(self.work) / "summary.json", summary)

    def _scored(self) -> Scored:
        """What all tasks of the first pass have left."""
        facts = [read_json(self._folder("scores") / f"{n:06}.json") for n in range(len(self.shards))]
        groups = sorted({name for fact in facts for name in fact["groups"]})
        index = {name: i for i, name in enumerate(groups)}
        parts, owners = [np.zeros(0, RECORD)], [np.zeros(0, np.int32)]
        for number, fact in enumerate(facts):
            ours = np.array([index[name] for name in fact["groups"]], np.int32)
            for block in range(fact["blocks"]):
                part = np.load(self._folder("scores") / f"{number:06}-{block:04}.records.npy")
                part["group"] = ours[part["group"]]
                parts.append(part)
                owners.append(np.full(len(part), number, np.int32))
        return Scored(np.concatenate(parts), np.concatenate(owners), groups, facts)

    def _signatures(self, scored: Scored) -> Array:
        """[B, R] on disk, band by band: only what repeats is looked at more than once."""
        path = Path(self.work) / "signatures.npy"
        signed = np.lib.format.open_memmap(path, "w+", np.uint64, (BANDS, len(scored.records)))
        start = 0
        for number, fact in enumerate(scored.facts):
            for block in range(fact["blocks"]):
                part = np.load(self._folder("scores") / f"{number:06}-{block:04}.signatures.npy")
                signed[:, start : start + part.shape[1]] = part
                start += part.shape[1]
        signed.flush()
        del signed
        return np.load(path, mmap_mode="r")

    def _tell_shards(self, scored: Scored, choice: Choice, examples: Mapping[str, Array]) -> None:
        """Writes, for every shard, which rows of it go where."""
        order = choice.order
        ends = np.cumsum(scored.records["bytes"][order].astype(np.int64))
        starts = np.flatnonzero(np.diff(ends // PART, prepend=-1))  # parts of the output hang on its rows alone
        place = np.full(len(scored.records), -1, np.int64)
        place[order] = np.arange(len(order))
        part = np.searchsorted(starts, place, side="right") - 1
        example = np.zeros(len(place), bool)
        for rows in examples.values():
            example[rows] = True
        needed = np.flatnonzero((place >= 0) | example)
        bounds = np.searchsorted(scored.owners[needed], np.arange(len(self.shards) + 1))
        for number in range(len(self.shards)):
            rows = needed[bounds[number] : bounds[number + 1]]
            records = scored.records[rows]
            with replacing(self._folder("wanted") / f"{number:06}.npz") as path, path.open("wb") as file:
                np.savez(
                    file, row=rows, ordinal=records["ordinal"], place=place[rows], part=part[rows], hash=records["row"],
                    score=choice.scores[rows], tokens=records["tokens"], group=records["group"], example=example[rows],
                )  # fmt: skip

    # ------------------------------------------------------------------ pass 2

    def copy(self, _: Any = None, rank: int = 0, world_size: int = 1, tell: Tell | None = None) -> None:
        """Copies the chosen rows of every `world_size`-th shard, from number `rank` on."""
        groups = [group["name"] for group in read_json(Path(self.work) / "summary.json")["groups"]]
        for number in range(rank, len(self.shards), world_size):
            self._copy_shard(number, groups, tell or _nothing)

    def _copy_shard(self, number: int, groups: list[str], tell: Tell) -> None:
        wanted = np.load(self._folder("wanted") / f"{number:06}.npz")
        pieces = Pieces(self._folder("pieces"), number, self.shards[number].source)
        texts: dict[int, str] = {}
        ordinals, at, read = wanted["ordinal"], 0, 0
        columns = {
            name: wanted[name] for name in ("row", "place", "part", "hash", "score", "tokens", "group", "example")
        }
        for ordinal, raw in enumerate(_rows(self.shards[number]) if len(ordinals) else ()):
            read += 1
            if read == _BATCH_ROWS:
                tell(read)
                read = 0
            if at == len(ordinals) or ordinal < ordinals[at]:
                continue
            one = {name: column[at].item() for name, column in columns.items()}
            if content_hash(content := row_content(raw.values)) != one["hash"]:
                break
            at += 1
            if one["example"]:
                texts[one["row"]] = _excerpt(self._text(raw))
            if one["place"] >= 0:
                added = (one["score"], one["tokens"], groups[one["group"]])
                values = raw.values | dict(zip(ADDED, added, strict=True)) | {PLACE: one["place"]}
                pieces.add(values, one["part"], len(content))
        tell(read)
        if at < len(ordinals):
            raise UnusableError(f"{self.shards[number].source.name} has changed since it was scored: run select again.")
        pieces.flush()
        write_json(self._folder("pieces") / f"{number:06}.json", {"files": pieces.files, "examples": texts})

    def finish(self, _: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Puts the pieces in order into the output, which is there whole or not at all."""
        if rank:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        facts = [read_json(self._folder("pieces") / f"{n:06}.json") for n in range(len(self.shards))]
        seen = [read_json(self._folder("scores") / f"{n:06}.json")["shapes"] for n in range(len(self.shards))]
        files = [self._folder("pieces") / name for fact in facts for name in fact["files"]]
        by_part, schemas = part_batches(files)
        schema = output_schema(schemas, seen)
        Path(self.output).parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(Path(self.output)) as path,
            pq.ParquetWriter(path, schema, compression="zstd") as writer,
        ):
            for part in sorted(by_part):
                tables = [read_batch(path, batch) for path, batch in by_part[part]]
                table = pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")
                writer.write_table(table.sort_by(PLACE).select(schema.names).cast(schema))
        summary = read_json(Path(self.work) / "summary.json")
        texts = {int(row): text for fact in facts for row, text in fact["examples"].items()}
        for rows in summary["examples"].values():
            for row in rows:
                row["text"] = texts[row.pop("row")]
        write_json(Path(self.work) / "summary.json", summary)

    def _folder(self, name: str) -> Path:
        folder = Path(self.work) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _rows(shard: Shard) -> Iterator[RawRow]:
    try:
        yield from read_shard(shard)
    except ValueError as error:
        raise UnusableError(str(error)) from error


def _has(values: Mapping[str, Any], path: str) -> bool:
    here: Any = values
    for part in path.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True


def _nothing(rows: int) -> None:
    """Nobody asked how far it is."""


# ---------------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Scored:
    """All usable rows; `owners` [R] are the shards they stand in, `facts` what else each of these told."""

    records: Array
    owners: Array
    groups: list[str]
    facts: list[dict[str, Any]]


def _examples(records: Array, choice: Choice) -> dict[str, Array]:
    """Rows from both ends of what was chosen, and what was damped and left out most."""
    order = choice.order[np.lexsort((records["text"][choice.order], -choice.scores[choice.order]))]
    by_score = np.lexsort((records["text"], -choice.scores))
    ends = {"highest": order[:EXAMPLES], "lowest": order[::-1][:EXAMPLES]}
    below = by_score[choice.fates[by_score] == Fate.BEYOND_BUDGET]
    repeated = np.lexsort((records["text"], -records["repetition"]))
    garbled = by_score[choice.fates[by_score] == Fate.GARBLED]
    near = by_score[choice.fates[by_score] == Fate.NEAR_REPEAT]
    return ends | {
        "last": below[::-1][:EXAMPLES],
        "damped": repeated[records["repetition"][repeated] > 0][:EXAMPLES],
        "near": near[:EXAMPLES],
        "garbled": garbled[:EXAMPLES],
    }


def summarise(scored: Scored, choice: Choice, examples: Mapping[str, Array]) -> dict[str, Any]:
    """The numbers of a selection, for its report."""
    records, tokens = scored.records, scored.records["tokens"].astype(np.int64)
    chosen = choice.fates == Fate.CHOSEN

    def per_group(mask: Array, weights: Array | None = None) -> list[float]:
        part = None if weights is None else weights[mask]
        found = np.bincount(records["group"][mask], weights=part, minlength=len(scored.groups))
        return [float(value) for value in found]

    everything = np.ones(len(records), bool)
    columns = {
        "name": scored.groups,
        "rows": per_group(everything),
        "tokens": per_group(everything, tokens),
        "repeats": per_group((choice.fates == Fate.REPEAT) | (choice.fates == Fate.NEAR_REPEAT)),
        "garbled": per_group(choice.fates == Fate.GARBLED),
        "chosen_rows": per_group(chosen),
        "chosen_tokens": per_group(chosen, tokens),
        "score": per_group(everything, choice.scores),
        "chosen_score": per_group(chosen, choice.scores),
    }
    groups = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    listed = [
        {
            "row": int(row),
            "score": float(choice.scores[row]),
            "tokens": int(tokens[row]),
            "repetition": float(records["repetition"][row]),
            "group": scored.groups[records["group"][row]],
            "fate": Fate(int(choice.fates[row])).name,
        }
        for rows in examples.values()
        for row in rows
    ]
    texts = iter(listed)
    return {
        "rows": len(records),
        "tokens": int(tokens.sum()),
        "bad": sum(fact["bad"] for fact in scored.facts),
        "rejected": [reason for fact in scored.facts for reason in fact["rejected"]][:LISTED],
        "fates": {fate.name: int((choice.fates == fate).sum()) for fate in Fate},
        "damped": int((records["repetition"] > 0.1).sum()),
        "budget": choice.budget,
        "left": choice.left,
        "chosen_tokens": int(tokens[chosen].sum()),
        "groups": groups,
        "histograms": {
            "score": _histogram(choice.scores, chosen),
            "tokens": _histogram(np.log10(np.maximum(tokens, 1)), chosen),
        },
        "examples": {name: list(islice(texts, len(rows))) for name, rows in examples.items()},
    }


def _histogram(values: Array, chosen: Array) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(values, 60)
    counts = {"all": np.histogram(values, edges)[0], "chosen": np.histogram(values[chosen], edges)[0]}
    return {"edges": edges.tolist()} | {name: found.tolist() for name, found in counts.items()}


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]} … ({len(text):,} characters)"


def check_output(inputs: list[str], output: Path, overwrite: bool) -> None:
    """Refuses an output that is there, is no Parquet file, or would be read as input; ValueError names it."""
    if output.suffix != ".parquet":
        raise ValueError(f"--output {output} does not end in .parquet: it will be a Parquet file.")
    place = output.absolute().resolve()
    for name in inputs:
        read = Path(name).absolute().resolve()
        if place == read or read in place.parents or place.match(str(read)):
            raise ValueError(f"--output {output} is in --input {name}: name a file outside of what is read.")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; name another file, or give --overwrite true.")


def parse_budget(budget: str, unit: str) -> tuple[int, float | None]:
    """A number of rows or tokens, or a share such as 10%; ValueError says what would be right."""
    text = str(budget).replace(",", "").replace("_", "").strip()
    if re.fullmatch(r"\d+", text) and int(text):
        return int(text), None
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text)) and 0 < float(match[1]) <= 100:
        return 0, float(match[1]) / 100
    raise ValueError(f"--budget is {budget}: give a number of {unit} of at least 1, or a share such as 10%.")


# ---------------------------------------------------------------------- several processes of one machine


def select_rows(selection: Selection, num_proc: int = 1, progress: bool = True) -> dict[str, Any]:
    """All passes, in processes of this machine.

    Args:
        selection: What to do; `work` is the folder in which a temporary one is made.
        num_proc: Processes that read and score; 1 is this process, where the tokenizer takes all cores.
        progress: Whether to show a bar.

    Returns:
        The numbers of the selection, as `summarise` gives them, with the texts of its examples.

    Raises:
        ValueError: If a file, row or setting is wrong.
    """
    with tempfile.TemporaryDirectory(prefix=".select-", dir=selection.work) as work:
        here = replace(selection, work=work)
        try:
            _pass(here, "score", num_proc, progress)
            here.choose()
            _pass(here, "copy", num_proc, progress)
            here.finish()
        except UnusableError as error:  # out of another process it has lost where it was raised
            raise ValueError(str(error)) from error
        return read_json(Path(work) / "summary.json")


def _pass(selection: Selection, name: Literal["score", "copy"], num_proc: int, progress: bool) -> None:
    """One task for each shard, the largest first, and a bar that counts rows."""
    from tqdm import tqdm

    sizes = np.array([shard.size for shard in selection.shards])
    order = np.argsort(-sizes, kind="stable").tolist()
    words = {"score": "scoring", "copy": "copying"}
    with tqdm(desc=words[name], unit=" rows", disable=not progress) as bar:
        if min(num_proc, len(order)) <= 1:
            for rank in order:
                getattr(selection, name)(None, rank, len(order), bar.update)
            return
        context = get_context("spawn")
        counter, stop = context.Value("q", 0), context.Event()
        given = (selection, name, counter, stop)
        with ProcessPoolExecutor(min(num_proc, len(order)), context, _begin, given) as pool:
            waiting = {pool.submit(_task, rank, len(order)) for rank in order}
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                bar.update(counter.value - bar.n)
                for future in done:
                    if future.exception() is not None:
                        stop.set()
                        pool.shutdown(cancel_futures=True)
                    future.result()


_given: tuple[Selection, str, Any, Any]


def _begin(*given: Any) -> None:
    """In a process of the pool: what all its tasks have in common."""
    global _given
    _given = given
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores already


def _task(rank: int, world_size: int) -> None:
    selection, name, counter, stop = _given

    def tell(rows: int) -> None:
        if stop.is_set():
            raise UnusableError("another process has found what ends the selection")
        with counter.get_lock():
            counter.value += rows

    getattr(selection, name)(None, rank, world_size, tell)
