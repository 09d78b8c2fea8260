"""ChatDataModule: sources, columns, bad rows, splits, the cache, and a stream that resumes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny import real_data, write_tokenizer

from agri_moe.data import chat_data, sources
from agri_moe.data.chat import ChatFormat
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.rows import Rejected

ROWS = [{"scenario": f"पत्ती {i}", "thought": f"सोच {i}" if i % 3 else None, "advisory": f"सलाह {i}"} for i in range(40)]
FORMAT = ChatFormat(default_system="छोटा")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def make(tmp_path: Path, tokenizer: str) -> Any:
    """A data module with a cache of its own."""

    def build(train: Any, **options: Any) -> ChatDataModule:
        defaults: dict[str, Any] = {"max_length": 256, "tokens_per_batch": 512, "format": FORMAT}
        chosen = defaults | {"tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache")} | options
        return ChatDataModule(train=train if train is None else _text(train), **chosen)

    return build


def _text(train: Any) -> Any:
    return [str(path) for path in train] if isinstance(train, list) else str(train)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), "utf-8")
    return path


def advisories(data: ChatDataModule, split: Any = "train") -> list[str]:
    return [row["advisory"] for row in data.rows(split).table]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path: Path, make: Any, suffix: str) -> None:
    data = make(write(tmp_path / f"rows{suffix}", ROWS), validation_share=0)
    data.setup("fit")
    table = data.rows("train").table
    assert table["input_ids"][:] == [data.chat.encode(row).input_ids for row in ROWS]
    assert table["segment_ids"][:] == [data.chat.encode(row).segment_ids for row in ROWS]
    assert data.rejected == []


def test_lists_globs_and_folders_in_a_fixed_order(tmp_path: Path, make: Any) -> None:
    write(tmp_path / "in" / "b.parquet", ROWS[10:20])
    write(tmp_path / "in" / "a.jsonl", ROWS[:10])
    write(tmp_path / "in" / "deep" / "c.csv", ROWS[20:])
    (tmp_path / "in" / "README.md").write_text("no rows")
    expected = [row["advisory"] for row in ROWS]
    every = [tmp_path / "in" / "a.jsonl", tmp_path / "in" / "b.parquet", tmp_path / "in" / "deep" / "c.csv"]
    for train in (every, tmp_path / "in", tmp_path / "in" / "**" / "*.[pjc]*"):
        assert advisories(make(train, validation_share=0)) == expected


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("absent.parquet", "data.train: absent.parquet does not exist"),
        ("a/b/c", "data.train: a/b/c does not exist"),
        ("{tmp}/*.jsonl", r"data.train: no file matches"),
        ("{tmp}/empty", "holds no Parquet"),
        ("{tmp}/rows.xlsx", "is of no known kind"),
        ("{tmp}/*.xlsx", "narrow the pattern"),
        (["{tmp}/a.parquet", "{tmp}/a.parquet"], "twice"),
        ([], "data.train is []"),
        (None, "data.train is not set"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, make: Any, train: Any, message: str) -> None:
    write(tmp_path / "a.parquet", ROWS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.xlsx").write_text("x")
    named = json.loads(json.dumps(train).replace("{tmp}", str(tmp_path)))
    with pytest.raises(ValueError, match=re.escape(message)):
        make(named).setup("fit")


def test_hub_datasets_by_name_and_split(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        table = datasets.Dataset.from_list(ROWS)
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = make("agri/rows:extra", validation_share=0)
    assert len(data.rows("train")) == 40
    assert set(asked) == {("agri/rows", "extra", False)}
    streamed = make("agri-rows", validation_share=0, streaming=True)
    streamed.setup("fit")
    assert sum(count_rows(batch) for batch in streamed.train_dataloader()) == 40
    assert asked[-1] == ("agri-rows", "train", True)

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no way out.\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"dataset agri/other cannot be loaded .*\(no way out\)"):
        make("agri/other").setup("fit")


def count_rows(batch: dict[str, torch.Tensor]) -> int:
    return len(set(batch["row_ids"].flatten().tolist()) - {-1})


def test_columns_are_mapped_and_missing_ones_named(tmp_path: Path, make: Any) -> None:
    theirs = [{"question": r["scenario"], "answer": r["advisory"], "note": "x"} for r in ROWS]
    file = write(tmp_path / "rows.parquet", theirs)
    data = make(file, columns={"scenario": "question", "advisory": "answer"}, validation_share=0)
    assert advisories(data) == [row["advisory"] for row in ROWS]
    has = r"rows.parquet has no column {}; it has question, answer, note: .*data.columns: \{{{}: NAME\}}"
    with pytest.raises(ValueError, match=has.format("advisory", "advisory")):
        make(file, columns={"scenario": "question"}).check()
    with pytest.raises(ValueError, match=has.format("reason", "thought")):
        make(file, columns={"scenario": "question", "advisory": "answer", "thought": "reason"}).check()
    with pytest.raises(ValueError, match=r"data.columns names answer, which is no column of ours"):
        make(file, columns={"answer": "advisory"}).check()


def test_struct_scenarios_and_systems(tmp_path: Path, make: Any) -> None:
    rows = [
        {"scenario": {"फसल": "धान", "वर्षा": None}, "advisory": "A", "system": "मेरा"},
        {"scenario": {"फसल": "गेहूँ", "वर्षा": "कम"}, "advisory": "B", "system": None},
    ]
    for suffix in (".parquet", ".jsonl"):
        data = make(write(tmp_path / f"rows{suffix}", rows), validation_share=0)
        table = data.rows("train").table
        assert table["scenario"][:] == ["फसल: धान", "फसल: गेहूँ\nवर्षा: कम"]
        assert data.chat.tokenizer.decode(table["input_ids"][0]).startswith("<|system|>\nमेरा\n<|user|>")
        assert data.chat.tokenizer.decode(table["input_ids"][1]).startswith("<|system|>\nछोटा\n<|user|>")


BAD = [
    ({"advisory": None}, "advisory is missing"),
    ({"advisory": ""}, "advisory is empty"),
    ({"advisory": " \n"}, "advisory is empty"),
    ({"advisory": 308}, "advisory is a int, not text"),
    ({"scenario": None}, "scenario is missing"),
    ({"scenario": {"a": [1]}}, "scenario.a is a list, not text, a number or a date"),
    ({"thought": ["a"]}, "thought is a list, not text"),
    ({"advisory": "लंबी " * 200}, "more than data.max_length 256"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD)
def test_each_kind_of_bad_row_is_an_error_or_is_listed(
    tmp_path: Path, make: Any, changes: dict[str, Any], reason: str
) -> None:
    file = write(tmp_path / "rows.jsonl", [*ROWS[:3], ROWS[3] | changes, *ROWS[4:]])
    message = rf"rows.jsonl row 3: .*{re.escape(reason)}; rows count from 0 .* set data.bad_rows: skip"
    with pytest.raises(ValueError, match=message):
        make(file, validation_share=0).setup("fit")
    data = make(file, validation_share=0, bad_rows="skip")
    with pytest.warns(UserWarning, match=r"data.train: 1 of 40 rows skipped"):
        data.setup("fit")
    ((where, number, why),) = data.rejected
    assert (where, number) == (str(file), 3)
    assert reason in why
    assert advisories(data) == [row["advisory"] for i, row in enumerate(ROWS) if i != 3]


def test_rows_that_cannot_even_be_read(tmp_path: Path, make: Any) -> None:
    broken = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0], ensure_ascii=False).encode()
    broken.write_bytes(b"\n".join([good, b"{oops", b"[1]", b'{"scenario": "\xff", "advisory": "x"}', good]))
    data = make(broken, validation_share=0, bad_rows="skip")
    with pytest.warns(UserWarning, match="3 of 5 rows skipped"):
        data.setup("fit")
    reasons = [(row.row, row.reason) for row in data.rejected]
    assert [number for number, _ in reasons] == [1, 2, 3]
    assert "not valid JSON" in reasons[0][1]
    assert reasons[1:] == [(2, "row is a JSON list, not an object"), (3, "text is not valid UTF-8")]
    # Bytes that are no UTF-8 load into a Parquet string column in silence.
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffx")]
    )
    pq.write_table(pa.table({"scenario": ["a", "b"], "advisory": column}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet row 0: text is not valid UTF-8"):
        make(tmp_path / "rows.parquet", validation_share=0).setup("fit")
    (tmp_path / "rows.csv").write_text("scenario,advisory\na,b,c\nd,e\n")
    with pytest.raises(ValueError, match=r"rows.csv row 0: row has more cells than the header"):
        make(tmp_path / "rows.csv", validation_share=0).setup("fit")


def test_damaged_and_empty_files_are_named(tmp_path: Path, make: Any) -> None:
    whole = write(tmp_path / "whole.parquet", ROWS).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut.parquet cannot be read as parquet .*truncated"):
        make([tmp_path / "whole.parquet", tmp_path / "cut.parquet"]).check()
    (tmp_path / "array.json").write_text('[{"scenario": "a"')
    with pytest.raises(ValueError, match=r"array.json cannot be read as jsonl"):
        make(tmp_path / "array.json").check()
    (tmp_path / "bytes.csv").write_bytes(b"scenario,advisory\n\xff,b\n")
    with pytest.raises(ValueError, match=r"bytes.csv row 0: scenario is not valid UTF-8 text"):
        make(tmp_path / "bytes.csv").setup("fit")
    middle = write(tmp_path / "middle.parquet", ROWS * 50).read_bytes()
    (tmp_path / "middle.parquet").write_bytes(middle[:40] + b"\xff" * 300 + middle[340:])
    make(tmp_path / "middle.parquet").check()  # the footer is whole: the damage shows when rows are read
    with pytest.raises(ValueError, match=r"middle.parquet cannot be read as parquet"):
        make(tmp_path / "middle.parquet").setup("fit")
    with pytest.raises(ValueError, match=r"middle.parquet cannot be read as parquet"):
        make([tmp_path / "middle.parquet", tmp_path / "whole.parquet"], num_proc=2).setup("fit")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"none.jsonl has no rows"):
        make(tmp_path / "none.jsonl").check()
    (tmp_path / "lines.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"lines.jsonl row 0: line is not valid JSON"):
        make(tmp_path / "lines.jsonl").check()
    pq.write_table(
        pa.table({"scenario": pa.array([], pa.string()), "advisory": pa.array([], pa.string())}),
        tmp_path / "zero.parquet",
    )
    with pytest.raises(ValueError, match=r"data.train names files without a row"):
        make(tmp_path / "zero.parquet").setup("fit")


def test_nothing_usable_or_too_little_of_it(tmp_path: Path, make: Any) -> None:
    empty = [row | {"advisory": ""} for row in ROWS]
    with pytest.raises(ValueError, match=r"none of its 40 rows can be used; the first is \S*all.parquet row 0"):
        make(write(tmp_path / "all.parquet", empty), bad_rows="skip").setup("fit")
    half = write(tmp_path / "half.parquet", [*ROWS[:20], *empty[20:]])
    with pytest.raises(ValueError, match=r"20 of 40 rows cannot be used, more than data.max_skipped_share 0.1"):
        make(half, bad_rows="skip", max_skipped_share=0.1).setup("fit")
    with pytest.raises(ValueError, match=r"half.parquet row 20: advisory is empty \(20 such rows in all\)"):
        make(half).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4}, "data.max_length is 4"),
        ({"tokens_per_batch": 0}, "data.tokens_per_batch is 0"),
        ({"validation_share": 1.0}, "data.validation_share is 1.0"),
        ({"bad_rows": "ignore"}, "data.bad_rows is 'ignore'"),
    ],
)
def test_numbers_that_make_no_sense(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("rows.parquet", **options)


def test_the_held_out_rows_share_no_scenario_with_training(tmp_path: Path, make: Any) -> None:
    rows = [row | {"scenario": f"खेत {i // 2}"} for i, row in enumerate(ROWS)]
    data = make(write(tmp_path / "rows.parquet", rows), validation_share=0.2)
    data.setup("fit")
    train, held = (set(data.rows(split).table["scenario"]) for split in ("train", "validation"))
    assert not train & held
    assert len(data.rows("train")) + len(data.rows("validation")) == 40
    assert 2 <= len(data.rows("validation")) <= 20
    longer = make(write(tmp_path / "more.parquet", [*rows, ROWS[0]]), validation_share=0.2)
    assert held <= set(longer.rows("validation").table["scenario"])  # rows keep their side when others come
    tiny = make(write(tmp_path / "two.parquet", ROWS[:2]), validation_share=0.01)
    assert (len(tiny.rows("train")), len(tiny.rows("validation"))) == (1, 1)
    with pytest.raises(ValueError, match=r"holds one scenario only"):
        make(write(tmp_path / "one.parquet", ROWS[:1])).setup("fit")
    assert make(tmp_path / "one.parquet", validation_share=0).val_dataloader() == []


def test_splits_of_their_own_and_stages(tmp_path: Path, make: Any) -> None:
    files = {name: write(tmp_path / f"{name}.parquet", ROWS[i : i + 5]) for i, name in enumerate("abc")}
    data = make(files["a"], validation=str(files["b"]), test=str(files["c"]))
    data.prepare_data()
    assert [len(data.rows(split)) for split in ("train", "validation", "test")] == [5, 5, 5]
    assert advisories(data, "test") == [row["advisory"] for row in ROWS[2:7]]
    only = make(None, validation=str(files["b"]))
    only.setup("validate")
    only.setup("test")
    assert advisories(only, "test") == [row["advisory"] for row in ROWS[1:6]]
    assert sum(count_rows(batch) for batch in only.test_dataloader()) == 5
    with pytest.raises(ValueError, match=r"data.train is not set"):
        only.setup("fit")


def test_predict_yields_prompts_with_their_texts(tmp_path: Path, make: Any) -> None:
    data = make(None, validation=str(write(tmp_path / "rows.parquet", ROWS)))
    data.setup("predict")
    items = [item for batch in data.predict_dataloader() for item in batch]
    assert [item["advisory"] for item in items] == [row["advisory"] for row in ROWS]
    assert items[1]["prompt_ids"] == data.chat.encode_prompt(ROWS[1]["scenario"])
    assert [item["row_id"] for item in items] == list(range(40))


def test_batches_hold_the_rows_as_they_were_encoded(tmp_path: Path, make: Any) -> None:
    data = make(write(tmp_path / "rows.parquet", ROWS), validation_share=0, tokens_per_batch=700)
    data.setup("fit")
    seen: dict[int, list[int]] = {}
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape[0] <= 2
        for row in set(batch["row_ids"].flatten().tolist()) - {-1}:
            at = batch["row_ids"] == row
            assert row not in seen
            seen[row] = batch["input_ids"][at].tolist()
            assert batch["position_ids"][at].tolist() == list(range(int(at.sum())))
    assert seen == {i: data.chat.encode(row).input_ids for i, row in enumerate(ROWS)}


def test_a_second_setup_tokenises_nothing(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.parquet", ROWS)
    make(file).setup("fit")
    encoded: list[int] = []
    real = chat_data._encode

    def counted(chat: Any, raw: Any, **options: Any) -> Any:
        encoded.append(raw.number)
        return real(chat, raw, **options)

    monkeypatch.setattr(chat_data, "_encode", counted)
    make(file).setup("fit")
    make(file, max_length=64, tokens_per_batch=64, seed=3, bad_rows="skip").setup("fit")
    assert encoded == []
    make(file, format=ChatFormat(default_system="और")).setup("fit")
    assert encoded == list(range(40))
    write(file, ROWS[:20])
    again = make(file, validation_share=0)
    again.setup("fit")
    assert len(again.rows("train")) == 20
    assert encoded == [*range(40), *range(20)]


def test_tokenising_in_two_processes(tmp_path: Path, make: Any) -> None:
    files = [write(tmp_path / f"{i}.parquet", ROWS[i * 10 : i * 10 + 10]) for i in range(4)]
    data = make(files, num_proc=2, validation_share=0)
    assert advisories(data) == [row["advisory"] for row in ROWS]


class Recorder(LightningModule):
    """Notes the rows that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"][batch["row_ids"] >= 0].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        assert batch["row_ids"].max() >= 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class SaveAt(Callback):
    def __init__(self, batch: int, path: Path) -> None:
        self.batch = batch
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            trainer.save_checkpoint(self.path)


