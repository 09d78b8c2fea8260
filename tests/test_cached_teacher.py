"""Training from a teacher's answers on disk: the `cache` command, and runs that read what it wrote."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from agri_moe import caching
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.logit_cache import MANIFEST, LogitCache, row_keys
from agri_moe.models.causal import start_rows
from agri_moe.objective import Objective
from agri_moe.teacher import CachedTeacher
from agri_moe.terms import KL, CrossEntropy
from tests.test_cli import main, refused, scalars

ROOT = Path(__file__).parents[1]


def edited(path, name="edited.yaml", **changes):
    """A config with changes of model.init_args (teacher, objective) or data.init_args; a teacher is replaced whole."""
    config = yaml.safe_load(path.read_text())
    for section in ("model", "data"):
        config[section]["init_args"] |= changes.get(section, {})
    config["trainer"] |= changes.get("trainer", {})
    out = path.with_name(name)
    out.write_text(yaml.safe_dump(config, allow_unicode=True))
    return out


@pytest.fixture
def config(distill_config, teacher):
    """Cross-entropy and KL alone, without the callbacks that look inside a teacher."""
    callbacks = [c for c in yaml.safe_load(distill_config.read_text())["trainer"]["callbacks"] if "CKA" not in str(c)]
    objective = {"ce": {"weight": 0.5}, "kl": {"weight": 1.0}}
    return edited(distill_config, "plain.yaml", model={"objective": objective}, trainer={"callbacks": callbacks[:2]})


@pytest.fixture
def small_shards(monkeypatch):
    """Several files even for few rows."""
    monkeypatch.setattr(caching, "SHARD_TOKENS", 8 * 1500)


def write(config, folder, *args):
    main(["cache", "--config", str(config), "--output", str(folder), *args])
    return LogitCache(folder)


def rows_of(corpus):
    return pq.read_table(corpus / "train.parquet").to_pylist()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_from(config, folder, name="cached.yaml", **teacher):
    return edited(config, name, model={"teacher": {"cache": str(folder)} | teacher})


@pytest.mark.parametrize("view", ["same", "native"])
def test_all_tokens_train_as_the_teacher_itself(config, teacher, tmp_path, view):
    """Within what rounding to 0.02 nats makes of the divergence; order, packing and epochs are the run's own."""
    online = edited(
        config, "online.yaml", model={"teacher": {"source": str(teacher), "dtype": "float32", "view": view}}
    )
    cache = write(online, tmp_path / "answers", "--k", "1000000")
    assert cache.header.tokens == cache.header.vocabulary == 640
    main(["fit", "--config", str(online)])
    main(["fit", "--config", str(read_from(config, tmp_path / "answers"))])
    first, second = (scalars(tmp_path / "lightning_logs" / f"version_{i}") for i in range(2))
    for tag, within in {"train/ce": 1e-3, "train/kl": 1e-2, "val/ce": 1e-3, "val/kl": 1e-2}.items():
        assert len(first[tag]) > 0
        assert [v for _, v in second[tag]] == pytest.approx([v for _, v in first[tag]], rel=within), tag
    assert [v for _, v in second["val/agreement"]] == pytest.approx([v for _, v in first["val/agreement"]], abs=5e-3)


def test_each_row_once_with_what_the_teacher_says(config, teacher, chat, tmp_path, small_shards):
    """Against plain transformers, row by row."""
    cache = write(config, tmp_path / "answers", "--k", "8")
    assert len(list((tmp_path / "answers").glob("*.arrow"))) > 2
    data = ChatDataModule(**yaml.safe_load(config.read_text())["data"]["init_args"])
    tables = [data.rows(split).table for split in ("train", "validation")]
    rows = {key: row for table in tables for key, row in zip(row_keys(table).tolist(), table, strict=True)}
    written = dict(cache)
    assert written.keys() == rows.keys()
    assert len(cache) == len(rows)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    start_rows(model, chat.new_marker_pieces)
    for key in list(rows)[::20]:
        ids, segments = torch.tensor(rows[key]["input_ids"]), np.array(rows[key]["segment_ids"])
        log_p = model(ids[None], use_cache=False).logits[0].log_softmax(-1).detach()
        at = [t for t in range(len(ids) - 1) if segments[t + 1] == 4 and ids[t + 1].item() not in chat.control_ids]
        answers = written[key]
        assert answers.positions_N.tolist() == at
        top = log_p[at].topk(8)
        assert (np.sort(top.indices.numpy(), 1) == answers.ids_NK).all()
        expected = log_p[at].gather(1, torch.tensor(answers.ids_NK)).numpy()
        assert np.abs(expected - answers.log_probs_NK).max() < 0.0101
        tail = torch.log1p(-top.values.exp().sum(-1)).numpy()
        assert answers.log_tail_N == pytest.approx(tail, abs=2e-3)
        assert answers.entropy_N == pytest.approx(-(log_p[at].exp() * log_p[at]).sum(-1).numpy(), abs=1e-3)


