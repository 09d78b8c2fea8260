"""`select`: scores and budgets by hand and by brute force, what repeats, and that no order changes the choice."""

import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from agri_moe.cli import main
from agri_moe.data import selection as sel
from agri_moe.data.chat import Chat
from agri_moe.data.selection import RECORD, Fate, Rule
from agri_moe.data.selection_passes import Selection, parse_budget, select_rows
from agri_moe.data.selection_scoring import load_scorer, load_tokenizer
from tests.test_cli import refused

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("AGRI_MOE_DATA", ROOT.parent / "shared" / "data"))


def flat(rows):
    """Rows of ids as select's functions take them: all ids, and the length of each row."""
    ids = np.concatenate([np.array(row, np.uint32) for row in rows])
    return ids, np.array([len(row) for row in rows])


# ---------------------------------------------------------------------- scores


def test_entropies_by_hand():
    rows = [[5, 5, 7, 9], [3], [3, 3, 3], [1, 2, 1, 2, 1]]
    log2, log4 = math.log(2), math.log(4)
    unigram = [log2 / 2 + log4 / 4 + log4 / 4, 0, 0, -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))]
    assert sel.unigram_entropy(*flat(rows)) == pytest.approx(unigram, abs=1e-12)
    # 55 57 79: three pairs; none; 33 33: one; 12 21 12 21: two, twice each.
    assert sel.bigram_entropy(*flat(rows)) == pytest.approx([math.log(3), 0, 0, log2], abs=1e-12)
    # Pairs of the last row: four, of which two are new.
    assert sel.repetition(*flat(rows), n=2) == pytest.approx([0, 0, 0.5, 0.5])
    assert sel.repetition(*flat(rows), n=8).tolist() == [0, 0, 0, 0], "no row is so long"


def test_scores_against_counting():
    draw = random.Random(0)
    rows = [[draw.randrange(1 << draw.randint(1, 18)) for _ in range(draw.randint(1, 60))] for _ in range(300)]

    def counted(row, n):
        grams = Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))
        total = sum(grams.values())
        entropy = -sum(c / total * math.log(c / total) for c in grams.values()) if total else 0.0
        return entropy, 1 - len(grams) / total if total else 0.0

    assert sel.unigram_entropy(*flat(rows)) == pytest.approx([counted(row, 1)[0] for row in rows], abs=1e-9)
    assert sel.bigram_entropy(*flat(rows)) == pytest.approx([counted(row, 2)[0] for row in rows], abs=1e-9)
    for n in (2, 3, 8):
        assert sel.repetition(*flat(rows), n) == pytest.approx([counted(row, n)[1] for row in rows])
    alone = [float(sel.unigram_entropy(*flat([row]))[0]) for row in rows]
    assert sel.unigram_entropy(*flat(rows)).tolist() == alone, "to the last digit: no row hangs on its neighbours"


def test_letters_of_any_script():
    share = sel.letter_share(["abc 12", "गेहूँ की", "<a>\n", "१२ ।", "漢字é"])
    assert share == pytest.approx([3 / 5, 1, 1 / 3, 0, 1])
    assert sel.plain(" cafe\u0301\n\t गेहूँ ") == "café गेहूँ"


def test_tokens_are_those_of_training(corpus):
    texts = ["गेहूँ <|endoftext|> और <|assistant|>", "plain\ntext  twice", "</think>"]
    chat = Chat.load(str(corpus / "tokenizer"))
    ids = [row.ids for row in load_tokenizer(str(corpus / "tokenizer")).encode_batch_fast(texts)]
    assert ids == [chat.encode_text(text) for text in texts]