def fit(data: ChatDataModule, folder: Path, save: Callback | None = None, ckpt: Path | None = None) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        callbacks=[save] if save else None,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batch", [4, 8])
def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, make: Any, streaming: bool, batch: int) -> None:
    files = [write(tmp_path / f"{i}.{kind}", ROWS[i::3]) for i, kind in enumerate(("parquet", "jsonl", "csv"))]
    held = str(write(tmp_path / "held.parquet", ROWS[:4]))
    options = {"streaming": streaming, "validation": held, "tokens_per_batch": 256}
    whole = fit(make(files, **options), tmp_path, SaveAt(batch, tmp_path / "a.ckpt"))
    assert len(whole.seen) > batch + 2
    resumed = fit(make(files, **options), tmp_path, ckpt=tmp_path / "a.ckpt")
    assert resumed.seen == whole.seen[batch:]


def test_a_stream_has_the_rows_of_the_cached_path_and_lists_bad_ones(tmp_path: Path, make: Any) -> None:
    bad = [*ROWS[:7], ROWS[7] | {"advisory": " "}, *ROWS[8:]]
    file = write(tmp_path / "rows.parquet", bad)
    with pytest.raises(ValueError, match=r"data.streaming holds out no rows by itself"):
        make(file, streaming=True).setup("fit")
    data = make(file, streaming=True, validation_share=0, bad_rows="skip")
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.warns(UserWarning, match="row 7: advisory is empty"):
        batches = list(data.train_dataloader())
    assert data.rejected == [Rejected(str(file), 7, "advisory is empty")]
    assert sum(count_rows(batch) for batch in batches) == 39
    ids = {tuple(b["input_ids"][b["row_ids"] == i].tolist()) for b in batches for i in b["row_ids"].unique() if i >= 0}
    assert ids == {tuple(data.chat.encode(row).input_ids) for i, row in enumerate(ROWS) if i != 7}
    with pytest.raises(ValueError, match=r"rows.parquet row 7: advisory is empty"):
        list(make(file, streaming=True, validation_share=0).train_dataloader())


