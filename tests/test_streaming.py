"""Streams: each rank its own shards, exact totals, a place that resumes exactly, and files behind URLs."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from test_packing import check_epoch, fake_trainer, made_row, made_rows, stream_of, write_numbers
from tiny import write_tokenizer

from agri_moe.data import sources, streaming
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.packing import PackedRows, step_loader
from agri_moe.data.rows import Rejected
from agri_moe.data.sources import Shard, Source, find_shards, find_sources, read_shard
from agri_moe.data.streaming import Cursor, Offer, StreamSampler, row_id
from agri_moe.data.text_data import TextDataModule

COUNT = 97
ROWS = made_rows(COUNT)
Batches = list[dict[str, torch.Tensor]]


class Meeting:
    """Ranks as threads of one process, which hand their offers round as gloo would."""

    def __init__(self, ranks: int) -> None:
        self.offers: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks)

    def of(self, rank: int) -> Callable[[Offer, int], list[Offer]]:
        def agree(offer: Offer, ranks: int) -> list[Offer]:
            self.offers[rank] = offer
            self.barrier.wait(60)
            everyone = list(self.offers)
            self.barrier.wait(60)
            return everyone

        return agree

    def run(self, job: Callable[[int], Any]) -> list[Any]:
        """What the job gives for each rank."""

        def one(rank: int) -> Any:
            try:
                return job(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.offers)) as pool:
            return list(pool.map(one, range(len(self.offers))))


@pytest.fixture
def uneven(tmp_path: Path) -> list[Source]:
    """Row groups of 7, a file of 40 rows and one of 3."""
    return [
        write_numbers(tmp_path / "a.parquet", range(54)),
        write_numbers(tmp_path / "b.jsonl", range(54, 94)),
        write_numbers(tmp_path / "c.jsonl", range(94, COUNT)),
    ]


def in_order(found: list[Source]) -> dict[int, int]:
    """Id of a row in batches -> its number over all files."""
    ids = [row_id(n, row.number, 0) for n, shard in enumerate(find_shards(found)) for row in read_shard(shard)]
    return {named: number for number, named in enumerate(ids)}


def renumbered(batches: Batches, numbers: dict[int, int]) -> Batches:
    numbers = numbers | {-1: -1}
    return [b | {"row_ids": b["row_ids"].clone().apply_(numbers.__getitem__)} for b in batches]


def epoch_of(
    found: list[Source], ranks: int, accumulate: int = 1, start: Any = None, **options: Any
) -> list[tuple[StreamSampler, Batches]]:
    """A whole epoch, or the rest of one, on every rank."""
    meeting, numbers = Meeting(ranks), in_order(found)
    done, cursor = start or (0, {"epoch": 0})

    def job(rank: int) -> tuple[StreamSampler, Batches]:
        trainer = fake_trainer(done, rank, ranks, accumulate)
        sampler = stream_of(found, ROWS, trainer, starts=[(done, cursor)], agree=meeting.of(rank), **options)
        return sampler, renumbered(list(step_loader(PackedRows(None, 64, 0), sampler, 0)), numbers)

    return meeting.run(job)


def rows_in(batches: Batches) -> list[int]:
    return [row for batch in batches for row in dict.fromkeys(batch["row_ids"].flatten().tolist()) if row >= 0]


@pytest.mark.parametrize(
    ("ranks", "accumulate", "num_workers"), [(1, 1, 0), (1, 2, 2), (3, 1, 0), (3, 2, 0), (3, 2, 2)]
)
def test_each_row_once_and_exact_totals_from_uneven_shards(
    uneven: list[Source], ranks: int, accumulate: int, num_workers: int
) -> None:
    orders = []
    for epoch in range(2):
        done = epoch_of(uneven, ranks, accumulate, (0, {"epoch": epoch}), num_workers=num_workers)
        orders.append(check_epoch([batches for _, batches in done], ROWS, accumulate))
    again = epoch_of(uneven, ranks, accumulate, (0, {"epoch": 1}), num_workers=num_workers)
    assert check_epoch([batches for _, batches in again], ROWS, accumulate) == orders[1]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_no_rank_reads_what_is_another_s(uneven: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[Shard, set[int]] = {}

    def noted(shard: Shard, *rest: Any) -> Iterator[sources.RawRow]:
        read.setdefault(shard, set()).add(threading.get_ident())
        return read_shard(shard, *rest)

    monkeypatch.setattr(streaming, "read_shard", noted)
    epoch_of(uneven, 3)
    assert read.keys() == set(find_shards(uneven))
    assert all(len(readers) == 1 for readers in read.values())
    assert len(set.union(*read.values())) == 3


def test_a_shard_needs_nothing_but_its_own_row_group(tmp_path: Path) -> None:
    """The bytes of every other row group are overwritten."""
    rows = [{"number": i, "text": f"{i} " * 50, "unread": os.urandom(100).hex()} for i in range(40)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="none", use_dictionary=False)
    row_group = pq.ParquetFile(path).metadata.row_group(2)
    own = [row_group.column(i) for i in range(2)]
    spans = [(c.data_page_offset, c.data_page_offset + c.total_compressed_size) for c in own]
    old = path.read_bytes()
    spoiled = bytearray(old[:4] + b"\xff" * (len(old) - 4))
    footer = len(old) - 8 - int.from_bytes(old[-8:-4], "little")
    for start, stop in [*spans, (footer, len(old))]:
        spoiled[start:stop] = old[start:stop]
    path.write_bytes(spoiled)
    fsspec.filesystem("memory").pipe("/spoiled/rows.parquet", bytes(spoiled))
    for name in (str(path), "memory://spoiled/rows.parquet"):
        shard = find_shards([Source(name, "parquet")])[2]
        read = list(read_shard(shard, columns={"number", "text"}))
        assert [(row.number, row.values["number"]) for row in read] == [(i, i) for i in range(20, 30)]
        assert [row.number for row in read_shard(shard, 27, {"number"})] == [27, 28, 29]
        with pytest.raises(ValueError, match=r"rows.parquet cannot be read as parquet"):
            list(read_shard(find_shards([Source(name, "parquet")])[1], columns={"number", "text"}))


def test_shards_are_dealt_out_evenly_and_anew_in_each_epoch(tmp_path: Path) -> None:
    sampler = stream_of([write_numbers(tmp_path / "a.parquet", range(COUNT), group=4)], ROWS, None)
    reader, shards = sampler.stream.reader, sampler.stream.shards
    first, second = (reader.deal(shards, 4, epoch) for epoch in range(2))
    assert first == reader.deal(shards, 4, 0) != second
    for dealt in (first, second):
        assert sorted(number for lane in dealt for number, _ in lane) == list(range(25))
        assert {len(lane) for lane in dealt} <= {6, 7}
    sizes = np.random.default_rng(0).integers(1, 1000, 60).tolist()
    loads = [sum(s.size for _, s in lane) for lane in reader.deal([Shard(shards[0].source, 0, n) for n in sizes], 7, 0)]
    assert max(loads) - min(loads) <= min(sizes) + 20


def test_the_shuffle_is_as_wide_as_the_buffer(tmp_path: Path) -> None:
    found = [write_numbers(tmp_path / "a.parquet", range(COUNT), group=COUNT)]
    lane = streaming.Lane(0, list(enumerate(find_shards(found))), streaming.Spot())

    def order(buffer: int, epoch: int = 0) -> list[int]:
        items = stream_of(found, ROWS, None, buffer=buffer).stream.reader.read(lane, epoch)
        return [item.what.row.row_id >> 14 for item in items]  # type: ignore[union-attr]

    assert order(1) == list(range(COUNT))
    tens = order(10)
    assert tens != order(10, epoch=1)
    for first in range(0, COUNT, 10):
        block = tens[first : first + 10]
        assert sorted(block) == list(range(first, min(first + 10, COUNT)))
        assert block != sorted(block)


@pytest.mark.parametrize(("ranks", "accumulate", "num_workers"), [(1, 2, 0), (2, 1, 0), (2, 2, 0), (2, 1, 2)])
def test_stopped_anywhere_it_goes_on_with_the_same_batches(
    uneven: list[Source], ranks: int, accumulate: int, num_workers: int
) -> None:
    whole = epoch_of(uneven, ranks, accumulate, num_workers=num_workers)
    length = len(whole[0][1])
    for done in range(1, length, 1 if num_workers == 0 else 5):
        starts = places(uneven, ranks, accumulate, done, num_workers)
        assert all(start == starts[0] for start in starts), "what rank 0 saves is right for all"
        began, cursor = json.loads(json.dumps(starts[0]))  # nothing but plain numbers and text
        rest = epoch_of(uneven, ranks, accumulate, (began, cursor), num_workers=num_workers)
        for (_, before), (_, after) in zip(whole, rest, strict=True):
            expected = before[began:]
            assert [b["input_ids"].tolist() for b in after] == [b["input_ids"].tolist() for b in expected]
            assert [b["step_tokens"] for b in after] == [b["step_tokens"] for b in expected]


def places(found: list[Source], ranks: int, accumulate: int, done: int, num_workers: int = 0, start: Any = None) -> Any:
    """Where each rank says that training stands after so many micro-batches more."""
    meeting = Meeting(ranks)
    began, cursor = start or (0, {"epoch": 0})

    def job(rank: int) -> tuple[int, Cursor]:
        trainer = fake_trainer(began, rank, ranks, accumulate)
        starts = [(began, cursor)]
        sampler = stream_of(found, ROWS, trainer, num_workers, agree=meeting.of(rank), starts=starts)
        plans = iter(sampler)
        for _ in range(done):
            next(plans)
            trainer.fit_loop.epoch_loop.batch_progress.total.processed += 1
        next(plans, None)  # Lightning, too, has the next one by the time it saves
        return sampler.position()

    return meeting.run(job)


def test_fewer_ranks_go_on_exactly_and_then_more_again(uneven: list[Source]) -> None:
    first = epoch_of(uneven, 4)
    began, cursor = places(uneven, 4, 1, 3)[0]
    seen = [row for _, batches in first for row in rows_in(batches[:began])]
    second = epoch_of(uneven, 1, 1, (began, cursor))
    assert Counter(seen + rows_in(second[0][1])) == Counter(range(COUNT))
    later = places(uneven, 1, 1, 2, start=(began, cursor))[0]
    assert later[0] == began + 2
    seen += rows_in(second[0][1][:2])
    third = epoch_of(uneven, 2, 1, later)
    assert Counter(seen + [row for _, batches in third for row in rows_in(batches)]) == Counter(range(COUNT))


def test_a_place_that_cannot_be_gone_on_from_is_refused(uneven: list[Source]) -> None:
    began, cursor = places(uneven, 2, 2, 3)[0]
    assert began == 2

    def resume(ranks: int = 2, accumulate: int = 2, done: int = began, found: Any = uneven, **options: Any) -> Any:
        trainer = fake_trainer(done, 0, ranks, accumulate)
        return iter(stream_of(found, ROWS, trainer, starts=[(began, cursor)], **options))

    resume()
    resume(done=3)
    resume(ranks=1)
    with pytest.raises(ValueError, match=r"that 2 ranks have shared out in 2 parts, too few for 3 ranks: go on with 2"):
        resume(ranks=3)
    for change in ({"ranks": 1}, {"accumulate": 1}):
        with pytest.raises(ValueError, match="within an optimizer step of 2 ranks with .*accumulate_grad_batches 2"):
            resume(done=3, **change)
    for change in ({"buffer": 11}, {"found": uneven[:2]}):
        with pytest.raises(
            ValueError, match=r"an epoch of other shards: data.train, data.seed and data.shuffle_buffer"
        ):
            resume(**change)


def test_too_few_shards_for_the_ranks(uneven: list[Source]) -> None:
    with pytest.raises(ValueError, match=r"data.train has 2 shards .* for 3 ranks, which read at least one each"):
        epoch_of(uneven[1:], 3)


def test_a_rank_that_cannot_read_stops_them_all(uneven: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shard: Shard, *rest: Any) -> Iterator[sources.RawRow]:
        if shard.source.name.endswith("c.jsonl"):
            raise ValueError("c.jsonl cannot be read.")
        return read_shard(shard, *rest)

    monkeypatch.setattr(streaming, "read_shard", broken)
    meeting, errors = Meeting(3), []

    def job(rank: int) -> None:
        with pytest.raises(ValueError, match=r"^c.jsonl cannot be read.$") as error:
            list(stream_of(uneven, ROWS, fake_trainer(0, rank, 3), agree=meeting.of(rank)))
        errors.append(error)

    meeting.run(job)
    assert len(errors) == 3
    # And not with the traceback that torch makes of a worker's error.
    with pytest.raises(ValueError, match=r"^c.jsonl cannot be read.$"):
        list(stream_of(uneven, ROWS, None, num_workers=2))


def test_a_row_that_one_rank_skips_is_known_to_all(uneven: list[Source]) -> None:
    long = {3, 60, 95}
    rows = [made_row(i, 65) if i in long else row for i, row in enumerate(ROWS)]
    meeting = Meeting(3)

    def job(rank: int) -> tuple[list[Rejected], int]:
        sampler, rejected = stream_of(uneven, rows, fake_trainer(0, rank, 3), agree=meeting.of(rank)), []
        sampler.stream.reject = rejected.append
        return rejected, sum(len(rows) for (plan,) in sampler for rows in plan.sequences)

    told = meeting.run(job)
    assert all(rejected == told[0][0] for rejected, _ in told)
    assert {(Path(row.file).name, row.row) for row in told[0][0]} == {("a.parquet", 3), ("b.jsonl", 6), ("c.jsonl", 1)}
    assert len(told[0][0]) == 3
    assert sum(count for _, count in told) == COUNT - 3


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    long = made_rows(1)[0]._replace(input_ids=np.ones(65, np.int64), segment_ids=np.ones(65, np.int64))
    sampler = stream_of([write_numbers(tmp_path / "a.parquet", range(1))], [long], None)
    with pytest.raises(ValueError, match=r"row 0: row is 65 tokens long"):
        list(sampler)
    sampler.stream.reject = lambda row: None
    with pytest.raises(ValueError, match=r"data.train: none of its rows can be used"):
        list(sampler)


# ---------------------------------------------------------------------- URLs and the data modules

CHAT = [{"scenario": f"पत्ती {i}", "thought": f"सोच {i}", "advisory": f"सलाह {i}"} for i in range(40)]
KINDS = (".parquet", ".jsonl", ".csv")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """Three files of three kinds in a folder in memory, and one that is something else."""
    memory = fsspec.filesystem("memory")
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)
    for i, kind in enumerate(KINDS):
        own = CHAT[i::3]
        if kind == ".parquet":
            with memory.open(f"/bucket/rows/{i}{kind}", "wb") as file:
                pq.write_table(pa.Table.from_pylist(own), file, row_group_size=5)
        elif kind == ".jsonl":
            memory.pipe(f"/bucket/rows/deep/{i}{kind}", "\n".join(map(json.dumps, own)).encode())
        else:
            lines = ["scenario,thought,advisory", *(",".join(row.values()) for row in own)]
            memory.pipe(f"/bucket/rows/deep/{i}{kind}", "\n".join(lines).encode())
    memory.pipe("/bucket/rows/README.md", b"no rows")
    return "memory://bucket/rows"


@pytest.fixture
def make(tmp_path: Path, tokenizer: str) -> Any:
    def build(train: Any, **options: Any) -> ChatDataModule:
        chosen = {"max_length": 256, "tokens_per_batch": 512, "validation_share": 0} | options
        return ChatDataModule(train=train, tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"), **chosen)

    return build


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_behind_a_url_are_found_cached_and_streamed(bucket: str, make: Any, num_workers: int) -> None:
    names = [f"memory:///bucket/rows/{name}" for name in ("0.parquet", "deep/1.jsonl", "deep/2.csv")]
    for value in (bucket, f"{bucket}/**/[0-9].*", names):
        assert [source.name for source in find_sources(value, "data.train")] == names
    cached = make(bucket)
    cached.setup("fit")
    expected = {tuple(cached.chat.encode(row).input_ids) for row in CHAT}
    assert {tuple(ids) for ids in cached.rows("train").table["input_ids"]} == expected
    streamed = make(bucket, streaming=True, num_workers=num_workers)
    streamed.setup("fit")
    ids = Counter(
        tuple(batch["input_ids"][batch["row_ids"] == row].tolist())
        for batch in streamed.train_dataloader()
        for row in batch["row_ids"].unique()
        if row >= 0
    )
    assert ids == Counter(expected)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    write_numbers(tmp_path / "a.parquet", range(3))
    for value in (f"file://{tmp_path}/a.parquet", f"file://{tmp_path}", f"file://{tmp_path}/*.parquet"):
        assert find_sources(value, "data.train") == [Source(str(tmp_path / "a.parquet"), "parquet")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("memory://bucket/absent.parquet", "data.train: memory://bucket/absent.parquet does not exist"),
        ("memory://bucket/rows/*.arrow", "data.train: no file matches memory://bucket/rows/*.arrow"),
        ("memory://bucket/rows/*", "matches memory:///bucket/rows/README.md, which is none of"),
        ("memory://bucket/rows/README.md", "is of no known kind"),
        ("nonsense://bucket/a.parquet", "data.train: nonsense://bucket/a.parquet cannot be looked up (Protocol"),
        ("simplecache::memory://bucket/rows", "chains file systems"),
    ],
)
def test_urls_that_name_no_rows(bucket: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find_sources(value, "data.train")


def test_a_file_system_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(sources.fsspec.core, "url_to_fs", absent)
    with pytest.raises(ValueError, match=r"s3://b/a.parquet needs a package that is not here \(Install s3fs to access"):
        find_sources("s3://b/a.parquet", "data.train")


def test_a_damaged_file_behind_a_url_is_named(bucket: str, make: Any) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/cut.parquet", memory.cat("/bucket/rows/0.parquet")[:-20])
    with pytest.raises(ValueError, match=r"memory:///bucket/cut.parquet cannot be read as parquet"):
        make(["memory://bucket/rows/0.parquet", "memory://bucket/cut.parquet"], streaming=True).check()
    memory.pipe("/bucket/bad.jsonl", b'{"scenario": "a", "advisory": "b"}\n{oops')
    with pytest.raises(ValueError, match=r"memory:///bucket/bad.jsonl row 1: line is not valid JSON"):
        list(make("memory://bucket/bad.jsonl", streaming=True, num_workers=2).train_dataloader())


def test_a_store_that_fails_while_it_is_read(bucket: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class ClientError(Exception):
        """As a store's own library raises it: no OSError."""

    (source,) = find_sources("memory://bucket/rows/0.parquet", "data.train")

    def refused(*_: Any, **__: Any) -> Any:
        raise ClientError("403: the token has expired.\nmore lines")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", refused)
    with pytest.raises(ValueError, match=r"rows/0.parquet cannot be read as parquet \(403: the token has expired\)"):
        find_shards([source])


