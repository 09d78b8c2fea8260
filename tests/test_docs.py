"""The worked examples in docs/ run as they are printed, on small substitutes for the models."""

import math
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from agri_moe.cli import main
from agri_moe.models.upcycle import FAMILIES
from tests.conftest import _dense
from tests.test_cli import scalars

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)


def blocks(heading: str) -> list[dict[str, Any]]:
    """The code blocks of a section: file or None, kind, text."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (section,) = [one for one in sections if one.startswith(heading)]
    return [match.groupdict() for match in BLOCK.finditer(section)]


def follow(heading: str) -> list[str]:
    """Write a section's files and run its commands in the working folder; what was run."""
    done = []
    for block in blocks(heading):
        if block["file"]:
            Path(block["file"]).write_text(block["text"])
            continue
        assert block["kind"] == "bash", "what is no file is a command"
        for line in block["text"].splitlines():
            python, script, *args = shlex.split(line)
            assert python == "python"
            if script == "main.py":
                main(args)
            else:
                sys.argv = [script, *args]
                runpy.run_path(script, run_name="__main__")
            done.append(args[0])
    return done


@pytest.fixture
def folder(tmp_path, corpus, dense, teacher, monkeypatch):
    """A folder as `make demo` leaves it, as far as the examples use it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", sys.argv)
    shutil.copytree(ROOT / "configs", "configs")
    for name, source in {"corpus": corpus, "dense": dense, "teacher": teacher}.items():
        shutil.copytree(source, Path("demo_output") / name)
    main(["upcycle", "--source", "demo_output/dense", "--output", "demo_output/upcycled", "--num_experts", "4"])
    return tmp_path


def test_your_rows(folder, capsys):
    assert follow("Your rows") == ["preview", "fit", "export", "generate"]
    out = capsys.readouterr().out
    assert "नाइट्रोजन" in out
    assert "सलाह" in out
    assert (folder / "my_advisor" / "model.safetensors").is_file()


def test_your_model_family(folder, corpus, capsys):
    shape = {"model_type": "olmo2", "tie_word_embeddings": False}
    source = _dense(folder / "allenai" / "OLMo-2-0425-1B", corpus, **shape)
    try:
        assert follow("Your model family") == ["upcycle", "audit"]
    finally:
        del FAMILIES["olmo2"]
    assert "ready" in capsys.readouterr().out
    dense, sparse = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source, "olmo_moe"))
    ids = torch.arange(40)[None]
    assert type(sparse).__name__ == "FlexOlmoForCausalLM"
    # Experts are jittered by a hundredth of their spread: near, and not equal.
    difference = (dense(ids).logits - sparse(ids).logits).std() / dense(ids).logits.std()
    assert 0 < difference < 0.02


def test_your_loss_term(folder):
    assert follow("Your loss term") == ["fit"]
    run = folder / "my_terms_runs" / "lightning_logs" / "version_0"
    logged = scalars(run)
    entropies = [value for _, value in logged["train/decided"]]
    assert len(entropies) == 4
    assert all(0 < value <= math.log(4) for value in entropies), "four experts"


def test_use_as_a_library(folder, capsys):
    """All in one session, as the page says."""
    page = (ROOT / "docs" / "library.md").read_text()
    session: dict[str, Any] = {}
    for block in BLOCK.finditer(page):
        assert block["kind"] == "python", "what is run is Python"
        exec(compile(block["text"], "docs/library.md", "exec"), session)
    out = capsys.readouterr().out
    (difference,) = re.findall(r"change a logit by (\S+) at most", out)
    assert float(difference) < 1e-4
    module, result = session["module"], session["result"]
    trained = {name for name, p in module.model.hf.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    start = session["ModelConfig"](source="sparse").load("start", session["chat"]).state_dict()
    saved = AutoModelForCausalLM.from_pretrained("router_trained", dtype=torch.float32).state_dict()
    assert {name for name in start if not torch.equal(start[name], saved[name])} == trained
    assert sum(name.startswith("val/ce/") for name in result) == len(session["found"]["groups"])
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in ("expert_load.png", "experts_by_crop.png"))
    assert f"Experts over {len(session['prompt'])} tokens of prompts" in out
    assert "perplexity times imbalance" in out


def test_hindi_in_fewer_tokens(tmp_path, corpus, dense, teacher, monkeypatch, capsys):
    """The page's commands, with as few pieces as so little text has, and two steps of the run."""
    monkeypatch.chdir(tmp_path)
    for source, name in ((dense, "Qwen3-0.6B"), (teacher, "Qwen3-14B")):
        shutil.copytree(source, tmp_path / "Qwen" / name)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        shutil.copy(corpus / f"{split}.parquet", tmp_path / "data")
    (block,) = BLOCK.finditer((ROOT / "docs" / "hindi_tokens.md").read_text())
    lines = [shlex.split(line.replace("--pieces 263", "--pieces 60"))[2:] for line in block["text"].splitlines()]
    assert [args[0] for args in lines] == ["tokens", "upcycle", "audit", "fit"]
    for args in lines[:3]:
        main(args)
    assert capsys.readouterr().out.count("bits per byte") == 2
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    steps = ["--trainer.val_check_interval=2", "--trainer.accumulate_grad_batches=1", "--data.num_workers=0"]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    cli = main([*lines[3], *few, *steps, f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.log_every_n_steps=1"])
    assert cli.trainer.global_step == 2
    assert cli.model.merged_tokens is not None
    assert cli.trainer.callback_metrics["val/bits_per_byte"].isfinite()
    assert cli.datamodule.aligned_share > 0.9
    main(["plan", "--config", "configs/hindi_tokens.yaml", *few[2:], "--data.num_workers=0"])
    assert "Fits 80 GB" in capsys.readouterr().out


def test_the_notebook_runs(tmp_path, monkeypatch):
    """With so few of its training steps that curves have two points."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setenv("AGRI_MOE_NOTEBOOK_SHARE", "0.023")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "demo.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    tables = [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert [line.split("|")[1].strip() for line in tables[-1].splitlines()[2:]] == [
        "teacher", "dense", "upcycled", "control", "distilled"
    ]  # fmt: skip
    assert not any(output["output_type"] == "error" for output in outputs)