def test_reading_on_from_a_row_skips_those_before_it(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=7)
    files = [
        tmp_path / "rows.parquet",
        *(write(tmp_path / f"rows{s}", ROWS) for s in (".jsonl", ".json", ".csv")),
    ]
    for file in files:
        (source,) = sources.find_sources(str(file), "data.train")
        for start in (0, 7, 23, 40):
            rows = list(sources.read_rows(source, start))
            assert [row.number for row in rows] == list(range(start, 40))
            assert [row.values["advisory"] for row in rows] == [row["advisory"] for row in ROWS[start:]]


def test_real_rows_pack_tightly(tmp_path: Path) -> None:
    data = real_data()
    module = ChatDataModule(
        train=str(data / "plant_disease_train.parquet"),
        validation=str(data / "plant_disease_val.parquet"),
        tokenizer=str(data / "qwen3-0.6b"),
        cache_dir=str(tmp_path),
    )
    module.setup("fit")
    assert (len(module.rows("train")), len(module.rows("validation"))) == (1765, 187)
    batches = list(module.train_dataloader())
    filled = sum(int((batch["row_ids"] >= 0).sum()) for batch in batches)
    assert filled / sum(batch["row_ids"].numel() for batch in batches) > 0.97
    assert filled == module.rows("train").lengths.sum()