class Ranges(BaseHTTPRequestHandler):
    """Files in memory over HTTP, any part of them; notes how many bytes it sent."""

    files: ClassVar[dict[str, bytes]] = {}
    sent: ClassVar[list[int]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        whole = self.files[self.path]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), int(asked[2] or len(whole) - 1) + 1) if asked else (0, len(whole))
        part = whole[start:stop]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(whole)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.sent.append(self.wfile.write(part))

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_workers_read_over_the_network_after_the_main_process_has(bucket: str, make: Any, server: str) -> None:
    """An asynchronous file system has a thread, which no worker inherits."""
    memory = fsspec.filesystem("memory")
    names = ("0.parquet", "deep/1.jsonl", "deep/2.csv")
    Ranges.files = {f"/{name}": memory.cat(f"/bucket/rows/{name}") for name in names}
    data = make([f"{server}/{name}" for name in names], streaming=True, num_workers=2)
    data.setup("fit")
    assert [shard.source.kind for shard in find_shards(data._sources("train"))] == ["parquet"] * 3 + ["jsonl", "csv"]
    rows = [ids for batch in data.train_dataloader() for ids in batch["row_ids"].unique().tolist() if ids >= 0]
    assert len(rows) == len(set(rows)) == 40


def test_a_shard_fetches_its_own_bytes(server: str) -> None:
    buffer = io.BytesIO()
    rows = [{"number": i, "noise": os.urandom(100_000)} for i in range(80)]  # 8 MB in 8 row groups
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=10)
    Ranges.files = {"/a.parquet": buffer.getvalue()}
    shards = find_shards(find_sources(f"{server}/a.parquet", "data.train"))
    Ranges.sent.clear()
    assert [row.number for row in read_shard(shards[1])] == list(range(10, 20))
    assert 1_000_000 < sum(Ranges.sent) < 1_100_000


