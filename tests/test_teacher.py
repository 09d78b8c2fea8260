"""The type of the teacher's weights."""

import importlib.util

import pytest
import torch

from agri_moe.cli import main
from agri_moe.models.causal import CausalModel
from agri_moe.models.source import ModelConfig
from agri_moe.teacher import TeacherConfig
from tests.test_cli import refused

with_torchao = pytest.mark.skipif(
    not importlib.util.find_spec("torchao"), reason="torchao (extra `lowbit`) is not installed"
)


def load(chat, source, dtype):
    config = TeacherConfig(str(source), dtype=dtype)
    config.check()
    hf = ModelConfig(str(source)).load("model.teacher", chat, config.torch_dtype, config.quantization())
    return CausalModel(hf).eval()


@with_torchao
def test_float8_halves_the_layers_and_says_nearly_the_same(chat, rows, teacher):
    half, quarter = load(chat, teacher, "bfloat16"), load(chat, teacher, "float8")
    linear = [name for name, p in quarter.hf.named_parameters() if type(p).__name__ == "Float8Tensor"]
    assert sorted(linear) == sorted(n for n, p in half.hf.named_parameters() if "layers" in n and p.ndim == 2)
    assert quarter.hf.lm_head.weight.dtype == torch.bfloat16
    ids = torch.tensor(rows[0].input_ids)
    batch = {"input_ids": ids[None], "position_ids": torch.arange(len(ids))[None]}
    with torch.no_grad():
        exact, rounded = (
            model(batch, torch.arange(len(ids)), lambda hidden, head: hidden.float() @ head.float().T).read
            for model in (half, quarter)
        )
    kl = torch.nn.functional.kl_div(rounded.log_softmax(-1), exact.softmax(-1), reduction="none").sum(-1).mean()
    assert 0 < kl < 0.01


@with_torchao
def test_a_run_with_a_float8_teacher(distill_config):
    options = ["--model.teacher.dtype=float8", "--trainer.max_steps=1", "--trainer.callbacks=[]"]
    cli = main(["fit", "--config", str(distill_config), *options])
    assert cli.trainer.global_step == 1
    assert torch.isfinite(cli.trainer.callback_metrics["train/kl"])


def test_what_float8_needs_is_named_before_anything_loads(monkeypatch, distill_config, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    message = refused(capsys, "fit", "--config", distill_config, "--model.teacher.dtype=float8")
    assert "model.teacher.dtype: float8 needs torchao" in message
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name == "torchao" else found(name, *a)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(capsys, "fit", "--config", distill_config, "--model.teacher.dtype=float8_dynamic")
    assert "compute capability 8.9" in message
