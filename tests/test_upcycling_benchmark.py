"""benchmarks/upcycling.py and real_text.py at tiny sizes: what is compared is right. Nothing here is timed."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
from tiny import real_data

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import real_text
import upcycling
from upcycling import Continued, Setting

SMALL = Setting(width=64, inner=64, layers=1, tokens_per_batch=512, dense_steps=2, dense_check_every=1, steps=2)
SMALL = dataclasses.replace(SMALL, check_every=1)


def point(ce, balance=0.9):
    return {"ce": ce, "balanced_perplexity": 2.0, "balance_score": balance}


def test_a_curve_is_read_between_its_checks():
    curve = {"100": point(4.0, 0.8), "200": point(3.0, 1.0)}
    assert upcycling.between(curve, 100) == curve["100"]
    read = upcycling.between(curve, 125)
    assert read["ce"] == pytest.approx(3.75)
    assert read["balance_score"] == pytest.approx(0.85)


def test_equal_tokens_and_equal_operations_read_the_dense_curve_at_different_steps():
    setting = dataclasses.replace(SMALL, steps=100)
    dense = {"curve": {"100": {"ce": 4.0}, "200": {"ce": 3.8}}}
    results = {"dense": [dense], "drop": [{"curve": {"100": point(3.9)}}]}
    tokens = upcycling.at_tokens(setting, results)
    operations = upcycling.at_operations(setting, results, 1.5)
    assert tokens["dense"] == [{"ce": 4.0}]
    assert operations["dense"][0]["ce"] == pytest.approx(3.9)
    assert operations["drop"] == tokens["drop"]
    assert "-2.5 %" in upcycling.table(tokens)
    assert "+0.0 %" in upcycling.table(operations)


@pytest.fixture(scope="module")
def held():
    real_data()
    return {part: real_text.documents(part) for part in real_text.SPLITS}


def test_nothing_that_is_held_out_is_trained_on(held):
    domains = {part: {document["domain"] for document in held[part]} for part in held}
    assert domains["first"] == domains["second"] == domains["validation"]
    assert len(domains["first"]) == 4
    origin = {}
    for part in held:
        for pairs in (
            *(real_text._questions(name, part) for name in ("plant_disease", "soil")),
            real_text._news(part),
            real_text._passages(part),
        ):
            origin |= {text: source for source, text in pairs}
    sources = []
    for documents in held.values():
        texts = [document["text"] for document in documents]
        assert len(set(texts)) == len(texts)
        sources.append({origin[text] for text in texts})
    for one, other in itertools.combinations(sources, 2):
        assert not one & other
    assert 0.8 < len(held["first"]) / len(held["second"]) < 1.25


def test_cells_are_trained_once_and_operations_are_counted_right(held, tmp_path, monkeypatch):
    for module in (real_text, upcycling):
        monkeypatch.setattr(module, "documents", lambda part: held[part][:40])
    continued = Continued(SMALL, tmp_path)
    for arm in ("dense", "granular"):
        continued.cell(arm, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Continued, "fit", None)
        again = Continued(SMALL, tmp_path)
        granular = again.cell("granular", 0)
        text = upcycling.report(again, ["dense", "granular"], 1)
    assert sorted(granular["curve"]) == ["1", "2"]
    assert granular["curve"]["2"]["ce"] > 0
    assert "| granular" in text
    assert (tmp_path / "qwen3.png").exists()
    # One more network of 3 x 64 x 64, and a router of 8 x 64: 2 operations forward and 4 backward for each number.
    assert continued.operations("naive") - continued.operations("dense") == 6 * (3 * 64 * 64 + 8 * 64)
    # Four halves are two networks; the router has a row for each slice.
    assert continued.operations("granular") - continued.operations("naive") == 6 * 8 * 64