def test_model_scores_are_those_of_transformers(dense):
    texts = ["गेहूँ में रतुआ", "फसल: धान, लक्षण: पत्तियाँ पीली पड़ रही हैं"]
    from transformers import AutoModelForCausalLM

    model, chat = AutoModelForCausalLM.from_pretrained(dense).eval(), Chat.load(str(dense))
    losses, entropies = [], []
    for text in texts:
        ids = torch.tensor([chat.encode_text(text)])
        with torch.no_grad():
            out = model(ids, labels=ids)
        losses.append(float(out.loss))
        entropies.append(float(torch.distributions.Categorical(logits=out.logits[0, :-1]).entropy().mean()))
    for kind, expected in (("model_loss", losses), ("model_entropy", entropies)):
        ids, lengths, scores = load_scorer(None, kind, str(dense), "cpu")([*texts, "a"])
        assert lengths.tolist() == [*[len(chat.encode_text(text)) for text in texts], 1]
        assert scores == pytest.approx([*expected, 0], rel=1e-4), "one token alone is not predicted"
        assert len(ids) == lengths.sum()


# ---------------------------------------------------------------------- budget


def allocated(budget, weights, capacities):
    """An independent allocation, in fractions: full groups drop out one round at a time, then largest remainders."""
    shares = [0] * len(weights)
    groups = [i for i, c in enumerate(capacities) if c]
    left = min(budget, sum(capacities))
    while groups:
        total = sum(weights[i] for i in groups)
        quota = {i: Fraction(left * weights[i], total) for i in groups}
        full = [i for i in groups if quota[i] >= capacities[i]]
        if not full:
            for i in groups:
                shares[i] = math.floor(quota[i])
            missing = left - sum(shares[i] for i in groups)
            for i in sorted(groups, key=lambda i: (shares[i] - quota[i], i))[:missing]:
                shares[i] += 1
            break
        for i in full:
            shares[i] = capacities[i]
            left -= capacities[i]
            groups.remove(i)
    return shares


def test_allocation_by_hand_and_against_fractions():
    shares = sel.allocate(10, np.array([5.0, 3.0, 1.0]), np.array([100, 100, 100]))
    assert shares.tolist() == [6, 3, 1], "5.56, 3.33, 1.11: the one left goes to the first"
    shares = sel.allocate(10, np.array([1.0, 1.0, 1.0]), np.array([1, 2, 100]))
    assert shares.tolist() == [1, 2, 7], "the small groups give back"
    assert sel.allocate(10, np.array([2.0, 1.0]), np.array([3, 4])).tolist() == [3, 4], "more than there is"
    draw = random.Random(1)
    for _ in range(500):
        n = draw.randint(1, 8)
        capacities = [draw.choice([0, draw.randint(1, 50)]) for _ in range(n)]
        weights = [draw.randint(1, 60) for _ in range(n)]
        budget = draw.randint(1, sum(capacities) + 10)
        shares = sel.allocate(budget, np.array(weights, float), np.array(capacities)).tolist()
        assert shares == allocated(budget, weights, capacities)
        assert sum(shares) == min(budget, sum(capacities))


def test_a_share_is_filled_in_order():
    draw = random.Random(2)
    for _ in range(200):
        costs = [draw.randint(1, 30) for _ in range(draw.randint(0, 40))]
        share = left = draw.randint(0, 200)
        taken = []
        for i, cost in enumerate(costs):
            if cost <= left:
                taken.append(i)
                left -= cost
        assert sel.fill(share, np.array(costs, np.int64)).tolist() == taken


def some_records(rows, draw):
    records = np.zeros(rows, RECORD)
    for i in range(rows):
        values = {"group": draw.randrange(3), "tokens": draw.randint(1, 40), "text": draw.randrange(1 << 63)}
        values |= {"entropy": draw.choice([1.0, 2.0, 3.0, draw.random() * 4]), "density": 4.0, "letters": 1.0}
        for name, value in (values | {"row": values["text"]}).items():
            records[name][i] = value
    return records


