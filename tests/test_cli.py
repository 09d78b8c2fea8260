"""The commands as a user gives them, in this process; SIGKILL needs one of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from agri_moe.cli import TOOLS, TRAINING, main

ROOT = Path(__file__).parents[1]


def refused(capsys, *args: str) -> str:
    """Run a command that must end with exit status 2 and one sentence; the sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---------------------------------------------------------------------- help


def test_help_lists_every_command_with_an_example(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    for command in [*TRAINING, *TOOLS]:
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
        assert f"python main.py {command}" in text


def test_unknown_command_is_named(capsys):
    assert "fitt is no command" in refused(capsys, "fitt")


# ---------------------------------------------------------------------- bad input: one sentence, before any model


def changed(config: Path, table: Path, column: str, values: list | None) -> Path:
    """A copy of a Parquet file with a column replaced, or left out."""
    rows = pq.read_table(table)
    at = rows.column_names.index(column)
    rows = rows.remove_column(at)
    if values is not None:
        rows = rows.append_column(column, pa.array(values))
    path = config.parent / "changed.parquet"
    pq.write_table(rows, path)
    return path


def test_missing_column(capsys, no_models, distill_config, corpus):
    path = changed(distill_config, corpus / "train.parquet", "advisory", None)
    message = refused(capsys, "fit", "--config", distill_config, f"--data.train={path}")
    assert "changed.parquet has no column advisory" in message
    assert "data.columns" in message


def test_empty_advisory(capsys, no_models, distill_config, corpus):
    values = pq.read_table(corpus / "train.parquet")["advisory"].to_pylist()
    values[3] = "  "
    path = changed(distill_config, corpus / "train.parquet", "advisory", values)
    message = refused(capsys, "fit", "--config", distill_config, f"--data.train={path}")
    assert "changed.parquet row 3: advisory is empty" in message
    assert "data.bad_rows: skip" in message


def test_truncated_parquet(capsys, no_models, distill_config, corpus):
    path = distill_config.parent / "cut.parquet"
    path.write_bytes((corpus / "train.parquet").read_bytes()[:-100])
    message = refused(capsys, "fit", "--config", distill_config, f"--data.train={path}")
    assert "cut.parquet cannot be read as parquet" in message


@pytest.mark.parametrize(
    ("option", "needle"),
    [
        ("--model.objective.kl.wieght=2", "wieght"),
        ("--data.max_lenght=2", "max_lenght"),
        ("--trainer.max_stepz=2", "max_stepz"),
        ("--model.objective.kl.weight=heavy", "objective.kl.weight"),
        ("--model.objective.kl.weight=-1", "objective.kl.weight"),
        ("--model.objective.attentoin.weight=1", "attentoin"),
        ("--model.teacher.view=sideways", "view"),
        ("--model.student.upcycle.num_experts=0", "num_experts"),
        ("--model.freeze=[nothing_like_it]", "nothing_like_it"),
    ],
)
def test_wrong_key_or_value(capsys, no_models, distill_config, option, needle):
    message = refused(capsys, "fit", "--config", distill_config, option)
    assert needle in message
    assert len(message) < 400, "one sentence, not the parser's whole usage"


def test_unknown_key_in_the_file(capsys, no_models, distill_config):
    content = yaml.safe_load(distill_config.read_text())
    content["model"]["init_args"]["objective"]["kl"]["wieght"] = 1
    distill_config.write_text(yaml.safe_dump(content))
    assert "wieght" in refused(capsys, "fit", "--config", distill_config)


def test_missing_teacher(capsys, no_models, distill_config):
    message = refused(capsys, "fit", "--config", distill_config, "--model.teacher.source=/nowhere/teacher")
    assert "model.teacher.source: /nowhere/teacher" in message


def test_missing_config_file(capsys):
    assert "absent.yaml" in refused(capsys, "fit", "--config", "absent.yaml")


def test_vocabularies_that_cannot_match(capsys, no_models, distill_config, teacher, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(teacher, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    message = refused(capsys, "fit", "--config", distill_config, f"--model.teacher.source={small}")
    assert "64 vocabulary rows" in message


def test_another_tokenizer_is_named_by_its_first_differing_token(capsys, no_models, distill_config, teacher, tmp_path):
    from agri_moe.data.synthetic import make_rows, train_tokenizer

    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    train_tokenizer(make_rows(40, seed=9, split="train"), vocab_size=500).save_pretrained(other)
    message = refused(capsys, "fit", "--config", distill_config, f"--model.teacher.source={other}")
    assert "model.teacher.source: the tokenizer of" in message


def test_output_folder_that_exists(capsys, dense, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    for args in (["upcycle", "--source", dense], ["export"], ["corpus"]):
        message = refused(capsys, *args, "--output", tmp_path / "there")
        assert "exists" in message
    assert (tmp_path / "there" / "file").read_text() == "kept"


def test_validate_without_a_run_scores_nothing(capsys, no_models, distill_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "train first with fit" in refused(capsys, "validate")
    assert "holds no run with this config" in refused(capsys, "validate", "--config", distill_config)


def test_tool_mistakes(capsys, tmp_path):
    assert "required: source" in refused(capsys, "upcycle", "--output", tmp_path / "x")
    assert "num_expertz" in refused(capsys, "upcycle", "--source", "a", "--output", "b", "--num_expertz", "4")
    assert "either --scenario" in refused(capsys, "generate", "--model", "x")


# ---------------------------------------------------------------------- the run


@pytest.fixture
def undisturbed(distill_config):
    """A whole run: fit on a small corpus."""
    cli = main(["fit", "--config", str(distill_config)])
    return cli, distill_config.parent / "lightning_logs" / "version_0"


def test_the_main_job(undisturbed, distill_config, tmp_path, capsys, monkeypatch):
    """fit writes what it promises; validate, test, predict, export and generate follow from it."""
    cli, run = undisturbed
    logged = scalars(run)
    for term in ("ce", "kl", "cka", "balance", "router_z"):
        assert [s for s, _ in logged[f"train/{term}"]] == list(range(6))
        assert len(logged[f"val/{term}"]) == 1
    for name in ("val/loss_thought", "val/loss_assistant", "val/agreement", "val/balance_score", "val/dead_experts"):
        assert np.isfinite(logged[name][0][1])
    assert len(logged["router_entropy/layer_01"]) == len(logged["expert_balance/layer_00"]) == 6
    assert len(logged["throughput/tokens_per_second"]) == 6
    assert logged["train/ce"][-1][1] < logged["train/ce"][0][1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    assert set(events.Tags()["images"]) == {"cka", "expert_load"}
    assert events.Tags()["tensors"] == ["advisories/text_summary"]
    matrix = np.load(run / "cka" / "step=00000006.npz")["cka"]
    assert matrix.shape == (2, 4)
    assert "reference" in (run / "samples" / "step=00000006.md").read_text()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert not (run / "lock.json").exists()
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {f"step=0000000{n}.ckpt{end}" for n in (4, 6) for end in ("", ".complete")}

    content = torch.load(run / "checkpoints" / "step=00000006.ckpt", weights_only=True)
    assert not any("teacher" in name for name in content["state_dict"])
    expected = dict(cli.model.model.hf.state_dict())

    monkeypatch.chdir(tmp_path)
    again = main(["validate"])
    assert float(again.trainer.callback_metrics["val/ce"]) == pytest.approx(logged["val/ce"][0][1], rel=1e-6)
    by_config = main(["validate", "--config", str(distill_config)])
    assert by_config.run == again.run or by_config.run.folder.samefile(again.run.folder)
    assert by_config.trainer.callback_metrics["val/ce"] == again.trainer.callback_metrics["val/ce"]
    assert "test/ce" in main(["test", "--model.max_new_tokens=8"]).trainer.callback_metrics
    main(["predict", "--model.max_new_tokens=8"])
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 24
    assert {"scenario", "generated_thought", "generated_advisory", "stop_reason"} <= answers[0].keys()

    main(["export", "--output", "rounded"])  # to bfloat16
    main(["export", "--output", "advisor", "--dtype", "float32"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "advisor", dtype="auto")
    state = plain.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    config = json.loads((tmp_path / "advisor" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["norm_topk_prob"] is True
    assert config["eos_token_id"] == AutoTokenizer.from_pretrained(tmp_path / "advisor").eos_token_id
    message = refused(capsys, "export", "--output", "advisor")
    assert "exists" in message

    checkpoint = run / "checkpoints" / "step=00000006.ckpt"
    texts = []
    for model in ("advisor", str(checkpoint)):
        capsys.readouterr()
        main(["generate", "--model", model, "--scenario", "फसल: धान <|assistant|> </s>", "--max_new_tokens", "12"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1], "the exported folder writes what the checkpoint writes"
    generate = ["generate", "--model", "advisor", "--max_new_tokens", "8", "--output", "out.parquet", "--input"]
    main([*generate, yaml.safe_load(distill_config.read_text())["data"]["init_args"]["validation"]])
    table = pq.read_table("out.parquet")
    assert table.num_rows == 24
    assert set(table["stop_reason"].to_pylist()) <= {"end", "length"}


def test_pretraining_on_plain_text(distill_config, corpus, tmp_path, capsys):
    """The other module and the other data module, through the same command."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(pq.read_table(corpus / "train.parquet")["advisory"].to_pylist()), encoding="utf-8")
    config = yaml.safe_load(distill_config.read_text())
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config["model"] = {
        "class_path": "PretrainModule",
        "init_args": {
            "network": {"config": {"model_type": "qwen3"} | shape | heads},
            "learning_rate": 0.01,
            "optimizer": {"warmup_steps": 1},
        },
    }
    options = {"train": str(text), "tokenizer": str(corpus / "tokenizer"), "block_size": 64, "tokens_per_batch": 512}
    config["data"] = {"class_path": "agri_moe.data.text_data.TextDataModule", "init_args": options}
    # A folder of their own for what is refused: TensorBoard reads a run's event files by name, and of two that one
    # process began in one second the tenth comes before the ninth.
    config["trainer"]["default_root_dir"] = str(tmp_path / "refused")
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    assert "only DistillModule has" in refused(capsys, "fit", "--config", path)
    config["trainer"]["callbacks"] = [config["trainer"]["callbacks"][3]]
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    assert "only ChatDataModule has" in refused(capsys, "fit", "--config", path)
    config["trainer"] |= {"callbacks": [], "default_root_dir": str(tmp_path)}
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    main(["fit", "--config", str(path)])
    logged = scalars(tmp_path / "lightning_logs" / "version_0")
    assert logged["train/ce"][-1][1] < logged["train/ce"][0][1]
    assert "val/loss_assistant" in logged
    assert "train/kl" not in logged


def test_a_finished_run_is_left_alone_and_another_config_never_resumed(undisturbed, distill_config):
    _, run = undisturbed
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    main(["fit", "--config", str(distill_config), "--trainer.max_steps=2", "--trainer.callbacks=[]"])
    assert (run.parent / "version_1" / "checkpoints" / "step=00000002.ckpt").exists()
    (run.parent / "version_1" / "run.json").write_text(
        json.dumps(json.loads((run.parent / "version_1" / "run.json").read_text()) | {"status": "running"})
    )
    other = ["--model.learning_rate=0.5", "--trainer.max_steps=1", "--trainer.callbacks=[]"]
    main(["fit", "--config", str(distill_config), *other])
    assert (run.parent / "version_2" / "checkpoints" / "step=00000001.ckpt").exists()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_resume_under_another_config_says_what_differs(undisturbed, distill_config, capsys):
    _, run = undisturbed
    checkpoint = run / "checkpoints" / "step=00000004.ckpt"
    args = ["fit", "--config", distill_config, "--model.learning_rate=0.5", f"--resume={checkpoint}"]
    message = refused(capsys, *args)
    assert "learning_rate: 0.01 -> 0.5" in message
    assert "--resume_anyway" in message
    cli = main([*map(str, args), "--resume_anyway=true", "--trainer.callbacks=[]"])
    assert cli.trainer.global_step == 6
    assert (run.parent / "version_1").exists()


def test_killed_and_started_again_ends_bit_for_bit_the_same(distill_config, tmp_path):
    """Each time in a process of its own: what other tests leave behind in this one is no part of the promise."""

    def fit(name, *callbacks):
        config = yaml.safe_load(distill_config.read_text())
        config["trainer"]["default_root_dir"] = str(tmp_path / name)
        config["trainer"]["callbacks"] += callbacks
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        code = "import torch; torch.set_num_threads(1); from agri_moe.cli import main; main()"
        command = [sys.executable, "-c", code, "fit", "--config", str(path)]
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    whole = fit("whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    died = fit("killed", {"class_path": "killer.KillAt", "init_args": {"step": 5}})
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    run, again = (tmp_path / name / "lightning_logs" / "version_0" for name in ("whole", "killed"))
    assert json.loads((again / "run.json").read_text())["status"] == "running"

    went_on = fit("killed")
    assert went_on.returncode == 0, went_on.stderr[-2000:]
    assert not (again.parent / "version_1").exists()
    states = [
        torch.load(folder / "checkpoints" / "step=00000006.ckpt", weights_only=True)["state_dict"]
        for folder in (run, again)
    ]
    others = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert not others
    first, second = scalars(run), scalars(again)
    assert first.keys() == second.keys()
    for tag in first:
        if not tag.startswith("throughput"):
            assert first[tag] == second[tag], f"{tag}: one continuous curve, the same values"


def test_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(undisturbed, distill_config, recwarn):
    _, run = undisturbed
    newest = run / "checkpoints" / "step=00000006.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"status": "running"}))
    cli = main(["fit", "--config", str(distill_config), "--trainer.callbacks=[]"])
    assert cli.trainer.global_step == 6
    assert any("step=00000006.ckpt is damaged" in str(w.message) for w in recwarn)
    assert newest.with_name(newest.name + ".damaged").exists()
    assert newest.exists(), "the step was trained and saved again"
