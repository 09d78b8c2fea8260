"""What a run leaves for its report, and the report itself: one small run serves most of it."""

import json
import re
from base64 import b64decode
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from agri_moe import page, reporting, similarity
from agri_moe.callbacks.throughput import Throughput
from agri_moe.cli import main
from agri_moe.data.chat import Segment
from agri_moe.metrics import CKAMatrix
from agri_moe.reporting import Curve, Record, warnings
from agri_moe.runs import Run
from tests.test_cli import refused, scalars


def make_record(folder, **changes) -> Record:
    """A run about which nothing is known but that it has finished."""
    empty = {name: {} for name in ("curves", "images", "cka", "routing", "attention", "samples", "similarity")}
    options = {"run": Run(folder), "config": {}, "status": {"status": "finished"}, "seconds": None} | empty
    return Record(**options | changes)


# ---------------------------------------------------------------------- a run, from fit to its page


def fit(config, folder, *callbacks):
    """Run fit with more callbacks, in a folder of its own; the run's folder."""
    content = yaml.safe_load(config.read_text())
    content["trainer"]["default_root_dir"] = str(folder)
    content["trainer"]["callbacks"] += [{"class_path": f"agri_moe.callbacks.{name}"} for name in callbacks]
    path = config.parent / "changed.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return main(["fit", "--config", str(path)]).run.folder