def test_another_order_packing_and_batch_size(config, tmp_path):
    """What a run reads depends on the row and the position alone."""
    cache = write(config, tmp_path / "answers", "--k", "8")
    teacher, seen = CachedTeacher(cache), []
    objective = Objective(ce=CrossEntropy(1.0), kl=KL(1.0))
    options = yaml.safe_load(config.read_text())["data"]["init_args"]
    for change in ({}, {"max_length": 2000, "tokens_per_batch": 4000, "seed": 3}, {"tokens_per_batch": 1}):
        data = ChatDataModule(**options | change)
        answers = {}
        for batch in data.train_dataloader():
            batch |= objective.select(batch, sorted(data.chat.control_ids))
            found = teacher.entries(batch)
            at = batch["positions"][: len(batch["kl_targets"])]
            where = zip(
                batch["row_ids"].flatten()[at].tolist(), batch["position_ids"].flatten()[at].tolist(), strict=True
            )
            answers |= dict(zip(where, zip(*(t.tolist() for t in found.values()), strict=True), strict=True))
        seen.append(answers)
    assert len(seen[0]) > 1000
    assert seen[0] == seen[1] == seen[2]


def test_killed_and_started_again(config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code = (
        "import os, signal, sys\n"
        "from agri_moe import caching, cli\n"
        "caching.SHARD_TOKENS = 8 * 1500\n"
        "made, write = [], caching.write_shard\n"
        "def killed(path, kind, rows, *more):\n"
        "    if len(made) == int(sys.argv[1]):\n"
        "        path.with_name(path.name + '.partial').write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    made.append(path)\n"
        "    write(path, kind, rows, *more)\n"
        "caching.write_shard = killed\n"
        "import torch; torch.set_num_threads(1)\n"
        "cli.main(['cache', '--config', sys.argv[2], '--output', sys.argv[3], '--kind', 'sampled'])\n"
    )

    def run(after, folder):
        args = [sys.executable, "-c", code, str(after), str(config), str(folder)]
        return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False)

    assert run(2, cut).returncode == -signal.SIGKILL
    left = content(cut)
    assert MANIFEST not in left
    assert len([name for name in left if name.endswith(".arrow")]) == 2
    done = run(-1, cut)
    assert done.returncode == 0, done.stderr
    assert run(-1, whole).returncode == 0
    assert content(cut) == content(whole)
    keys = [key for key, _ in LogitCache(cut)]
    assert len(keys) == len(set(keys)) == 144


def test_two_processes_write_what_one_does(config, tmp_path):
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from agri_moe import caching, cli\n"
        "caching.SHARD_TOKENS = 8 * 1500\n"
        "import sys; cli.main(['cache', '--config', sys.argv[1], '--output', sys.argv[2], '--k', '8'])\n"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(config), str(tmp_path / "two")],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=240)
        assert rank.returncode == 0, output[-3000:]
    env = os.environ | {"WORLD_SIZE": "1"}
    alone = [sys.executable, "-c", code, str(config), str(tmp_path / "one")]
    subprocess.run(alone, cwd=ROOT, env=env, check=True, capture_output=True)
    assert len(list((tmp_path / "one").glob("*.arrow"))) > 2
    assert content(tmp_path / "two") == content(tmp_path / "one")


# ---------------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def answers(tmp_path_factory, corpus, dense, teacher):
    """A cache in the teacher's own view, which the tests copy or only read."""
    folder = tmp_path_factory.mktemp("answers")
    data = {"train": str(corpus / "train.parquet"), "validation": str(corpus / "validation.parquet")}
    data |= {"tokenizer": str(corpus / "tokenizer"), "max_length": 512, "tokens_per_batch": 1024}
    options = {
        "student": {"source": str(dense), "upcycle": {"num_experts": 4, "num_experts_per_tok": 2}},
        "teacher": {"source": str(teacher), "dtype": "float32", "view": "native"},
        "objective": {"kl": {"weight": 1.0}},
    }
    config = {
        "model": {"class_path": "agri_moe.models.distill.DistillModule", "init_args": options},
        "data": {"class_path": "agri_moe.data.chat_data.ChatDataModule", "init_args": data},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    main(["cache", "--config", str(folder / "config.yaml"), "--output", str(folder / "cache"), "--k", "8"])
    return folder / "cache"


def test_a_cache_of_something_else_is_refused(config, answers, corpus, dense, teacher, tmp_path, capsys, no_models):
    """Another teacher, view, tokenizer or template, or other rows; before any weights are loaded."""

    def fit(data=None, **teacher):
        chosen = {"cache": str(answers)} | teacher
        return refused(capsys, "fit", "--config", edited(config, model={"teacher": chosen}, data=data or {}))

    assert "another view (native; this run has same)" in fit(view="same")
    assert "another teacher" in fit(source=str(dense))
    changed = tmp_path / "teacher"
    shutil.copytree(teacher, changed)
    (changed / "chat_template.jinja").write_text((changed / "chat_template.jinja").read_text() + " ")
    assert "another teacher" in fit(source=str(changed))
    assert "another template" in fit({"format": {"user": "<|farmer|>"}})
    other = tmp_path / "tokenizer"
    shutil.copytree(corpus / "tokenizer", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another tokenizer" in fit({"tokenizer": str(other)})
    rows = rows_of(corpus)
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | {"advisory": "कुछ और"}]), tmp_path / "more.parquet")
    assert "other rows: 1 of the 121 of data.train" in fit({"train": str(tmp_path / "more.parquet")})