def test_no_order_changes_the_choice():
    draw = random.Random(3)
    records = some_records(200, draw)
    signatures = np.array([[draw.randrange(1 << 63) for _ in range(200)] for _ in range(16)], np.uint64)
    signatures[:, 50:60] = signatures[:, 40:50]
    shuffled = np.random.default_rng(0).permutation(200)
    for rule in (
        Rule(budget=37),
        Rule(share=0.3, unit="tokens", allocation="sqrt"),
        Rule(budget=90, within="strata", allocation="equal"),
        Rule(budget=500, near=1.0),
    ):
        found = sel.choose(records, signatures, ["a", "b", "c"], rule)
        again = sel.choose(records[shuffled], signatures[:, shuffled], ["a", "b", "c"], rule)
        assert records["text"][found.order].tolist() == records[shuffled]["text"][again.order].tolist()
        assert (found.fates[shuffled] == again.fates).all()
    groups, scores = records["group"][found.order], found.scores[found.order]
    assert (np.diff(groups) >= 0).all(), "group by group"
    assert all((np.diff(scores[groups == g]) <= 0).all() for g in range(3)), "the highest score first"
    assert found.left == 300, "there are no more than 200 rows"


def test_the_highest_scores_of_each_group_by_tokens():
    records = some_records(60, random.Random(4))
    found = sel.choose(records, np.zeros((16, 60), np.uint64), ["a", "b", "c"], Rule(budget=200, unit="tokens", near=0))
    sizes = [int(records["tokens"][records["group"] == g].sum()) for g in range(3)]
    assert found.shares.tolist() == allocated(200, sizes, sizes)
    for g in range(3):
        left, expected = int(found.shares[g]), []
        rows = [i for i in range(60) if records["group"][i] == g]
        for i in sorted(rows, key=lambda i: (-records["entropy"][i], records["text"][i])):
            if records["tokens"][i] <= left:
                expected.append(i)
                left -= int(records["tokens"][i])
        assert [i for i in found.order if records["group"][i] == g] == expected
    assert found.left == 200 - records["tokens"][found.order].sum()


def test_repetition_and_noise_are_damped():
    records = some_records(10, random.Random(5))
    records["group"], records["entropy"] = 0, 3.0
    records["repetition"][0], records["letters"][1], records["density"][2] = 0.4, 0.5, 1.9
    records["repetition"][3] = 0.7
    found = sel.choose(records, np.zeros((16, 10), np.uint64), ["a"], Rule(budget=7, near=0))
    assert found.scores[0] == pytest.approx(3 * 0.6)
    assert found.order[-1] == 0, "of the seven left the one that repeats itself comes last"
    assert np.flatnonzero(found.fates == Fate.GARBLED).tolist() == [1, 2, 3]
    kept = sel.choose(records, np.zeros((16, 10), np.uint64), ["a"], Rule(budget=10, near=0, damp=False))
    assert len(kept.order) == 10
    assert kept.scores.tolist() == [3.0] * 10