def test_a_run_and_its_page(distill_config, corpus, teacher, tmp_path, capsys, monkeypatch):
    plain = fit(distill_config, tmp_path / "plain")
    run = fit(distill_config, tmp_path, "before.ValidateFirst", "attention.AttentionMonitor")

    # Validation before the first step changes nothing of training, and every monitor has its beginning.
    names = [folder / "checkpoints" / "step=00000006.ckpt" for folder in (plain, run)]
    states = [torch.load(name, weights_only=True)["state_dict"] for name in names]
    trained = {name: value for name, value in states[0].items() if name.startswith("model.")}
    assert all(torch.equal(value, states[1][name]) for name, value in trained.items())
    logged = scalars(run)
    assert [step for step, _ in logged["val/ce"]] == [0, 5]
    assert logged["val/ce"][1] == scalars(plain)["val/ce"][0]
    for kind in ("cka", "routing", "attention"):
        assert {p.name for p in (run / kind).iterdir()} == {"step=00000000.npz", "step=00000006.npz"}
    routing = np.load(run / "routing" / "step=00000006.npz")
    assert routing["load"].shape == (2, 4)
    assert routing["load"].sum(1) == pytest.approx([1, 1])
    assert routing["balance"].mean() == pytest.approx(logged["val/balance_score"][1][1])
    status = json.loads((run / "run.json").read_text())
    assert status["experts"] == {"per_layer": 4, "per_token": 2}
    assert status["parameters"]["active"] < status["parameters"]["total"]

    texts = {step: reporting.parse_samples(run / "samples" / f"step={step:08d}.md") for step in (0, 6)}
    assert [s.teacher_advisory for s in texts[0]] == [s.teacher_advisory for s in texts[6]]
    assert all(s.teacher_advisory is not None for s in texts[0])

    # What the run does not hold is said, with what would record it.
    monkeypatch.chdir(tmp_path)
    main(["report"])
    assert "Report: lightning_logs/version_0/report/index.html" in capsys.readouterr().out
    html = (run / "report" / "index.html").read_text()
    assert html.count("Not recorded by this run") == 3
    assert "--group_by COLUMN" in html
    assert "python main.py test scores what the model answers" in html

    found = {
        "checkpoint": "checkpoints/step=00000006.ckpt",
        "metrics": {
            "chrf": {"value": 84.51234, "n": 240, "of": "rows", "interval_95": [83.1, 85.87]},
            "kl": {"value": 0.0069, "n": 11451, "of": "tokens"},
            "kl/layer_01": {"value": 1.0, "n": 1, "of": "tokens"},
        },
    }
    (run / "evaluation.json").write_text(json.dumps(found))
    rows = [("chrf", "84.51", "83.1 to 85.87", "240 rows"), ("kl", "0.0069", "", "11,451 tokens")]
    assert reporting.tested(reporting.read_record(run)) == ("step=00000006.ckpt", rows)
    main(["report"])
    html = (run / "report" / "index.html").read_text()
    assert html.count("Not recorded by this run") == 2
    assert "chrF of advisories against references" in html

    checkpoint, rows = names[1], corpus / "validation.parquet"
    compare = ["similarity", "--source", checkpoint, "--target", teacher, "--data", rows, "--tokens", 256]
    compare += ["--batch_size", 64, "--group_by", "scenario.फसल", "--output", run / "similarity"]
    main([str(arg) for arg in compare])
    assert "source layer   0: most like target layer" in capsys.readouterr().out
    found = np.load(run / "similarity" / "similarity.npz")
    assert found["cka"].shape == (2, 4)
    assert found["experts"].shape == (2, 4, 4)
    assert found["experts"].diagonal(axis1=1, axis2=2) == pytest.approx(1, abs=1e-5)
    assert found["load_by_group"].sum(2) == pytest.approx(1)
    crops = {row["फसल"] for row in pq.read_table(rows)["scenario"].to_pylist()}
    assert set(found["groups"].tolist()) <= crops
    assert "holds a similarity.npz" in refused(capsys, *compare)

    # The same tokens, by the project's own metric.
    chat = similarity.load_chat(str(checkpoint))
    sample, _ = similarity.read_sample(str(rows), chat, {}, None, 256, 2048)
    features = [
        similarity.read_features(similarity.load_model(str(path), "--x", chat), chat, sample, 256, "cpu")
        for path in (checkpoint, teacher)
    ]
    hf = similarity.load_model(str(teacher), "--x", chat).hf
    row = sample[0]
    answer = torch.tensor([segment >= Segment.THOUGHT for segment in row.segment_ids[1:]])
    with torch.no_grad():
        streams = hf(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
    assert torch.allclose(features[1].layers[1][: int(answer.sum())], streams[2][0, :-1][answer], atol=1e-5)
    metric = CKAMatrix(2, 4)
    for start in range(0, 256, 64):
        metric.update(*([x[start : start + 64] for x in side.layers] for side in features))
    assert found["cka"] == pytest.approx(metric.compute().numpy(), abs=1e-4)

    main(["report", "--run", str(run)])
    html = (run / "report" / "index.html").read_text()
    assert "Not recorded" not in html
    # One file without a network, every picture whole and lying beside it too.
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "<script" not in html
    pictures = [b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    beside = {p.name: p.read_bytes() for p in (run / "report").glob("*.png")}
    assert set(pictures) == set(beside.values())
    assert set(beside) == {
        f"{name}.png"
        for name in (
            "losses",
            "perplexity",
            "cka",
            "expert_load",
            "routing",
            "experts",
            "attention",
            "attention_map_first",
        )
    } | {"attention_map_last.png"}
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    row = pq.read_table(rows).slice(0, 1).to_pylist()[0]
    for expected in ("student before training", "student after 6 steps", row["advisory"], "device-hours", "सलाह"):
        assert expected in html
    assert f"{logged['val/ce'][0][1]:.4f}" in html

    main(["report", "--run", str(run), f"--run={plain}", "--output", "both"])
    html = (tmp_path / "both" / "index.html").read_text()
    assert "1: version_0" in html
    assert "2: version_0" in html
    assert "nothing" in html, "no setting differs that makes a run another experiment"
    assert "needs --output DIR" in refused(capsys, "report", "--run", run, "--run", plain)


def test_report_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train first with fit" in refused(capsys, "report")
    assert "no run's folder" in refused(capsys, "report", "--run", tmp_path)
    (tmp_path / "step=00000001.md").write_text("something else")
    with pytest.raises(ValueError, match="no file that SampleAdvisories wrote"):
        reporting.parse_samples(tmp_path / "step=00000001.md")


def test_text_of_rows_is_never_html(tmp_path):
    path = tmp_path / "step=00000001.md"
    path.write_text(
        "**स्थिति** a <script>alert(1)</script>\n\n**विचार** \n\n**सलाह** b & c\n\n**संदर्भ (reference)** d\n"
        "\n---\n\n**स्थिति** e\nf\n\n**विचार** g\n\n**सलाह** h\n\n"
        "**शिक्षक (teacher)** **विचार** j\n\n**सलाह** k\n---\n\nl\n\n**संदर्भ (reference)** i\n"
    )
    samples = reporting.parse_samples(path)
    assert [s.scenario for s in samples] == ["a <script>alert(1)</script>", "e\nf"]
    assert [s.thought for s in samples] == ["", "g"]
    assert [(s.advisory, s.teacher_thought, s.teacher_advisory, s.reference) for s in samples] == [
        ("b & c", None, None, "d"),
        ("h", "j", "k\n---\n\nl", "i"),
    ]
    html = page.answers({"now": samples})
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "b &amp; c" in html


# ---------------------------------------------------------------------- warnings


def test_a_good_run_is_not_warned_about(tmp_path):
    load = np.array([[0.3, 0.2, 0.25, 0.25]])
    routing = {6: {"load": load, "balance": np.array([0.99]), "normalized_entropy": np.array([0.9])}}
    falling = Curve(list(range(40)), [3 / (1 + step) for step in range(40)])
    assert warnings(make_record(tmp_path, routing=routing, curves={"train/ce": falling, "val/ce": falling})) == []


def test_routers_that_went_wrong_are_named_by_layer_and_expert(tmp_path):
    load = np.array([[0.96, 0.04, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.49, 0.01, 0.25, 0.25]])
    now = {"load": load, "balance": np.array([0.1, 1.0, 0.8]), "normalized_entropy": np.array([0.5, 0.995, 0.9])}
    healthy = {"load": load[1:2], "balance": np.ones(1), "normalized_entropy": np.full(1, 0.9)}
    said = warnings(make_record(tmp_path, routing={0: healthy, 9: now}))
    assert [line.split(":")[0] for line in said] == [
        "Collapsed layer",
        "Dead experts",
        "Idle experts",
        "Undecided routers",
    ]
    assert "layer 0 is 0.10" in said[0]
    assert "of layer 0, number 2, 3 took no assignments" in said[1]
    assert "of layer 2, number 1 took less than 2.5% of the assignments" in said[2]
    assert "layer 1 the" in said[3]


def test_losses_that_went_wrong(tmp_path):
    values = [2.0, 1.9, 1.8, 1.8, 1.7, 1.7, 1.6, 1.6, 1.6, 1.5, 4.0, 1.5, float("nan")]
    curves = {
        "train/ce": Curve([10 * i + 9 for i in range(len(values))], values),
        "val/kl": Curve([49, 99, 149], [0.5, 0.2, 0.3]),
    }
    said = warnings(make_record(tmp_path, curves=curves, status={"status": "running"}))
    assert len(said) == 4
    assert "has not finished" in said[0]
    assert "train/ce is not finite at 1 entries, first at step 130" in said[1]
    assert "train/ce jumped to 4 at step 110, from a median of 1.7" in said[2]
    assert "val/kl ends at 0.3, above the 0.2 of step 100" in said[3]


# ---------------------------------------------------------------------- throughput


def test_time_in_validation_does_not_count(monkeypatch):
    now = iter([0.0, 10.0, 110.0])  # begin; validation begins; validation ends
    monkeypatch.setattr("agri_moe.callbacks.throughput.time.perf_counter", lambda: next(now))
    trainer = SimpleNamespace(global_step=0, training=False)  # as Lightning has it while it validates
    callback = Throughput()
    callback.on_train_start(trainer, None)
    callback.on_validation_start(trainer, None)
    callback.on_validation_end(trainer, None)
    assert callback._started == 100.0
