"""Groups of rows: found by a column, and told apart in validation, against a model that reads each row by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from agri_moe.cli import main
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.groups import Groups, group_of
from agri_moe.data.text_data import TextDataModule
from agri_moe.reporting import read_record
from agri_moe.trained import load_trained
from tests.test_cli import refused, scalars

CROPS = ["धान", "गेहूँ", "a/b wheat"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The corpus' advisories with a crop each; the validation file is of another order than its groups."""
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 60), ("validation", 20)):
        advisories = pq.read_table(corpus / f"{split}.parquet")["advisory"].to_pylist()[:count]
        # A wheat row is a few words of any row: the groups differ in length, and documents fall into several pieces.
        crops = [CROPS[(i * i + i // 3) % 3] for i in range(count)]
        body = [text[:40] if crop == CROPS[1] else text * 3 for text, crop in zip(advisories, crops, strict=True)]
        facts = [{"crop": crop, "number": i % 2} for i, crop in enumerate(crops)]
        pq.write_table(pa.table({"text": body, "crop": crops, "facts": facts}), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def make(texts: Path, corpus: Path, tmp_path: Path) -> Any:
    def build(**options: Any) -> TextDataModule:
        chosen: dict[str, Any] = {"train": str(texts / "train.parquet"), "block_size": 64, "tokens_per_batch": 256}
        chosen |= {"tokenizer": str(corpus / "tokenizer"), "cache_dir": str(tmp_path / "cache")}
        return TextDataModule(**chosen | options)

    return build


def test_the_group_of_a_row() -> None:
    row = {"crop": " धान \n (basmati)", "empty": " ", "facts": {"number": 0, "more": {"deep": True}}, "list": ["a"]}
    found = {name: group_of(row, name) for name in ("crop", "facts.number", "facts.more.deep")}
    assert found == {"crop": "धान (basmati)", "facts.number": "0", "facts.more.deep": "True"}
    assert [group_of(row, name) for name in ("empty", "none", "facts", "facts.none", "crop.x", "list")] == [None] * 6


def test_groups_of_some_rows() -> None:
    groups = Groups.of(["b", "a", "c", "a"])
    assert (groups.names, groups.of_row.tolist()) == (("a", "b", "c"), [1, 0, 2, 0])
    some = groups.select(np.array([2, 3, 1]))
    assert (some.names, some.of_row.tolist()) == (("a", "c"), [1, 0, 0])
    Groups.of([str(i) for i in range(64)]).check("crop")
    with pytest.raises(ValueError, match=r"data.group_by crop has 65 values .* more than the 64"):
        Groups.of([str(i) for i in range(65)]).check("crop")


def test_pieces_have_the_group_of_their_document_and_the_cache_knows(make: Any, texts: Path) -> None:
    plain = make()
    plain.setup("fit")
    assert plain.groups("validation") is None
    assert "group" not in plain.rows("validation").table.column_names
    data = make(group_by="crop", validation_share=0.3)
    data.setup("fit")
    rows, groups = data.rows("validation"), data.groups("test")
    crop_of = dict(
        zip(*pq.read_table(texts / "train.parquet").select(["text", "crop"]).to_pydict().values(), strict=True)
    )
    document_of = {tuple(data.chat.encode_text(text)): crop for text, crop in crop_of.items()}
    pieces: dict[float, list[int]] = {}
    found = {}
    for place, ids, number in zip(rows.places, rows.table["input_ids"], groups.of_row, strict=True):
        pieces.setdefault(place, []).extend(ids)
        found.setdefault(place, set()).add(groups.names[number])
    assert len(rows) > len(pieces) > 5
    assert {p: {document_of[tuple(ids[:-1])]} for p, ids in pieces.items()} == found
    # Another column is another cache, and a struct's field will do.
    other = make(group_by="facts.number", validation_share=0.3)
    other.setup("validate")
    assert other.groups("validation").names == ("0", "1")
    assert len(other.rows("validation")) == len(rows)


def test_only_rows_that_are_validated_need_a_group(make: Any, texts: Path, tmp_path: Path) -> None:
    table = pq.read_table(texts / "train.parquet")
    bare = tmp_path / "bare.parquet"
    pq.write_table(table.select(["text"]), bare)
    data = make(train=str(bare), validation=str(texts / "validation.parquet"), group_by="crop")
    data.check()
    data.setup("fit")
    assert data.rows("train").groups is None
    assert set(data.groups("validation").names) == set(CROPS)
    streamed = make(train=str(bare), validation=str(texts / "validation.parquet"), group_by="crop", streaming=True)
    streamed.setup("fit")
    assert streamed.groups("validation").names == data.groups("validation").names
    with pytest.raises(ValueError, match=r"bare.parquet has no column crop; it has text: .* as data.group_by"):
        make(train=str(bare), group_by="crop").check()
    with pytest.raises(ValueError, match=r"data.group_by sorts validation rows, and there are none"):
        make(group_by="crop", validation_share=0).check()
    holes = table.set_column(1, "crop", pa.array(["", None, *table["crop"].to_pylist()[2:]]))
    pq.write_table(holes, bare)
    with pytest.raises(ValueError, match=r"row 0: crop is missing or empty, by which data.group_by .*2 such rows"):
        make(train=str(bare), group_by="crop").setup("fit")
    skipping = make(train=str(bare), group_by="crop", bad_rows="skip")
    with pytest.warns(UserWarning, match="2 of 60 rows skipped"):
        skipping.setup("fit")
    many = table.append_column("id", pa.array(range(len(table))))
    pq.write_table(pa.concat_tables([many, many.set_column(3, "id", pa.array(range(60, 120)))]), bare)
    with pytest.raises(ValueError, match="data.group_by id has 120 values"):
        make(validation=str(bare), group_by="id").setup("fit")


def test_chat_rows_have_groups_in_validation_and_test(corpus: Path, tmp_path: Path) -> None:
    files = {name: str(corpus / f"{name}.parquet") for name in ("train", "validation")}
    options = {"tokenizer": str(corpus / "tokenizer"), "cache_dir": str(tmp_path), "group_by": "scenario.फसल"}
    data = ChatDataModule(**files, **options)
    data.setup("fit")
    expected = [row["फसल"] for row in pq.read_table(files["validation"])["scenario"].to_pylist()]
    groups = data.groups("test")
    assert [groups.names[i] for i in groups.of_row] == expected
    own = ChatDataModule(**files, **options, test=files["train"])
    own.setup("test")
    assert len(own.groups("test").of_row) == 120


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: Path, corpus: Path, dense: Path) -> Path:
    """A short run of an upcycled model that tells crops apart; its config beside its runs."""
    folder = tmp_path_factory.mktemp("groups")
    monitors = [
        {"class_path": f"agri_moe.callbacks.{name}"} for name in ("router.RouterMonitor", "before.ValidateFirst")
    ]
    monitors[0]["init_args"] = {"every_n_steps": 1}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "PretrainModule",
            "init_args": {
                "network": {"source": str(dense), "upcycle": {"num_experts": 4, "num_experts_per_tok": 2}},
                "objective": {"balance": {"weight": 0.01}},
                "learning_rate": 3e-2,
                "optimizer": {"warmup_steps": 1},
                "balance_beta": 2.0,
            },
        },
        "data": {
            "class_path": "TextDataModule",
            "init_args": {
                "train": str(texts / "train.parquet"),
                "validation": str(texts / "validation.parquet"),
                "tokenizer": str(corpus / "tokenizer"),
                "block_size": 64,
                "tokens_per_batch": 512,
                "group_by": "crop",
                "cache_dir": str(folder / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "max_steps": 8,
            "accumulate_grad_batches": 2,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 8,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "agri_moe.callbacks.resume.Checkpoint", "init_args": {"every_n_steps": 4}},
                {"class_path": "agri_moe.callbacks.router.RouterMonitor", "init_args": {"every_n_steps": 1}},
                {"class_path": "agri_moe.callbacks.before.ValidateFirst"},
            ],
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    folder_of_run: Path = main(["fit", "--config", str(path)]).run.folder
    return folder_of_run


def alone(checkpoint: Path, texts: Path) -> dict[str, Any]:
    """Loss and load of each crop by the plain model, one piece of one document at a time, and choices by hand."""
    model, chat = load_trained(str(checkpoint), "--model")
    counts = {crop: torch.zeros(2, 4, dtype=torch.float64) for crop in CROPS}
    nll, tokens = dict.fromkeys(CROPS, 0.0), dict.fromkeys(CROPS, 0)
    table = pq.read_table(texts / "validation.parquet").to_pylist()
    for row in table:
        ids = [*chat.encode_text(row["text"]), chat.end_id]
        pieces = -(-len(ids) // 64)
        for i in range(pieces):
            piece = torch.tensor([ids[len(ids) * i // pieces : len(ids) * (i + 1) // pieces]])
            with torch.no_grad():
                out = model(piece, output_router_logits=True, use_cache=False)
            losses = torch.nn.functional.cross_entropy(out.logits[0, :-1].double(), piece[0, 1:], reduction="none")
            nll[row["crop"]] += float(losses.sum())
            tokens[row["crop"]] += len(losses)
            for layer, logits in enumerate(out.router_logits):
                for token in logits.tolist():
                    for expert in sorted(range(4), key=lambda e: -token[e])[:2]:
                        counts[row["crop"]][layer, expert] += 1
    return {"nll": nll, "tokens": tokens, "counts": counts}


def test_validation_tells_groups_apart(run: Path, texts: Path) -> None:
    expected = alone(run / "checkpoints" / "step=00000008.ckpt", texts)
    found = dict(np.load(run / "routing" / "step=00000008.npz"))
    names = found["groups"].tolist()
    assert names == sorted(CROPS)
    assert str(found["group_by"]) == "crop"
    for g, name in enumerate(names):
        counts = expected["counts"][name]
        assert found["load_by_group"][:, g] == pytest.approx((counts / counts.sum(1, keepdim=True)).numpy(), abs=2e-3)
        assert found["tokens"][g] == expected["tokens"][name]
        assert found["ce"][g] == pytest.approx(expected["nll"][name] / expected["tokens"][name], rel=1e-4)
    logged = scalars(run)
    shown = {name: logged[f"val/ce/{name}"][-1][1] for name in names}
    assert shown == pytest.approx(dict(zip(names, found["ce"], strict=True)))
    mean = sum(shown[name] * expected["tokens"][name] for name in names) / sum(expected["tokens"].values())
    assert logged["val/ce"][-1][1] == pytest.approx(mean, rel=1e-5)
    information = logged["val/group_information"][-1][1]
    assert information == pytest.approx(found["mutual_information"].mean())
    assert 0 < information < math.log(3)


def test_what_training_tells_besides_its_terms(run: Path) -> None:
    logged = {name: [value for _, value in entries] for name, entries in scalars(run).items()}
    assert logged["train/perplexity"] == pytest.approx(np.exp(logged["train/ce"]), rel=1e-5)
    assert len(logged["train/dead_experts"]) == 8
    by_layer = [logged[f"expert_balance/layer_0{i}"] for i in range(2)]
    assert logged["train/balance_score"] == pytest.approx(np.mean(by_layer, axis=0), rel=1e-5)
    for split in ("train", "val"):  # beta is 2
        penalty = np.exp(2 * (1 - np.array(logged[f"{split}/balance_score"])))
        expected = np.array(logged[f"{split}/perplexity"]) * penalty
        assert logged[f"{split}/balanced_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_run_that_tells_groups_goes_on_and_is_tested(
    run: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = run.parents[1] / "config.yaml"
    longer = ["fit", "--config", config, "--trainer.max_steps=8", "--trainer.default_root_dir", run.parents[1] / "cut"]
    cut = main([*map(str, longer), "--trainer.limit_val_batches=1"]).run.folder
    for path in sorted((cut / "checkpoints").glob("step=00000008.ckpt*")):
        path.unlink()
    status = json.loads((cut / "run.json").read_text()) | {"status": "running"}
    (cut / "run.json").write_text(json.dumps(status))
    again = main([*map(str, longer), "--trainer.limit_val_batches=1"]).run.folder
    assert again.samefile(cut)
    states = [torch.load(f / "checkpoints" / "step=00000008.ckpt", weights_only=True)["state_dict"] for f in (run, cut)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    monkeypatch.chdir(run.parents[1])
    found = main(["test", "--config", str(run / "config.yaml"), "--model.max_new_tokens=0"]).trainer.callback_metrics
    assert {f"test/ce/{name}" for name in CROPS} <= found.keys()
    measures = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert measures["ce"]["n"] == sum(measures[f"ce/{name}"]["n"] for name in CROPS)
    layerwise = ["--model", "LayerwiseModule", "--model.source", dense, "--trainer.callbacks=[]"]
    assert "layers are not; take it out" in refused(capsys, "fit", "--config", config, *layerwise)


def test_the_report_shows_groups(run: Path) -> None:
    main(["report", "--run", str(run)])
    record = read_record(run)
    assert set(record.routing[8]["groups"]) == set(CROPS)
    html = (run / "report" / "index.html").read_text()
    assert all(f"<th>{name}</th>" in html for name in CROPS)