def test_a_damaged_cache_is_refused(config, answers, tmp_path, capsys, no_models):
    damaged = tmp_path / "damaged"
    shutil.copytree(answers, damaged)
    path = damaged / "00000.arrow"
    original = path.read_bytes()
    path.write_bytes(original[:5000] + bytes([original[5000] ^ 16]) + original[5001:])
    run = ("fit", "--config", read_from(config, damaged))
    assert "00000.arrow is damaged" in refused(capsys, *run)
    path.unlink()
    assert "00000.arrow is missing" in refused(capsys, *run)
    path.write_bytes(original)
    template = damaged / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert "chat_template.jinja is damaged" in refused(capsys, *run)


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        ({"cka": {"weight": 0.1}}, "objective.cka"),
        ({"hidden": {"weight": 0.1}}, "objective.hidden"),
        ({"attention": {"weight": 0.1}}, "objective.attention"),
        ({"kl": {"weight": 1.0, "divergence": "jsd"}}, "objective.kl.divergence"),
        ({"kl": {"weight": 1.0, "divergence": "reverse"}}, "objective.kl.divergence"),
        ({"kl": {"weight": 1.0, "temperature": 2.0}}, "objective.kl.temperature"),
        ({"kl": {"weight": 1.0, "temperature": {"start": 1.0, "end": 2.0, "steps": 9}}}, "objective.kl.temperature"),
        ({"kl": {"weight": 1.0, "segments": ["thought", "assistant"]}}, "objective.kl.segments"),
    ],
)
def test_what_a_cache_cannot_answer_is_refused(config, answers, capsys, no_models, objective, key):
    changed = {"teacher": {"cache": str(answers)}, "objective": {"kl": {"weight": 1.0}} | objective}
    assert key in refused(capsys, "fit", "--config", edited(config, model=changed))


def test_on_policy_steps_and_a_missing_cache_are_refused(config, answers, tmp_path, capsys, no_models):
    changed = {"teacher": {"cache": str(answers)}, "on_policy": {"share": 0.5}}
    assert "model.on_policy.share" in refused(capsys, "fit", "--config", edited(config, model=changed))
    gone = read_from(config, tmp_path / "nowhere")
    assert "holds no manifest.json" in refused(capsys, "fit", "--config", gone)
    assert "needs a source" in refused(capsys, "fit", "--config", edited(config, model={"teacher": {}}))


def test_a_monitor_of_layers_is_refused(distill_config, answers, capsys):
    changed = {"teacher": {"cache": str(answers)}, "objective": {"kl": {"weight": 1.0}}}
    assert "CKAMonitor" in refused(capsys, "fit", "--config", edited(distill_config, model=changed))


def test_the_command_refuses(config, dense, answers, tmp_path, capsys, no_models):
    def cache(changed, output, *args):
        return refused(capsys, "cache", "--config", changed, "--output", output, *args)

    assert "none.yaml" in cache(tmp_path / "none.yaml", tmp_path / "x")
    pretrain = {
        "class_path": "agri_moe.models.pretrain.PretrainModule",
        "init_args": {"network": {"source": str(dense)}},
    }
    other = yaml.safe_load(config.read_text()) | {"model": pretrain}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(other, allow_unicode=True))
    assert "trains with a teacher" in cache(tmp_path / "pretrain.yaml", tmp_path / "x")
    assert "model.teacher.source is missing" in cache(read_from(config, answers), tmp_path / "x")
    assert "data.streaming is true" in cache(edited(config, data={"streaming": True}), tmp_path / "x")
    assert "--k is 0" in cache(config, tmp_path / "x", "--k", "0")
    assert "--draws is 70000" in cache(config, tmp_path / "x", "--draws", "70000")
    assert not (tmp_path / "x").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert "something else" in cache(config, tmp_path / "taken")
    (tmp_path / "busy").mkdir()
    handle = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "being written by another run" in cache(config, tmp_path / "busy")
    os.close(handle)
    before = content(answers)
    assert "another tokens (8, and not 9)" in cache(answers.parent / "config.yaml", answers, "--k", "9")
    assert content(answers) == before