def test_too_few_shards_show_before_any_model_is_loaded(bucket: str, make: Any) -> None:
    data = make(f"{bucket}/deep", streaming=True)
    data.trainer = fake_trainer(world_size=8)
    data.trainer.lightning_module = None
    data.trainer.state = type("State", (), {"fn": "fit"})
    with pytest.raises(ValueError, match="has 2 shards .* for 8 ranks"):
        data.setup("fit")


def test_plain_text_streams_too(tmp_path: Path, tokenizer: str) -> None:
    documents = [f"दस्तावेज़ {i} " + "धान की पत्ती </think> " * (i % 9) for i in range(30)]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(documents), "utf-8")
    options: dict[str, Any] = {"tokenizer": tokenizer, "block_size": 32, "tokens_per_batch": 64, "streaming": True}
    with pytest.raises(ValueError, match=r"data.streaming holds out no rows by itself"):
        TextDataModule(train=str(file), **options).check()
    with pytest.raises(ValueError, match=r"data.shuffle_buffer is 0: it must be at least 1 row"):
        TextDataModule(train=str(file), shuffle_buffer=0, **options)
    data = TextDataModule(train=str(file), validation_share=0, shuffle_buffer=8, **options)
    data.setup("fit")
    assert data.val_dataloader() == []
    pieces: dict[int, list[int]] = {}
    for batch in data.train_dataloader():
        for named in batch["row_ids"].unique().tolist():
            if named >= 0:
                assert named not in pieces
                pieces[named] = batch["input_ids"][batch["row_ids"] == named].tolist()
    tokens = [i for named in sorted(pieces) for i in pieces[named]]
    assert tokens == [i for text in documents for i in (*data.chat.encode_text(text), data.chat.end_id)]
    assert max(map(len, pieces.values())) <= 32
    assert len(pieces) > 40