def test_strata_reach_down():
    records = some_records(100, random.Random(6))
    records["group"], records["entropy"] = 0, np.arange(100) / 25 + 1
    found = sel.choose(records, np.zeros((16, 100), np.uint64), ["a"], Rule(budget=40, within="strata", near=0))
    by_stratum = np.bincount(found.order // 10, minlength=10)
    weights = [sum(int(1000 * (i / 25 + 1)) for i in range(10 * s, 10 * s + 10)) for s in range(9, -1, -1)]
    assert by_stratum[::-1].tolist() == allocated(40, weights, [10] * 10)
    assert by_stratum.min() >= 1
    drawn = {int(i) for i in found.order if i >= 90}
    assert drawn == set(sorted(range(90, 100), key=lambda i: records["text"][i])[: len(drawn)]), "drawn by hash"


# ---------------------------------------------------------------------- repeats


def words(draw, n):
    return " ".join("".join(draw.choices("abcdefghijklmnoprstuvwyz", k=draw.randint(2, 9))) for _ in range(n))


def jaccard(a, b):
    a, b = ({f"{t}\0\0\0\0"[i : i + 5] for i in range(len(t))} for t in (a, b))
    return len(a & b) / len(a | b)


def test_similarity_is_that_of_the_sets():
    draw = random.Random(7)
    texts = [words(draw, draw.randint(3, 60)) for _ in range(150)]
    others = []
    for text in texts:
        parts = text.split()
        for i in draw.sample(range(len(parts)), draw.randint(0, len(parts) // 3)):
            parts[i] = words(draw, 1)
        others.append(" ".join(parts))
    n = len(texts)
    found = sel.similarity(sel.signatures(texts + others), np.arange(n), np.arange(n, 2 * n))
    exact = np.array([jaccard(a, b) for a, b in zip(texts, others, strict=True)])
    assert exact.min() < 0.4
    assert np.abs(found - exact).max() < 0.25, "128 bins: a standard deviation of at most 0.045 where there are enough"
    assert np.abs(found - exact).mean() < 0.05
    assert found[exact == 1] == pytest.approx(1)
    unlike = sel.similarity(sel.signatures(texts), np.arange(n - 1), np.arange(1, n))
    assert np.abs(unlike).max() < 0.15
    assert (sel.signatures(["ABC def"]) == sel.signatures(["abc DEF"])).all()


def test_near_repeats_are_found_and_others_left():
    draw = random.Random(8)
    base = [words(draw, 40) for _ in range(100)]
    near = []
    for text in base[:50]:
        parts = text.split()
        parts[draw.randrange(40)] = words(draw, 1)
        near.append(" ".join(parts))
    template = [f"{words(random.Random(9), 30)} number {i} of the list" for i in range(40)]
    far = [" ".join(text.split()[:20] + words(draw, 20).split()) for text in base[50:]]
    texts = base + near + template + far
    dropped = sel.near_repeats(sel.signatures(texts), np.arange(len(texts)), 0.8)
    assert not dropped[:100].any(), "the better ones stay"
    assert dropped[100:150].mean() >= 0.98
    assert not dropped[150]
    assert dropped[151:190].all(), "one of a template is enough"
    assert not dropped[190:].any(), "half a text in common is no repeat"
    backwards = sel.near_repeats(sel.signatures(texts), np.arange(len(texts))[::-1], 0.8)
    assert backwards[:50].mean() >= 0.98
    assert not backwards[100:150].any()
    assert not sel.near_repeats(sel.signatures(texts), np.arange(100), 0.8)[100:].any(), "only rows that are ranked"


# ---------------------------------------------------------------------- files

CROPS = ("गेहूँ", "धान", "कपास")


def chat_rows(n, seed=0):
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        scenario = {"crop": CROPS[i % 3], "note": words(draw, draw.randint(3, 12)), "area": i % 7 or None}
        row = {"scenario": scenario, "thought": words(draw, 15) if i % 4 else None, "advisory": words(draw, 20)}
        rows.append(row | {"number": i, "tags": ["a"] * (i % 3), "lang": "hi"})
    rows[n - 1] = rows[0] | {"number": n - 1}  # an exact repeat
    rows[n - 2] = rows[1] | {"advisory": rows[1]["advisory"] + "."}  # a near one
    return rows


SCHEMA = pa.schema(
    [
        ("scenario", pa.struct([("crop", pa.string()), ("note", pa.large_string()), ("area", pa.int16())])),
        ("thought", pa.string()), ("advisory", pa.string()), ("number", pa.int32()),
        ("tags", pa.list_(pa.string())), ("lang", pa.dictionary(pa.int8(), pa.string())),
    ]
)  # fmt: skip


def write(path, rows, row_group_size=1000):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=row_group_size)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def chosen(corpus, tmp_path):
    """Selects into a file and returns its path."""

    def run(inputs, name="out", num_proc=1, columns=None, **options):
        rule = {key: options.pop(key) for key in list(options) if key in Rule.__dataclass_fields__}
        output = tmp_path / f"{name}.parquet"
        options = {"group_by": ("scenario.crop",), "tokenizer": str(corpus / "tokenizer")} | options
        inputs = [str(path) for path in inputs]
        selection = Selection(inputs, str(output), str(tmp_path), Rule(**rule), columns or {}, **options)
        selection.check()
        run.found = select_rows(selection, num_proc, progress=False)
        return output

    return run


def test_the_output_is_the_same_for_any_order_and_processes(chosen, tmp_path):
    rows = chat_rows(60)
    whole = chosen([write(tmp_path / "a" / "rows.parquet", rows)], "whole", budget=25)
    draw = random.Random(10)
    draw.shuffle(rows)
    parts = [write(tmp_path / "b" / f"{i}.parquet", rows[i::3], row_group_size=7) for i in range(3)]
    shards = chosen(parts[::-1], "shards", num_proc=2, budget=25)
    assert whole.read_bytes() == shards.read_bytes()
    lines = chosen([write(tmp_path / "c" / "rows.jsonl", rows)], "lines", budget=25)
    typed, read = pq.read_table(whole), pq.read_table(lines)
    assert read.to_pylist() == typed.to_pylist(), "also from JSON lines, but for the types of columns"

    assert typed.schema.names == [*SCHEMA.names, "selection_score", "selection_tokens", "selection_group"]
    for field in SCHEMA:
        assert typed.schema.field(field.name).type == field.type
    assert chosen.found["fates"] == {"CHOSEN": 25, "BEYOND_BUDGET": 33, "REPEAT": 1, "NEAR_REPEAT": 1, "GARBLED": 0}
    assert Counter(typed["selection_group"].to_pylist()) == {"कपास": 8, "गेहूँ": 9, "धान": 8}
    original = {row["number"]: row for row in rows}
    for row in typed.to_pylist():
        given = {name: row[name] for name in SCHEMA.names}
        assert given == original[row["number"]]
    assert not list(tmp_path.glob(".select-*")), "nothing is left behind"


def test_scores_in_the_file(chosen, corpus, tmp_path):
    rows = [{"body": words(random.Random(i), 30), "id": i} for i in range(12)]
    rows.append({"body": (words(random.Random(99), 9) + " ") * 2, "id": 12})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = chosen([path], group_by=(), columns={"text": "body"}, budget=13)
    chat = Chat.load(str(corpus / "tokenizer"))
    for row in pq.read_table(output).to_pylist():
        ids = chat.encode_text(row["body"])
        counts = np.array(list(Counter(ids).values())) / len(ids)
        grams = [tuple(ids[i : i + 8]) for i in range(len(ids) - 7)]
        damped = -(counts * np.log(counts)).sum() * len(set(grams)) / len(grams)
        assert row["selection_score"] == pytest.approx(damped, rel=1e-5)
        assert row["selection_tokens"] == len(ids)
        assert row["selection_group"] == "all"
    assert row["id"] == 12, "the repeated text comes last"
    again = chosen([output], "again", group_by=(), columns={"text": "body"}, budget=5)
    assert pq.read_table(again).schema == pq.read_table(output).schema, (
        "of an earlier selection's columns nothing stays"
    )


def test_columns_that_not_every_row_has(chosen, tmp_path):
    one = {"text": words(random.Random(1), 20), "meta": {"b": 1, "a": 2}, "url": "u"}
    two = {"text": words(random.Random(2), 20), "meta": {"a": 2, "c": [1]}}
    outputs = []
    for name, files in {"x": [[one, two]], "y": [[two], [one]]}.items():
        paths = []
        for i, rows in enumerate(files):
            paths.append(tmp_path / f"{name}{i}.jsonl")
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        outputs.append(chosen(paths, name, group_by=("meta.b",), budget=2))
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    found = {row["selection_group"]: row for row in pq.read_table(outputs[0]).to_pylist()}
    assert found["1"]["meta"] == {"a": 2, "b": 1, "c": None}
    assert found["(none)"]["meta"] == {"a": 2, "b": None, "c": [1]}
    assert [found[group]["url"] for group in ("1", "(none)")] == ["u", None]


def test_fields_deep_in_a_row_stand_in_the_same_order_for_any_order_of_rows(chosen, tmp_path):
    one = {
        "text": words(random.Random(1), 20),
        "said": [{"role": "u", "content": "x"}],
        "meta": {"in": {"b": 1, "a": 2}},
    }
    two = {
        "text": words(random.Random(2), 20),
        "said": [{"content": "y", "role": "a"}],
        "meta": {"in": {"a": 3, "c": 4}},
    }
    outputs = []
    for name, files in {"x": [[one, two]], "y": [[two, one]], "z": [[two], [one]]}.items():
        paths = []
        for i, rows in enumerate(files):
            paths.append(tmp_path / f"{name}{i}.jsonl")
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        outputs.append(chosen(paths, name, group_by=(), budget=2))
    assert len({output.read_bytes() for output in outputs}) == 1
    found = {row["text"]: row for row in pq.read_table(outputs[0]).to_pylist()}
    assert found[one["text"]]["said"] == one["said"]
    assert found[one["text"]]["meta"] == {"in": {"a": 2, "b": 1, "c": None}}
    assert found[two["text"]]["meta"] == {"in": {"a": 3, "b": None, "c": 4}}


def test_text_and_csv_files(chosen, tmp_path):
    lines = [words(random.Random(i), 12) for i in range(6)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "rows.csv").write_text("text,n\n" + "".join(f"{words(random.Random(i), 9)},{i}\n" for i in range(4)))
    output = chosen([tmp_path / "lines.txt", tmp_path / "rows.csv"], group_by=(), budget=10)
    table = pq.read_table(output)
    assert len(table) == 10
    assert table.schema.names[:2] == ["n", "text"], "by name, as the files differ"
    assert sorted(n for n in table["n"].to_pylist() if n) == ["0", "1", "2", "3"]


def test_nothing_half_written(chosen, tmp_path, monkeypatch):
    source = write(tmp_path / "rows" / "rows.parquet", chat_rows(30))
    output = chosen([source], budget=5)
    before = output.read_bytes()
    written = pq.ParquetWriter.write_table

    def cut_off(self, table):
        written(self, table)
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", cut_off)
    for name in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            chosen([source], name, budget=9)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["out.parquet"]


def test_a_file_that_changes_between_the_passes(chosen, tmp_path, monkeypatch):
    source = write(tmp_path / "rows" / "rows.jsonl", chat_rows(30))
    choose = Selection.choose

    def meanwhile(self):
        choose(self)
        write(source, chat_rows(30, seed=1))

    monkeypatch.setattr(Selection, "choose", meanwhile)
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed since it was scored"):
        chosen([source], budget=5)


def test_rows_that_cannot_be_used(chosen, tmp_path):
    rows = chat_rows(12)
    rows[3]["advisory"], rows[5]["scenario"]["crop"], rows[7]["advisory"] = " ", ["a"], 5
    source = write(tmp_path / "rows" / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl row 3: advisory is missing or empty; rows count from 0: mend"):
        chosen([source], budget=5)
    with pytest.raises(ValueError, match="row 3"):  # out of another process
        chosen([source, write(tmp_path / "rows" / "more.jsonl", chat_rows(4))], budget=5, num_proc=2)
    with pytest.raises(ValueError, match="--tokenizer /nowhere does not exist"):
        chosen([source, tmp_path / "rows" / "more.jsonl"], budget=5, num_proc=2, tokenizer="/nowhere")
    chosen([source], budget=5, bad_rows="skip")
    assert chosen.found["bad"] == 3
    assert [reason.partition(": ")[2] for reason in chosen.found["rejected"]] == [
        "advisory is missing or empty",
        "scenario.crop is a list, not text, a number or a date",
        "advisory is a int, not text",
    ]
    digits = tmp_path / "digits.jsonl"
    digits.write_text('{"text": "1 2 3"}\n{"text": "4 5 6"}\n')
    with pytest.raises(ValueError, match="none of the 2 rows was chosen: 2 are noise"):
        chosen([digits], group_by=(), budget=2)
    (tmp_path / "mixed.jsonl").write_text('{"text": "one two", "n": 1}\n{"text": "three four", "n": "x"}\n')
    with pytest.raises(ValueError, match=r"mixed\.jsonl: a column cannot be written"):
        chosen([tmp_path / "mixed.jsonl"], group_by=(), budget=2)
    for name, n in (("one", "1"), ("other", '"x"')):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name} five six", "n": {n}}}\n')
    with pytest.raises(ValueError, match="the columns of its files do not fit together"):
        chosen([tmp_path / "one.jsonl", tmp_path / "other.jsonl"], group_by=(), budget=2)


# ---------------------------------------------------------------------- command


def test_the_command_and_its_page(corpus, tmp_path, capsys):
    rows = chat_rows(40)
    rows[2]["advisory"] = "<b>bold & wrong</b> " + rows[2]["advisory"]
    source, output = write(tmp_path / "rows" / "rows.parquet", rows), tmp_path / "new" / "chosen.parquet"
    main(["select", "--input", str(source), "--output", str(output), "--budget", "25%", "--budget_in", "tokens",
          "--group_by", "scenario.crop,lang", "--tokenizer", str(corpus / "tokenizer")])  # fmt: skip
    said = capsys.readouterr().out
    table = pq.read_table(output)
    tokens = sum(table["selection_tokens"].to_pylist())
    assert f"Chosen: {len(table)} rows, {tokens:,} tokens" in said
    assert "1 repeat another row, 1 are much like a better one, 0 are noise" in said
    assert set(table["selection_group"].to_pylist()) == {f"{crop} · hi" for crop in CROPS}
    page = (tmp_path / "new" / "chosen_report" / "index.html").read_text("utf-8")
    assert "गेहूँ · hi" in page
    assert "Chosen, the highest scores" in page
    assert "Left out as near repeats" in page
    assert "<b>bold" not in page
    assert (tmp_path / "new" / "chosen_report" / "scores.png").exists()


def test_a_budget_for_more_than_there_is(corpus, tmp_path, capsys):
    source = write(tmp_path / "rows" / "rows.parquet", chat_rows(20))
    main(["select", "--input", str(source), "--output", str(tmp_path / "out.parquet"), "--budget", "1,000",
          "--tokenizer", str(corpus / "tokenizer"), "--near_duplicates", "0"])  # fmt: skip
    assert len(pq.read_table(tmp_path / "out.parquet")) == 20
    assert "The budget is larger than what is left" in capsys.readouterr().out


def test_budgets():
    assert parse_budget("10%", "rows") == (0, 0.1)
    assert parse_budget("12.5%", "rows") == (0, 0.125)
    assert parse_budget("1,000", "rows") == (1000, None)
    for wrong in ("0", "0%", "101%", "-3", "ten", "1.5", ""):
        with pytest.raises(ValueError, match="--budget is"):
            parse_budget(wrong, "rows")


def test_select_mistakes(capsys, corpus, tmp_path, no_models):
    source = write(tmp_path / "rows" / "rows.parquet", chat_rows(6))
    given = {"--input": source, "--output": tmp_path / "out.parquet", "--budget": 3}
    given |= {"--tokenizer": corpus / "tokenizer"}

    def said(**changes):
        options = given | {f"--{name}": value for name, value in changes.items()}
        return refused(capsys, "select", *[str(x) for pair in options.items() if pair[1] is not None for x in pair])

    assert "--budget is 0" in said(budget="0")
    assert "has no column topic; it has scenario, thought" in said(group_by="topic")
    assert "--group_by scenario.corp: no row has such a value" in said(group_by="scenario.corp")
    assert "has no column body" in said(columns='{"text": "body"}')
    assert "--columns names answer" in said(columns='{"answer": "body"}')
    assert "--tokenizer is not set" in said(tokenizer=None)
    assert "--tokenizer /nowhere does not exist" in said(tokenizer="/nowhere")
    assert "model_entropy and model_loss need a model" in said(score="model_loss")
    assert "--model: /nowhere is no folder or hub name" in said(score="model_loss", model="/nowhere", tokenizer=None)
    assert "is in --input" in said(output=source)
    assert "is in --input" in said(input=source.parent, output=source.parent / "new.parquet")
    assert "is in --input" in said(input=source.parent / "*.parquet", output=source.parent / "new.parquet")
    assert "does not end in .parquet" in said(output=tmp_path / "out.csv")
    assert "--near_duplicates is 0.3" in said(near_duplicates=0.3)
    assert "--num_proc is 0" in said(num_proc=0)
    assert "--seed is -1" in said(seed=-1)
    assert "no file matches" in said(input=tmp_path / "*.nothing")
    (tmp_path / "other.csv").write_text("question,answer\na,b\n")
    assert "has neither scenario and advisory nor text; it has question, answer" in said(input=tmp_path / "other.csv")
    (tmp_path / "out.parquet").write_bytes(b"mine")
    assert "exists; name another file, or give --overwrite true" in said()
    assert (tmp_path / "out.parquet").read_bytes() == b"mine"


@pytest.mark.skipif(not (DATA / "soil_raw.parquet").exists(), reason=f"no real rows in {DATA}")
def test_real_rows(tmp_path, capsys):
    inputs = [DATA / "plant_disease_raw.parquet", DATA / "soil_raw.parquet"]
    main(["select", *[f"--input={path}" for path in inputs], "--output", str(tmp_path / "out.parquet"),
          "--budget", "10%", "--group_by", "topic", "--tokenizer", str(DATA / "qwen3-0.6b")])  # fmt: skip
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    rows = [row for path in inputs for row in pq.read_table(path).to_pylist()]
    assert len(table) == round(0.1 * len(rows))

    def text(row):
        return " ".join("\n".join(row[c] for c in ("scenario", "thought", "advisory") if row[c]).split())

    assert len({text(row) for row in table}) == len(table), "no repeats"
    repeats = len(rows) - len({text(row) for row in rows})
    assert f"{repeats} repeat another row" in capsys.readouterr().out
    scores = {
        topic: [row["selection_score"] for row in table if row["topic"] == topic] for topic in ("soil", "plant_disease")
    }
    assert all(values == sorted(values, reverse=True) for values in scores.values())


# ---------------------------------------------------------------------- many machines


def test_tasks_in_any_number_choose_the_same(corpus, tmp_path, chosen):
    rows = chat_rows(60)
    parts = [write(tmp_path / "rows" / f"{i}.parquet", rows[i::3], row_group_size=7) for i in range(3)]
    whole = chosen(parts, "whole", budget=25)
    selection = Selection(
        [str(path) for path in parts], str(tmp_path / "out.parquet"), str(tmp_path / "work"), Rule(budget=25), {},
        ("scenario.crop",), str(corpus / "tokenizer"),
    )  # fmt: skip
    for name, tasks in (("score", 4), ("choose", 1), ("copy", 3), ("finish", 1)):
        for rank in reversed(range(tasks)):
            getattr(selection, name)(None, rank, tasks)
    assert (tmp_path / "out.parquet").read_bytes() == whole.read_bytes()


def documented():
    """The Python examples of docs/selecting.md: the one for this machine, and the one for many."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "selecting.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture
def example(corpus, tmp_path, monkeypatch):
    """A folder in which the examples of the page work, and what `select` chooses there."""
    (tmp_path / "corpus").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    main(["select", "--input", "corpus/train.parquet", "--output", "command.parquet", "--budget", "10%",
          "--tokenizer", "corpus/tokenizer"])  # fmt: skip
    return tmp_path


def test_the_examples_for_one_machine(example, capsys):
    (line,) = re.findall(r"^python main.py (select .*)$", (ROOT / "docs" / "selecting.md").read_text("utf-8"), re.M)
    main(shlex.split(line))
    assert "Chosen: 12 rows" in capsys.readouterr().out
    exec(documented()[0], {})
    assert "'CHOSEN': 12" in capsys.readouterr().out
    assert len(pq.read_table("selected.parquet")) == 12


def test_datatrove_chooses_the_same(example):
    pytest.importorskip("datatrove", reason='needs the extra: pip install "agri-moe[select]"')
    Path("select_on_many.py").write_text(documented()[1], "utf-8")
    subprocess.run([sys.executable, "select_on_many.py"], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert Path("selected.parquet").read_bytes() == Path("command.parquet").read_bytes()
    assert "Chosen, the highest scores" in Path("selected_report/index.html").read_text("utf-8")