def test_a_plan_counts_no_teacher(config, answers, capsys, no_models):
    def lines(path):
        main(["plan", "--config", str(path)])
        return [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["teacher"]]

    assert lines(config)
    assert not lines(edited(config, model={"teacher": {"cache": str(answers)}}))


def test_a_complete_cache_is_left_alone(answers, capsys, no_models):
    before = content(answers)
    main(["cache", "--config", str(answers.parent / "config.yaml"), "--output", str(answers), "--k", "8"])
    assert content(answers) == before
    assert "144 rows" in capsys.readouterr().out


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_the_shipped_config_writes_and_reads(dense, teacher, corpus, tmp_path, kind):
    """One file for both commands; validation, and a test on rows of their own, from the same cache."""
    shipped = yaml.safe_load((ROOT / "configs" / "distill_cached.yaml").read_text())
    model, data = shipped["model"]["init_args"], shipped["data"]["init_args"]
    model["student"]["source"] = str(dense)
    model["teacher"] |= {"source": str(teacher), "cache": str(tmp_path / "cache")}
    data |= {"tokenizer": str(corpus / "tokenizer"), "max_length": 512, "tokens_per_batch": 2048, "num_workers": 0}
    data |= {split: str(corpus / f"{split}.parquet") for split in ("train", "validation")}
    data |= {"test": str(corpus / "validation.parquet"), "cache_dir": str(tmp_path / "rows")}
    shipped["trainer"] |= {"accelerator": "cpu", "default_root_dir": str(tmp_path), "max_steps": 2}
    shipped["trainer"] |= {"val_check_interval": 4, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    shipped["trainer"] |= {"enable_progress_bar": False, "callbacks": []}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(shipped, allow_unicode=True))
    write(tmp_path / "config.yaml", tmp_path / "cache", "--kind", kind)
    cli = main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert cli.trainer.global_step == 2
    metrics = cli.trainer.callback_metrics
    names = ("train/kl", "val/kl", "val/agreement", "val/teacher_entropy", "val/aligned")
    assert all(metrics[name].isfinite() for name in names if name in metrics)
    assert {"train/kl", "val/kl", "val/agreement"} <= metrics.keys()
    tested = main(["test", f"--config={tmp_path / 'config.yaml'}", "--model.max_new_tokens=8"]).trainer.callback_metrics
    assert tested["test/kl"] == pytest.approx(metrics["val/kl"].item(), rel=1e-5)


def test_plain_text(config, corpus, tmp_path):
    """Every token of a document, in the pieces of the other data module."""
    (tmp_path / "text.txt").write_text("".join(f"{row['advisory']}\n" for row in rows_of(corpus)[:40]), "utf-8")
    changed = yaml.safe_load(config.read_text())
    data = {"tokenizer": str(corpus / "tokenizer"), "train": str(tmp_path / "text.txt"), "validation_share": 0.2}
    data |= {"block_size": 32, "tokens_per_batch": 256, "cache_dir": str(tmp_path / "pieces")}
    changed["data"] = {"class_path": "agri_moe.data.text_data.TextDataModule", "init_args": data}
    config.write_text(yaml.safe_dump(changed, allow_unicode=True))
    write(config, tmp_path / "answers", "--k", "8")
    cli = main(["fit", "--config", str(read_from(config, tmp_path / "answers"))])
    assert cli.trainer.callback_metrics["train/kl"].isfinite()


def test_samples_come_near_the_teacher_itself(config, tmp_path):
    """The divergence of one untrained student: samples are noisy, and one bucket for the tail tells less."""
    values = {}
    for name, args in {"topk": ("--k", "200"), "sampled": ("--kind", "sampled", "--draws", "400")}.items():
        write(config, tmp_path / name, *args)
        run = edited(config, "run.yaml", model={"teacher": {"cache": str(tmp_path / name)}})
        values[name] = main(["validate", "--config", str(run), "--ckpt_path=source"]).trainer.callback_metrics["val/kl"]
    online = main(["validate", "--config", str(config), "--ckpt_path=source"]).trainer.callback_metrics["val/kl"]
    assert 0 < values["topk"] < online
    assert values["sampled"] == pytest.approx(online.item(), rel=0.1)
