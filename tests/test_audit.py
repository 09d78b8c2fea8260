"""What the audit lets through, warns of, and refuses, on tiny checkpoints damaged on purpose."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_upcycle import TINY as TWO_LAYERS
from test_upcycle import make_dense
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from agri_moe.models.audit import _count, _kl, _layers, audit
from agri_moe.models.upcycle import UpcycleSpec, upcycle
from agri_moe.tools.audit import audit as command

TINY = TWO_LAYERS | {"num_hidden_layers": 3}
GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense") / "qwen3", Qwen3Config(**TINY, tie_word_embeddings=True))


def make_student(dense: Path, folder: Path, **spec: Any) -> Path:
    upcycle(dense, folder, UpcycleSpec(num_experts=4, **spec))
    return folder


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite the shard that holds `name`; None takes the tensor out, and out of the index."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    edited = edit(tensors.pop(name))
    if edited is None:
        del index["weight_map"][name]
        index_path.write_text(json.dumps(index))
    else:
        tensors[name] = edited
    save_file(tensors, shard, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- sound checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [{"jitter": 0.0}, {"jitter": 0.0, "granularity": 2}, {}, {"drop_ratio": 0.5}],
    ids=["exact", "granular", "jitter", "drop"],
)
@pytest.mark.parametrize("family", [Qwen3Config, LlamaConfig])
def test_a_fresh_checkpoint_is_ready(tmp_path: Path, family: Any, spec: dict[str, Any], dtype: torch.dtype) -> None:
    source = make_dense(tmp_path / "dense", family(**TINY), dtype)
    report = audit(make_student(source, tmp_path / "moe", **spec))
    assert report.failures == []
    assert report.ready
    assert "largest difference from the source" in report.facts["logits"]
    text = str(report)
    assert text.endswith("ready")
    assert "not ready" not in text
    exact = spec.get("jitter") == 0.0
    assert any("identical" in warning for warning in report.warnings) == exact
    if exact:
        # Computed in float32 whatever the dtype: bf16 rounding does not blur the comparison.
        difference = float(report.facts["logits"].split("source ")[1].split()[0])
        assert difference < 1e-4


def test_identical_experts_are_explained(dense: Path, tmp_path: Path) -> None:
    report = audit(make_student(dense, tmp_path / "moe", jitter=0.0))
    assert report.warnings[0] == (
        "layers 0-2: all 4 experts are identical: the router gets no gradient from the language-model loss; "
        "use jitter, drop_ratio or a balance term."
    )
    assert report.facts["experts apart"].startswith("min 0, mean 0, max 0")


def test_copies_of_slices_are_compared_slice_by_slice(dense: Path, tmp_path: Path) -> None:
    report = audit(make_student(dense, tmp_path / "moe", jitter=0.0, granularity=2))
    assert "all 2 copies of the FFN are identical" in report.warnings[0]
    assert report.facts["experts apart"].startswith("min 0, mean 0, max 0")


def test_a_single_layer_of_twins(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe")
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{{}}.{part}.weight"
        index = json.loads((student / "model.safetensors.index.json").read_text())
        twin = load_file(student / index["weight_map"][name.format(0)])[name.format(0)]
        change(student, name.format(3), lambda _, twin=twin: twin.clone())
    warnings = audit(student).warnings
    assert next(text for text in warnings if "distinct" in text).startswith("layer 1: only 3 of 4 experts are distinct")


def test_distance_of_experts_is_the_jitter_times_root_two(dense: Path, tmp_path: Path) -> None:
    report = audit(make_student(dense, tmp_path / "moe", jitter=0.05))
    for word in report.facts["experts apart"].replace(",", "").split()[1:6:2]:
        assert float(word) == pytest.approx(0.05 * math.sqrt(2), rel=0.05)


def test_counts_and_spec_are_shown(dense: Path, tmp_path: Path) -> None:
    report = audit(make_student(dense, tmp_path / "moe", seed=9))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    total = sum(parameter.numel() for parameter in model.parameters())
    active = total - 3 * 2 * 3 * 32 * 48
    assert report.facts["parameters"] == f"{total:,} in all, {active:,} active per token"
    assert "seed 9" in report.facts["upcycled with"]


def test_idle_routers_are_warnings(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe")
    change(student, GATE, torch.zeros_like)
    report = audit(student)
    assert report.ready
    assert any(text.startswith("layer 1: the router's rows are equal") for text in report.warnings)
    assert any("chosen by none of 64 random tokens" in text and "layer 1" in text for text in report.warnings)


def test_slices_that_share_a_row_are_no_idle_router(dense: Path, tmp_path: Path) -> None:
    report = audit(make_student(dense, tmp_path / "moe", granularity=2))
    assert not any("rows are equal" in text for text in report.warnings)


# ---- failures


def test_logits_that_differ_at_jitter_0_fail(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe", jitter=0.0)
    change(student, "model.layers.0.self_attn.v_proj.weight", lambda weight: weight * 1.01)
    report = audit(student)
    assert any("logits differ from the source" in text for text in report.failures)
    assert not report.ready


def test_lost_norm_topk_prob_fails_at_jitter_0_and_warns_always(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe", jitter=0.0)
    change_config(student, norm_topk_prob=False)
    report = audit(student)
    assert any("norm_topk_prob is false" in text for text in report.warnings)
    assert any("logits differ" in text for text in report.failures)


def test_jittered_logits_are_only_reported(dense: Path, tmp_path: Path) -> None:
    report = audit(make_student(dense, tmp_path / "moe", jitter=0.3))
    assert report.ready
    assert "KL" in report.facts["logits"]


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (EXPERT, lambda weight: None, f"missing: {EXPERT} is missing"),
        (EXPERT, lambda weight: weight[:-1].clone(), rf"{EXPERT} has shape \[47, 32\]: the config asks for \[48, 32\]"),
        (EXPERT, lambda weight: weight.half(), "is stored as F16: the config says F32"),
        (EXPERT, lambda weight: weight.double(), "is stored as F64"),
        (EXPERT, lambda weight: weight.index_fill(0, torch.tensor([3]), math.nan), "holds 32 values not finite"),
        ("model.norm.weight", lambda weight: weight / 0, r"model.norm.weight holds 32 values not finite"),
        (GATE, lambda weight: weight.index_fill(0, torch.tensor([1]), -math.inf), f"{GATE} holds 32 values"),
    ],
)
def test_damaged_weights_fail(dense: Path, tmp_path: Path, name: str, edit: Any, message: str) -> None:
    student = make_student(dense, tmp_path / "moe")
    change(student, name, edit)
    report = audit(student)
    assert not report.ready
    assert any(re.search(message, text) for text in report.failures)
    assert str(report).endswith("not ready: 1 failure")


def test_unexpected_and_fused_names_fail(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe")
    index_path = student / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = index["weight_map"][GATE]
    tensors = load_file(student / shard)
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(4, 96, 32)
    index["weight_map"]["model.layers.1.mlp.experts.gate_up_proj"] = shard
    save_file(tensors, student / shard, {"format": "pt"})
    index_path.write_text(json.dumps(index))
    failures = audit(student).failures
    assert failures == ["unexpected: model.layers.1.mlp.experts.gate_up_proj is no tensor of qwen3_moe."]


def test_config_and_weights_that_disagree_fail(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe")
    change_config(student, num_experts=5, num_local_experts=5)
    failures = audit(student).failures
    assert any(
        text.startswith("missing: model.layers.0.mlp.experts.4.down_proj.weight (and 8 more)") for text in failures
    )
    assert any("model.layers.0.mlp.gate.weight has shape [4, 32]" in text for text in failures)


def test_a_truncated_or_lost_shard_fails(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe")
    shard = sorted(student.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 4)
    assert "damaged" in audit(student).failures[0]
    shard.unlink()
    assert f"{shard.name} is missing" in audit(student).failures[0]


# ---- where the source comes from


def test_a_lost_source_is_a_warning_and_a_given_one_is_used(dense: Path, tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", Qwen3Config(**TINY))
    student = make_student(source, tmp_path / "moe", jitter=0.0)
    source.rename(tmp_path / "moved")
    report = audit(student)
    assert report.ready
    assert "is not there: logits were not compared" in report.warnings[-1]
    assert "largest difference" in audit(student, tmp_path / "moved").facts["logits"]
    wrong = make_dense(tmp_path / "wrong", Qwen3Config(**{**TINY, "num_hidden_layers": 2}))
    assert not audit(student, wrong).ready


def test_without_provenance_identical_experts_must_match_the_given_source(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe", jitter=0.0)
    (student / "upcycle.json").unlink()
    assert audit(student).ready
    assert audit(student, dense).ready
    change(student, "model.norm.weight", lambda weight: weight * 1.1)
    assert audit(student).ready
    assert not audit(student, dense).ready


def test_bad_input_is_one_sentence(dense: Path, tmp_path: Path) -> None:
    student = make_student(dense, tmp_path / "moe")
    with pytest.raises(ValueError, match="holds a qwen3 model: audit reads qwen3_moe and mixtral"):
        audit(dense)
    with pytest.raises(ValueError, match="does not exist"):
        audit(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        audit(student, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a mixture of experts: source is the dense model"):
        audit(student, student)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        audit(tmp_path / "empty")


def test_the_command_prints_and_exits_1_when_not_ready(dense: Path, tmp_path: Path, capsys: Any) -> None:
    student = make_student(dense, tmp_path / "moe")
    command(str(student), str(dense))
    assert "parameters" in capsys.readouterr().out
    change(student, GATE, lambda weight: weight * float("nan"))
    with pytest.raises(SystemExit) as caught:
        command(str(student))
    assert caught.value.code == 1
    assert f"FAILURE: {GATE} holds 128 values not finite" in capsys.readouterr().out


def test_a_stock_checkpoint_of_another_maker_is_audited(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **{**TINY, "moe_intermediate_size": 24}, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "stock")
    report = audit(tmp_path / "stock")
    assert report.failures == []
    assert any("norm_topk_prob is false" in text for text in report.warnings)


# ---- words and numbers


def test_kl_against_torch() -> None:
    source, student = torch.randn(6, 50), torch.randn(6, 50)
    logs = (logits.double().log_softmax(-1) for logits in (student, source))
    reference = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
    assert _kl(source, student) == pytest.approx(float(reference), rel=1e-12)
    assert _kl(source, source) == 0


def test_layers_are_listed_in_runs() -> None:
    assert _layers([3]) == "layer 3"
    assert _layers([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
    assert (_count(1, "value"), _count(2000, "value")) == ("1 value", "2,000 values")