# ---------------------------------------------------------------------- two real ranks

RANK = """
import json, sys
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from agri_moe.data.chat_data import ChatDataModule

class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []
    def training_step(self, batch, _):
        rows = [batch["input_ids"][batch["row_ids"] == i].tolist() for i in batch["row_ids"].unique() if i >= 0]
        totals = [batch["step_tokens"].item(), batch["step_batches"].item(), batch["step_targets"].tolist()]
        self.seen.append([self.current_epoch, rows, totals])
        return self.weight * 1.0
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class SaveAt(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == 4:
            trainer.save_checkpoint(options["save"])

options = json.loads(sys.argv[1])
torch.set_num_threads(1)
data = ChatDataModule(**options["data"])
trainer = Trainer(accelerator="cpu", devices=options["ranks"], strategy="ddp" if options["ranks"] > 1 else "auto",
    max_epochs=2, accumulate_grad_batches=2, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[SaveAt()] if options["save"] else None)
module = Recorder()
trainer.fit(module, data, ckpt_path=options["resume"], weights_only=True if options["resume"] else None)
with open(f"{options['out']}.{trainer.global_rank}", "w") as file:
    json.dump(module.seen, file)
"""


def train(folder: Path, ranks: int, data: dict[str, Any], out: str, save: str = "", resume: str | None = None) -> Any:
    """What each rank has trained on: [epoch, rows, totals] of every micro-batch."""
    options = {"data": data, "ranks": ranks, "out": str(folder / out), "save": save, "resume": resume}
    if ranks == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train", json.dumps(options)])
            exec(RANK, {})
        return [json.loads((folder / f"{out}.0").read_text())]
    run_ranks(["-c", RANK, json.dumps(options)], ranks)
    return [json.loads((folder / f"{out}.{rank}").read_text()) for rank in range(ranks)]


