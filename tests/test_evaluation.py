"""Scores of answers against independent computation; `test` on one rank, on two, sharded, and without a teacher."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sacrebleu
import yaml

from agri_moe.cli import main
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.synthetic import make_rows
from agri_moe.evaluation import MEANINGS, mean, repeated, score_answer, score_answers, table
from tests.ranks import run_ranks
from tests.test_cli import refused, scalars
from tests.test_two_ranks import sharded


def answered(row: dict, thought: str | None, advisory: str, tokens: int = 10, stop_reason: str = "end") -> dict:
    answer = {"generated_thought": thought, "generated_advisory": advisory}
    return row | answer | {"tokens": tokens, "stop_reason": stop_reason}


@pytest.fixture(scope="module")
def truths() -> list[dict]:
    return make_rows(8, seed=3, split="validation")


# ---------------------------------------------------------------------- one answer


def test_the_reference_itself_is_right_in_everything(truths):
    for row in truths:
        scores = score_answer(answered(row, row["thought"], row["advisory"]))
        for name in ("diagnosis", "action", "format", "has_thought", "has_advisory", "ended"):
            assert scores[name] is True, name
        assert scores["devanagari"] == 1.0
        assert scores["loops"] is False


def test_another_rows_advisory_is_wrong(truths):
    first = truths[0]
    other = next(row for row in truths if row["diagnosis"] != first["diagnosis"])
    scores = score_answer(answered(first, "x", other["advisory"]))
    assert scores["diagnosis"] is False
    assert scores["format"] is True


@pytest.mark.parametrize(
    ("thought", "advisory", "stop", "missing"),
    [
        (None, "सलाह", "end", "has_thought"),
        (" ", "सलाह", "end", "has_thought"),
        ("विचार", "", "end", "has_advisory"),
        ("विचार", "सलाह", "length", "ended"),
    ],
)
def test_each_fault_of_form_is_told_apart(thought, advisory, stop, missing):
    scores = score_answer(answered({"advisory": "सलाह"}, thought, advisory, stop_reason=stop))
    assert {n for n in ("has_thought", "has_advisory", "ended") if not scores[n]} == {missing}
    assert scores["format"] is False
    assert scores["diagnosis"] is scores["action"] is None, "the row does not tell what is right"
    assert scores["devanagari"] == (1.0 if advisory else None)


def test_truths_of_other_corpora_are_not_judged_by_this_grammar(truths):
    row = truths[0] | {"diagnosis": "a disease that the grammar has not"}
    assert score_answer(answered(row, "x", row["advisory"]))["diagnosis"] is None


def test_repetition_by_hand():
    assert repeated(["a b c d a b c d"]) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated(["a a a a a a"]) == pytest.approx(2 / 3)
    assert repeated(["a b c d", "a b c d"]) == 0.0, "the thought may be taken up in the advisory"
    assert repeated(["a b c", ""]) == 0.0


# ---------------------------------------------------------------------- all answers


def chrf(answers: list[str], references: list[str]) -> float:
    """chrF (Popović 2015), beta 2, n-grams of 1 to 6 characters without spaces, over a corpus."""
    precision, recall = [], []
    for n in range(1, 7):
        shared = said = wanted = 0
        for answer, reference in zip(answers, references, strict=True):
            a, r = (
                Counter(text[i : i + n] for i in range(len(text) - n + 1))
                for text in (answer.replace(" ", ""), reference.replace(" ", ""))
            )
            shared, said, wanted = shared + (a & r).total(), said + a.total(), wanted + r.total()
        precision.append(shared / said)
        recall.append(shared / wanted)
    p, r = np.mean(precision), np.mean(recall)
    return float(100 * 5 * p * r / (4 * p + r))


def test_chrf_and_bleu_are_the_published_ones(truths):
    rows = [answered(row, "x", truths[i - 1]["advisory"]) for i, row in enumerate(truths)]
    found = score_answers(rows)
    answers, references = [row["generated_advisory"] for row in rows], [row["advisory"] for row in rows]
    assert found.measures["chrf"].value == pytest.approx(chrf(answers, references))
    assert found.measures["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    expected = sacrebleu.corpus_bleu(answers, [references], tokenize="intl").score
    assert found.measures["bleu"].value == pytest.approx(expected)
    assert "tok:intl" in found.signatures["bleu"]
    assert "nc:6" in found.signatures["chrf"]
    low, high = found.measures["chrf"].interval
    assert low < found.measures["chrf"].value < high
    perfect = score_answers([answered(row, row["thought"], row["advisory"]) for row in truths])
    assert [perfect.measures[name].value for name in ("chrf", "bleu")] == pytest.approx([100, 100])


def test_what_is_not_known_of_a_row_is_left_out_and_said(truths):
    plain = {"advisory": "सलाह दें", "diagnosis": None, "action": None}
    rows = [answered(row, "x", row["advisory"], tokens=i) for i, row in enumerate(truths)]
    found = score_answers([*rows, answered(plain, "x", "", tokens=8, stop_reason="length")])
    assert (found.measures["diagnosis"].value, found.measures["diagnosis"].n) == (1.0, 8)
    assert (found.measures["devanagari"].value, found.measures["devanagari"].n) == (1.0, 8)
    assert found.measures["ended"].value == pytest.approx(8 / 9)
    assert found.measures["tokens"].value == found.measures["tokens_median"].value == 4
    assert found.measures["tokens_p90"].value == pytest.approx(7.2)
    text = table(found)
    assert "1 of 9 rows do not tell diagnosis and action" in text
    assert "0.8889" in text
    assert found.as_dict()["rows"] == {"answered": 9, "with_ground_truth": 8}
    assert all(MEANINGS[name] for name in found.measures)


def test_a_single_answer_has_no_interval(truths):
    found = score_answers([answered(truths[0], "x", truths[0]["advisory"])])
    assert all(measure.interval is None for measure in found.measures.values())
    assert found.measures["chrf"].value == pytest.approx(100)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    low, high = mean([0.0, 1.0] * 200).interval
    half = 1.96 * np.sqrt(0.25 / 400)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def run(distill_config: Path) -> Path:
    """The folder of a short run; its first validation row has no truth."""
    config = yaml.safe_load(distill_config.read_text())
    data = config["data"]["init_args"]
    validation = pq.read_table(data["validation"]).slice(0, 21)
    for name in ("diagnosis", "action"):
        values = [None, *validation[name].to_pylist()[1:]]
        at = validation.column_names.index(name)
        validation = validation.set_column(at, name, pa.array(values, pa.string()))
    data["validation"] = str(distill_config.parent / "validation.parquet")
    pq.write_table(validation, data["validation"])
    config["model"]["init_args"]["max_new_tokens"] = 12
    config["trainer"] |= {"max_steps": 2, "callbacks": config["trainer"]["callbacks"][:1]}
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    return main(["fit", "--config", str(distill_config)]).run.folder


def test_test_scores_losses_and_answers(run, distill_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metrics = {k: float(v) for k, v in main(["validate"]).trainer.callback_metrics.items()}
    capsys.readouterr()
    main(["test"])
    text = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    numbers = {name: measure["value"] for name, measure in found["metrics"].items()}
    for name in ("ce", "loss_thought", "kl", "agreement", "balance_score", "cka"):
        assert numbers[name] == pytest.approx(metrics[f"val/{name}"], rel=1e-6), "the test rows are the same"
        assert found["metrics"][name]["n"] > 0
    assert found["rows"] == {"answered": 21, "with_ground_truth": 20}
    assert found["metrics"]["diagnosis"]["n"] == 20
    assert found["metrics"]["ce"]["n"] == sum(
        found["metrics"][name]["n"] for name in ("loss_thought", "loss_assistant")
    )
    assert found["metrics"]["cka"]["of"] == "micro-batches"
    assert "1 of 21 rows do not tell diagnosis and action" in text
    assert text.count("chrF") == 1, "one table"
    logged = scalars(run / "test")
    assert logged["test/chrf"][0][1] == pytest.approx(numbers["chrf"], rel=1e-6)

    rows = [json.loads(line) for line in (run / "test_answers.jsonl").read_text().splitlines()]
    main(["predict"])
    predicted = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    both = [
        [{k: v for k, v in row.items() if k not in ("scores", "seconds")} for row in one] for one in (rows, predicted)
    ]
    assert both[0] == both[1]
    assert [row["row_id"] for row in rows] == list(range(21))
    answers, references = [row["generated_advisory"] for row in rows], [row["advisory"] for row in rows]
    assert numbers["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert numbers["tokens"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    assert max(row["tokens"] for row in rows) <= 12


def test_answers_may_be_left_out_or_limited(run, distill_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["test", "--config", str(distill_config), "--model.max_new_tokens=0"])
    found = json.loads((run / "evaluation.json").read_text())
    assert "ce" in found["metrics"]
    assert "chrf" not in found["metrics"]
    assert not (run / "test_answers.jsonl").exists()
    assert "at least 1" in refused(capsys, "predict", "--model.max_new_tokens=0")
    assert "at least 0" in refused(capsys, "test", "--model.max_new_tokens=-1")
    main(["test", "--trainer.limit_test_batches=2"])
    assert json.loads((run / "evaluation.json").read_text())["rows"]["answered"] == 4, "two micro-batches of two rows"


def test_a_model_without_a_teacher(run, distill_config, dense, tmp_path):
    config = yaml.safe_load(distill_config.read_text())
    config["model"] = {
        "class_path": "PretrainModule",
        "init_args": {"network": {"source": str(dense)}, "max_new_tokens": 4},
    }
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    main(["test", "--config", str(path), "--ckpt_path=source", f"--trainer.default_root_dir={tmp_path / 'new'}"])
    found = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert found["checkpoint"] == "source"
    assert {"ce", "chrf", "format"} <= found["metrics"].keys()
    assert not {"kl", "agreement"} & found["metrics"].keys()


def test_a_test_without_rows_says_so(corpus):
    options = {"train": str(corpus / "train.parquet"), "streaming": True, "validation_share": 0.0}
    data = ChatDataModule(tokenizer=str(corpus / "tokenizer"), **options)
    for loader in (data.test_dataloader, data.predict_dataloader):
        with pytest.raises(ValueError, match=r"set data\.test"):
            loader()


def test_ranks_share_the_rows_and_find_the_same(run, distill_config, tmp_path):
    """21 rows in batches of two: the second rank has fewer, and a sharded model answers on both at once."""
    config = yaml.safe_load(distill_config.read_text())
    main(["test", "--config", str(distill_config)])
    alone = json.loads((run / "evaluation.json").read_text())
    config["trainer"] |= sharded(2)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    code = (
        "import torch; torch.set_num_threads(1); from agri_moe.cli import main\n"
        f"for command in ('test', 'predict'): main([command, '--config', {str(path)!r}])"
    )
    run_ranks(["-c", code], 2)
    together = json.loads((run / "evaluation.json").read_text())
    assert together["rows"] == alone["rows"]
    for name in ("ce", "kl", "chrf", "tokens", "diagnosis", "repeated"):
        assert together["metrics"][name]["n"] == alone["metrics"][name]["n"], name
        assert together["metrics"][name]["value"] == pytest.approx(alone["metrics"][name]["value"], rel=1e-4), name
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["row_id"] for row in rows] == list(range(21))
