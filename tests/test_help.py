"""Every command's help answers at once, and its example works as printed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from agri_moe.cli import TOOLS, TRAINING, main
from tests.conftest import _dense

ROOT = Path(__file__).parents[1]
ENDLESS = {"chat"}
"""Commands that serve until they are stopped: their examples are parsed, and what they call is left out."""


def helped(capsys, command: str) -> str:
    """What a command's --help prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def example(text: str) -> str:
    """The one example in a help text, a whole line that can be copied."""
    (line,) = re.findall(r"^example: (.*)$", text, re.MULTILINE)
    return line


def ends_at_once(folder: Path) -> None:
    """Change a model so that it ends every answer with its first token: nothing here is about what it says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows += 1.0  # every token's stream now points the way in which the end's row is longest
        rows[model.config.eos_token_id] = 3.0
    model.save_pretrained(folder)


@pytest.fixture
def workplace(tmp_path: Path, corpus: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which everything that examples name, and do not make themselves, exists: small models and rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    hub = tmp_path / "Qwen"  # a folder is taken before the hub is asked
    _dense(hub / "Qwen3-0.6B", corpus)
    for place in (hub / "Qwen3-14B", tmp_path / "teacher"):
        shutil.copytree(teacher, place)
    for folder in (hub / "Qwen3-0.6B", hub / "Qwen3-14B"):
        ends_at_once(folder)
    mixture = AutoConfig.for_model(
        "qwen3_moe", hidden_size=128, moe_intermediate_size=256, num_hidden_layers=1, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(mixture).save_pretrained(hub / "Qwen3-30B-A3B")
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 12), ("validation", 4)):
        pq.write_table(
            pq.read_table(corpus / f"{split}.parquet").slice(0, rows), tmp_path / "data" / f"{split}.parquet"
        )
    shutil.copy(corpus / "train.parquet", tmp_path / "rows.parquet")
    return tmp_path


def test_every_example_works_as_printed(workplace, capsys, monkeypatch):
    """In the order of the overview, where each command finds what those before it have left."""
    main(["--help"])
    listed = capsys.readouterr().out
    called = []
    for name in ENDLESS & TOOLS.keys():
        monkeypatch.setattr(f"agri_moe.tools.{name}.{name}", _recorder(TOOLS[name][0], called))
    for command in [*TRAINING, *TOOLS]:
        line = example(helped(capsys, command))
        assert f" {line}\n" in listed, "the overview shows the same"
        program, script, *args = shlex.split(line)
        assert [program, script, args[0]] == ["python", "main.py", command]
        main(args)
    assert len(called) == len(ENDLESS & TOOLS.keys())

    run = workplace / "lightning_logs" / "version_0"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert json.loads((run / "evaluation.json").read_text())["rows"]["answered"] == 4
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 4
    made = ("hindi_tokens", "student", "compressed", "teacher_cache", "similarity", "advisor", "corpus")
    assert all((workplace / name).is_dir() for name in made)
    assert (run / "report" / "index.html").exists()


def _recorder(target: str, called: list):
    """A function with the signature of the target that only says it was called."""
    import functools
    import importlib

    module, name = target.split(":")

    @functools.wraps(getattr(importlib.import_module(module), name))
    def record(**options):
        called.append(options)

    return record


def test_help_imports_nothing_heavy():
    """The overview's and every tool's, in one process: seconds would hang on the machine, modules do not."""
    code = (
        "import sys; from agri_moe.cli import main, TOOLS\n"
        "for args in [['--help'], *([name, '--help'] for name in TOOLS)]:\n"
        "    try: main(args)\n"
        "    except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'matplotlib', 'pandas', 'pyarrow', 'scipy',\n"
        "         'tokenizers', 'torchmetrics', 'tensorboard', 'sacrebleu', 'gradio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for _, purpose, line in TOOLS.values():
        assert purpose[1:] in done.stdout.replace("\n", " ")
        assert f"example: python main.py {line}\n" in done.stdout, "not wrapped"