def test_two_ranks_stream_stop_and_go_on_as_two_or_as_one(tmp_path: Path, tokenizer: str) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(CHAT), file, row_group_size=3)
    data = {"train": str(file), "tokenizer": tokenizer, "max_length": 256, "tokens_per_batch": 256}
    data |= {"validation_share": 0, "streaming": True, "num_workers": 1, "shuffle_buffer": 8}
    save = str(tmp_path / "a.ckpt")
    whole = train(tmp_path, 2, data, "whole", save=save)

    chat = ChatDataModule(**data).chat
    expected = Counter(tuple(chat.encode(row).input_ids) for row in CHAT)
    assert len(whole[0]) == len(whole[1])
    for epoch in range(2):
        steps = [[entry for entry in rank if entry[0] == epoch] for rank in whole]
        rows = [tuple(row) for rank in steps for _, own, _ in rank for row in own]
        assert Counter(rows) == expected
        for first in range(0, len(steps[0]), 2):
            step = [entry for rank in steps for entry in rank[first : first + 2]]
            assert len({json.dumps(totals) for _, _, totals in step}) == 1
            tokens, batches, _ = step[0][2]
            assert tokens == sum(len(row) for _, own, _ in step for row in own)
            assert batches == sum(bool(own) for _, own, _ in step)

    assert train(tmp_path, 2, data, "same", resume=save) == [rank[4:] for rank in whole]
    (alone,) = train(tmp_path, 1, data, "alone", resume=save)
    before = [tuple(row) for rank in whole for epoch, own, _ in rank[:4] for row in own]
    for epoch in range(2):
        rows = [tuple(row) for at, own, _ in alone if at == epoch for row in own]
        assert Counter(rows + (before if epoch == 0 else [])) == expected
