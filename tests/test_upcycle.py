"""Upcycling against the dense model it came from, on tiny random checkpoints."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from agri_moe.models import checkpoint_files
from agri_moe.models import upcycle as module
from agri_moe.models.checkpoint_files import stored_tensors
from agri_moe.models.upcycle import (
    UpcycleSpec,
    count_parameters,
    expected_tensors,
    is_moe,
    load_upcycled,
    moe_config,
    upcycle,
    upcycled_tensors,
    write_moe_config,
)

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden_size / heads, as in Qwen3-0.6B
    "max_position_embeddings": 128, "bos_token_id": 3, "eos_token_id": 5, "pad_token_id": 7,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3-tied": Qwen3Config(
        **TINY, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "qwen3-bias": Qwen3Config(**TINY, attention_bias=True),
    "qwen3-sliding": Qwen3Config(**TINY, use_sliding_window=True, sliding_window=6, max_window_layers=0),
    "llama": LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
    "llama-tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": MistralConfig(**TINY, sliding_window=6),
}
EXACT = UpcycleSpec(jitter=0.0, num_experts=4)


def make_dense(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases other than 1 and 0, and weights large enough for every layer to matter.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense") / "qwen3", CONFIGS["qwen3-tied"])


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_same_tensors(left: Any, right: Any) -> None:
    left, right = dict(left), dict(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_same_folder(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


# ---- the function is kept


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_reproduce_the_dense_logits(tmp_path: Path, name: str) -> None:
    source = make_dense(tmp_path / "dense", CONFIGS[name])
    upcycle(source, tmp_path / "moe", EXACT)
    student = load(tmp_path / "moe")
    assert type(student).__name__ == ("Qwen3MoeForCausalLM" if "qwen3" in name else "MixtralForCausalLM")
    torch.testing.assert_close(logits(student), logits(load(source)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("experts", "top_k", "granularity"),
    [(4, 1, 1), (4, 2, 1), (4, 3, 1), (4, 4, 1), (8, 2, 2), (8, 4, 2), (8, 8, 2), (12, 3, 3), (16, 8, 4)],
)
@pytest.mark.parametrize("name", ["qwen3-tied", "llama"])
def test_exact_for_every_k_and_granularity(
    tmp_path: Path, name: str, experts: int, top_k: int, granularity: int
) -> None:
    source = make_dense(tmp_path / "dense", CONFIGS[name])
    spec = UpcycleSpec(experts, top_k, jitter=0.0, granularity=granularity)
    student = load_upcycled(str(source), spec, dtype=torch.float32)
    torch.testing.assert_close(logits(student), logits(load(source)), atol=2e-5, rtol=1e-5)


def test_cube_root_scaling_of_slices_is_not_exact(dense: Path) -> None:
    spec = UpcycleSpec(8, 4, jitter=0.0, granularity=2)
    student = load_upcycled(str(dense), spec, dtype=torch.float32)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.mlp.experts.gate_up_proj *= 2 ** (1 / 3)
            layer.mlp.experts.down_proj *= 2 ** (1 / 3) / 2
    expected = logits(load(dense))
    assert (logits(student) - expected).norm() / expected.norm() > 0.01


def test_without_norm_topk_prob_the_function_is_lost(dense: Path) -> None:
    student = load_upcycled(str(dense), EXACT, dtype=torch.float32)
    assert student.config.norm_topk_prob is True
    assert Qwen3MoeConfig().norm_topk_prob is False  # the default that makes it necessary
    for layer in student.model.layers:
        layer.mlp.gate.norm_topk_prob = False
    expected = logits(load(dense))
    assert (logits(student) - expected).abs().max() > 0.1


def test_slices_of_a_copy_are_chosen_together(dense: Path) -> None:
    spec = UpcycleSpec(16, 8, jitter=0.0, granularity=4)
    student = load_upcycled(str(dense), spec, dtype=torch.float32)
    hidden_ND = torch.randn(4096, 32, generator=torch.Generator().manual_seed(2))
    for layer in student.model.layers:
        rows = layer.mlp.gate.weight.view(4, 4, 32)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        chosen = layer.mlp.gate(hidden_ND)[2]
        counts = F.one_hot(chosen, 16).sum(1).view(-1, 4, 4).sum(-1)
        assert set(counts.unique().tolist()) <= {0, 4}


def test_slices_are_the_dense_ffn_in_pieces(dense: Path) -> None:
    written = dict(upcycled_tensors(dense, UpcycleSpec(4, 2, jitter=0.0, granularity=2)))
    source = load_file(dense / "model.safetensors")
    for expert in range(4):
        rows = slice(24 * (expert % 2), 24 * (expert % 2) + 24)
        prefix = f"model.layers.1.mlp.experts.{expert}."
        assert torch.equal(written[prefix + "gate_proj.weight"], source["model.layers.1.mlp.gate_proj.weight"][rows])
        assert torch.equal(written[prefix + "up_proj.weight"], source["model.layers.1.mlp.up_proj.weight"][rows])
        down = source["model.layers.1.mlp.down_proj.weight"][:, rows] * 2
        assert torch.equal(written[prefix + "down_proj.weight"], down)


@pytest.mark.parametrize("name", ["qwen3-tied", "mistral"])
def test_router_softmax_is_float32(tmp_path: Path, name: str) -> None:
    source = make_dense(tmp_path / "dense", CONFIGS[name], torch.bfloat16)
    student = load_upcycled(str(source), UpcycleSpec(4, 4), dtype=torch.bfloat16)
    router = student.model.layers[0].mlp.gate
    hidden_ND = torch.randn(64, 32).bfloat16()
    scores = router(hidden_ND)[1]
    precise = F.linear(hidden_ND, router.weight).float().softmax(-1).sort(-1, descending=True).values
    assert torch.equal(scores, precise.div(precise.sum(-1, keepdim=True)).to(scores.dtype))


# ---- symmetry


def router_gradient(source: Path, spec: UpcycleSpec) -> float:
    student = load_upcycled(str(source), spec, dtype=torch.float32)
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    student(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return max(float(layer.mlp.gate.weight.grad.abs().max()) for layer in student.model.layers)


def test_identical_experts_give_the_router_no_gradient(dense: Path) -> None:
    rounding = router_gradient(dense, EXACT)
    assert rounding < 1e-6
    assert router_gradient(dense, UpcycleSpec(4, 2, jitter=0.01)) > 100 * rounding
    assert router_gradient(dense, UpcycleSpec(4, 2, jitter=0.0, drop_ratio=0.5)) > 1000 * rounding


def test_jitter_is_relative_to_each_weight(dense: Path) -> None:
    source = load_file(dense / "model.safetensors")
    plain = dict(upcycled_tensors(dense, EXACT))
    noise: dict[str, list[torch.Tensor]] = {}
    for name, tensor in upcycled_tensors(dense, UpcycleSpec(4, 2, jitter=0.1)):
        if ".experts." in name:
            noise.setdefault(name.split(".")[-2], []).append((tensor - plain[name]).flatten())
        elif "mlp.gate" not in name:
            assert torch.equal(tensor, source[name])
    for kind, parts in noise.items():
        std = source[f"model.layers.0.mlp.{kind}.weight"].std()
        stacked = torch.stack(parts)
        assert float(stacked.std()) == pytest.approx(0.1 * float(std), rel=0.03)
        correlation = torch.corrcoef(stacked) - torch.eye(len(parts))
        assert float(correlation.abs().max()) < 0.12  # 5 standard errors at 1,536 weights: no expert repeats another


def test_drop_redraws_the_same_dimensions_of_gate_up_and_down(dense: Path) -> None:
    source = load_file(dense / "model.safetensors")
    written = dict(upcycled_tensors(dense, UpcycleSpec(4, 2, jitter=0.0, drop_ratio=0.25)))
    chosen = []
    for layer in range(2):
        for expert in range(4):
            prefix, base = f"model.layers.{layer}.mlp.experts.{expert}.", f"model.layers.{layer}.mlp."
            changed = {}
            for kind, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
                differs = written[prefix + kind + ".weight"] != source[base + kind + ".weight"]
                changed[kind] = differs.all(axis).nonzero().flatten().tolist()
                assert int(differs.sum()) == 12 * 32  # whole dimensions, and nothing beside them
            assert changed["gate_proj"] == changed["up_proj"] == changed["down_proj"]
            assert len(changed["gate_proj"]) == 12  # a quarter of 48
            chosen.append(tuple(changed["gate_proj"]))
    assert len(set(chosen)) == len(chosen)


def test_drop_in_one_slice_leaves_the_other_experts_alone(dense: Path) -> None:
    plain = dict(upcycled_tensors(dense, UpcycleSpec(8, 4, jitter=0.0, granularity=2)))
    written = dict(upcycled_tensors(dense, UpcycleSpec(8, 4, jitter=0.0, granularity=2, drop_ratio=0.25)))
    for name, tensor in written.items():
        assert int((tensor != plain[name]).sum()) == (6 * 32 if ".experts." in name else 0), name


def test_drop_draws_from_the_tensors_own_mean_and_deviation(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", CONFIGS["llama"])
    weights = load_file(source / "model.safetensors")
    for name in weights:
        if "mlp" in name:
            weights[name] = weights[name] * 0.1 + 0.5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    spec = UpcycleSpec(8, 2, jitter=0.0, drop_ratio=1.0, granularity=2)
    drawn = dict(upcycled_tensors(source, spec))
    for stored, dense_name, scale in (("w1", "gate_proj", 1), ("w3", "up_proj", 1), ("w2", "down_proj", 2)):
        values = torch.stack([tensor for name, tensor in drawn.items() if ".0.block" in name and stored in name])
        whole = weights[f"model.layers.0.mlp.{dense_name}.weight"] * scale
        assert float(values.mean()) == pytest.approx(float(whole.mean()), rel=0.01)
        assert float(values.std()) == pytest.approx(float(whole.std()), rel=0.05)


def test_router_rows_have_the_asked_deviation(dense: Path) -> None:
    written = dict(upcycled_tensors(dense, UpcycleSpec(64, 2, router_std=0.5)))
    assert float(written["model.layers.0.mlp.gate.weight"].std()) == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(written["model.layers.0.mlp.gate.weight"], written["model.layers.1.mlp.gate.weight"])


# ---- what is written


@pytest.mark.parametrize("name", ["qwen3-tied", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_memory_equals_on_disk_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = make_dense(tmp_path / "dense", CONFIGS[name], torch.bfloat16)
    spec = UpcycleSpec(4, 2, drop_ratio=0.3, granularity=2, seed=3)
    upcycle(source, tmp_path / "moe", spec)
    stored = load(tmp_path / "moe", dtype=dtype)
    quick = load_upcycled(str(source), spec, dtype=dtype)
    assert quick.dtype == stored.dtype == dtype
    assert not quick.training
    assert (quick.lm_head.weight is quick.model.embed_tokens.weight) == quick.config.tie_word_embeddings
    assert_same_tensors(stored.state_dict(), quick.state_dict())
    assert_same_tensors(stored.named_buffers(), quick.named_buffers())
    assert torch.equal(logits(stored), logits(quick))
    same = [stored.config.to_dict(), quick.config.to_dict()]
    for values in same:
        for key in ("_name_or_path", "num_experts", "dtype", "torch_dtype", "rope_theta", "rope_scaling"):
            values.pop(key, None)
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("qwen3-tied", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("llama", "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
    ],
)
def test_names_are_those_that_save_pretrained_writes(tmp_path: Path, name: str, gate: str) -> None:
    source = make_dense(tmp_path / "dense", CONFIGS[name], torch.bfloat16)
    upcycle(source, tmp_path / "moe", EXACT)
    ours = stored_tensors(tmp_path / "moe")
    load(tmp_path / "moe").save_pretrained(tmp_path / "again")
    theirs = stored_tensors(tmp_path / "again")
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}
    expected = expected_tensors(load(tmp_path / "moe").config)
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in expected.items()}
    assert gate in ours
    assert ("lm_head.weight" in ours) == (not CONFIGS[name].tie_word_embeddings)
    assert {tensor.dtype for tensor in ours.values()} == {"BF16"}
    # Read by the safetensors library, not by our reader: the same values under the same names.
    index = read_json(tmp_path / "moe" / "model.safetensors.index.json")
    for shard in set(index["weight_map"].values()):
        for key, tensor in load_file(tmp_path / "moe" / shard).items():
            assert index["weight_map"][key] == shard
            assert torch.equal(tensor, ours[key].read())


def test_config_has_what_readers_look_for(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", UpcycleSpec(8, 4, granularity=2))
    values = read_json(tmp_path / "moe" / "config.json")
    rope = {"rope_type": "default", "rope_theta": 1e6}
    expected = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 12,
        "bos_token_id": 3, "eos_token_id": 5, "pad_token_id": 7,
        "rope_parameters": rope, "rope_theta": 1e6, "dtype": "float32", "torch_dtype": "float32",
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 2,
        "use_sliding_window": False, "sliding_window": None,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert "layer_types" not in values
    assert (tmp_path / "moe" / "tokenizer_config.json").read_text() == "{}\n"
    assert (tmp_path / "moe" / "generation_config.json").is_file()
    record = read_json(tmp_path / "moe" / "upcycle.json")
    assert record["spec"]["granularity"] == 2
    assert record["source"] == str(dense.resolve())
    assert record["source_config"]["model_type"] == "qwen3"


def test_export_keeps_num_experts_only_with_the_patch(dense: Path, tmp_path: Path) -> None:
    student = load_upcycled(str(dense), EXACT, dtype=torch.float32)
    student.save_pretrained(tmp_path)
    assert "num_experts" not in read_json(tmp_path / "config.json")
    write_moe_config(tmp_path)
    values = read_json(tmp_path / "config.json")
    assert values["num_experts"] == values["num_local_experts"] == 4
    assert values["norm_topk_prob"] is True
    reloaded = load(tmp_path)
    assert reloaded.config.num_local_experts == 4
    assert torch.equal(logits(reloaded), logits(student))


def test_patch_keeps_a_model_that_does_not_normalise(tmp_path: Path) -> None:
    Qwen3MoeConfig(norm_topk_prob=False).save_pretrained(tmp_path)
    write_moe_config(tmp_path)
    assert read_json(tmp_path / "config.json")["norm_topk_prob"] is False
    MixtralConfig(rope_parameters=LLAMA3_ROPE).save_pretrained(tmp_path)
    write_moe_config(tmp_path)
    values = read_json(tmp_path / "config.json")
    assert values["norm_topk_prob"] is True
    assert values["rope_scaling"]["rope_type"] == "llama3"
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == LLAMA3_ROPE
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no experts"):
        write_moe_config(tmp_path)


def test_a_stored_copy_of_a_tied_head_and_old_buffers_are_left_out(dense: Path, tmp_path: Path) -> None:
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    source = tmp_path / "dense"
    source.mkdir()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((dense / "config.json").read_bytes())
    assert_same_tensors(upcycled_tensors(dense, EXACT), upcycled_tensors(source, EXACT))


def test_sharded_source_gives_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    load(dense).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    spec = UpcycleSpec(4, 2)
    assert_same_tensors(upcycled_tensors(dense, spec), upcycled_tensors(tmp_path / "sharded", spec))


def test_parameter_counts(dense: Path) -> None:
    student = load_upcycled(str(dense), EXACT, dtype=torch.float32)
    total, active = count_parameters(student.config)
    assert total == sum(parameter.numel() for parameter in student.parameters())
    assert active == total - 2 * (3 * 32 * 48) * 2  # two of four experts rest in each of two layers
    assert is_moe(student.config)
    assert not is_moe(CONFIGS["llama"])


# ---- seeds, interruption, output


def test_same_seed_same_bytes_whatever_the_threads(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upcycle(dense, tmp_path / "a", UpcycleSpec(4, 2, drop_ratio=0.2))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads != 3 else 2)
    try:
        upcycle(dense, tmp_path / "b", UpcycleSpec(4, 2, drop_ratio=0.2))
    finally:
        torch.set_num_threads(threads)
    assert_same_folder(tmp_path / "a", tmp_path / "b")
    other = dict(upcycled_tensors(dense, UpcycleSpec(4, 2, drop_ratio=0.2, seed=1)))
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert not torch.equal(other[name], stored_tensors(tmp_path / "a")[name].read())


@pytest.mark.parametrize("after", [0, 1, 30, 43])
def test_interrupted_and_run_again_ends_with_the_same_bytes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    spec = UpcycleSpec(4, 2)
    upcycle(dense, tmp_path / "whole", spec)
    real, written = module._pieces, 0

    def failing(*args: Any, **kwargs: Any) -> Iterator[torch.Tensor]:
        nonlocal written
        for piece in real(*args, **kwargs):
            if written == after:
                yield piece.view(-1)[: piece.numel() // 2]
                raise KeyboardInterrupt
            written += 1
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(module, "_pieces", failing)
        with pytest.raises(KeyboardInterrupt):
            upcycle(dense, tmp_path / "cut", spec)
    assert not (tmp_path / "cut").exists()
    kept = sorted((tmp_path / "cut.partial").glob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert (len(kept) > 0) == (after >= 1)  # the first shard is one piece
    upcycle(dense, tmp_path / "cut", spec)
    assert_same_folder(tmp_path / "whole", tmp_path / "cut")
    again = [(tmp_path / "cut" / path.name).stat().st_mtime_ns for path in kept]
    assert again == stamps  # finished shards were kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_killed_process_is_continued(dense: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from agri_moe.models import upcycle as m\n"
        "from agri_moe.models import checkpoint_files as files\n"
        "real = files._write_shard\n"
        "def shard(path, *rest):\n"
        "    real(path, *rest)\n"
        "    if '00002' in path.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files._write_shard = shard\n"
        "m.upcycle(sys.argv[1], sys.argv[2], m.UpcycleSpec(4, 2))\n"
    )
    command = [sys.executable, "-c", script, str(dense), str(tmp_path / "moe")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert not (tmp_path / "moe").exists()
    upcycle(dense, tmp_path / "moe", UpcycleSpec(4, 2))
    upcycle(dense, tmp_path / "whole", UpcycleSpec(4, 2))
    assert_same_folder(tmp_path / "whole", tmp_path / "moe")


@pytest.mark.parametrize("changed", ["spec", "source"])
def test_leftovers_of_another_run_are_not_mixed_in(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    source = Path(shutil.copytree(dense, tmp_path / "source"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_moe_config", stop)
        with pytest.raises(KeyboardInterrupt):
            upcycle(source, tmp_path / "moe", UpcycleSpec(4, 2, seed=1 if changed == "spec" else 0))
    if changed == "source":
        weights = {name: 2 * tensor for name, tensor in load_file(source / "model.safetensors").items()}
        save_file(weights, source / "model.safetensors", {"format": "pt"})
    upcycle(source, tmp_path / "moe", UpcycleSpec(4, 2))
    upcycle(source, tmp_path / "whole", UpcycleSpec(4, 2))
    assert_same_folder(tmp_path / "whole", tmp_path / "moe")


def test_two_writers_do_not_meet(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "moe.partial").mkdir()
    with (
        checkpoint_files._locked(tmp_path / "moe.partial"),
        pytest.raises(ValueError, match="another run"),
    ):
        upcycle(dense, tmp_path / "moe", EXACT)


def test_an_existing_output_is_refused_or_replaced_at_the_end(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", EXACT)
    before = (tmp_path / "moe" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="exists: give another output folder"):
        upcycle(dense, tmp_path / "moe", UpcycleSpec(8, 2))
    assert (tmp_path / "moe" / "config.json").read_bytes() == before
    upcycle(dense, tmp_path / "moe", UpcycleSpec(8, 2), overwrite=True)
    assert read_json(tmp_path / "moe" / "config.json")["num_experts"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_overwrite_replaces_no_folder_of_another_kind(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("you")
    with pytest.raises(ValueError, match="no model folder"):
        upcycle(dense, tmp_path / "letters", EXACT, overwrite=True)
    with pytest.raises(ValueError, match="holds the source"):
        upcycle(dense, dense, EXACT, overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "you"


# ---- what cannot be


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5: it must be at most num_experts, 4"),
        ({"jitter": -0.1}, "jitter is -0.1"),
        ({"jitter": float("nan")}, "jitter is nan"),
        ({"drop_ratio": 1.5}, "drop_ratio is 1.5"),
        ({"granularity": 3}, "num_experts is 8: it must be a multiple of granularity, 3"),
        ({"granularity": 4}, "num_experts_per_tok is 2: it must be a multiple of granularity, 4"),
        ({"granularity": 2, "router_std": 0.0}, "router_std is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_spec_that_cannot_be_names_its_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpcycleSpec(**values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**TINY, attention_bias=True), "attention_bias of the source"),
        (LlamaConfig(**TINY, mlp_bias=True), "mlp_bias of the source"),
        (Qwen3Config(**TINY, use_sliding_window=True, sliding_window=6, max_window_layers=1), "covers 1 of 2 layers"),
        (LlamaConfig(**TINY, quantization_config={"quant_method": "fp8"}), "quantized"),
        (Qwen3MoeConfig(), "already a mixture"),
        (PreTrainedConfig(), "upcycling knows qwen3, llama, mistral"),
    ],
)
def test_a_source_with_no_place_in_the_moe_is_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_config(config, EXACT)


def test_granularity_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="granularity is 5: it must divide intermediate_size, 48"):
        moe_config(CONFIGS["llama"], UpcycleSpec(10, 5, granularity=5))


def broken_source(dense: Path, folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((dense / "config.json").read_bytes())
    weights = load_file(dense / "model.safetensors")
    if kind == "missing tensor":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif kind == "shape":
        weights["model.norm.weight"] = torch.ones(31)
    elif kind == "unknown tensor":
        weights["model.layers.0.self_attn.sinks"] = torch.ones(4)
    elif kind == "unused tensor":
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
    elif kind == "dtype":
        weights["model.norm.weight"] = torch.ones(32, dtype=torch.float64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if kind == "truncated":
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    elif kind == "header":
        head = b'{"model.norm.weight":{"dtype":"F32"}}'
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    elif kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "lost shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no json":
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing tensor", "gives no tensor for model.layers.1.mlp.experts.0.up_proj.weight"),
        ("shape", r"holds model.norm.weight of shape \[31\]: its config asks for \[32\]"),
        ("unknown tensor", "model.layers.0.self_attn.sinks, which Qwen3MoeForCausalLM has no place for"),
        ("unused tensor", "self_attn.q_proj.bias, which its config.json makes no use of"),
        ("dtype", "holds model.norm.weight as F64"),
        ("truncated", "damaged"),
        ("pickle", "only pytorch_model.bin"),
        ("header", "damaged"),
        ("lost shard", "model-00001-of-00002.safetensors is missing"),
        ("no config", "config.json is missing"),
        ("no json", "not valid JSON"),
    ],
)
def test_a_broken_source_is_one_sentence_and_leaves_nothing(
    dense: Path, tmp_path: Path, kind: str, message: str
) -> None:
    source = broken_source(dense, tmp_path / "dense", kind)
    with pytest.raises(ValueError, match=message) as caught:
        upcycle(source, tmp_path / "moe", EXACT)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_source_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="/nowhere does not exist"):
        upcycle(tmp_path / "nowhere", tmp_path / "moe", EXACT)

    def refuse(name: str, **_: Any) -> str:
        raise OSError(f"no route to the repository {name}")

    monkeypatch.setattr(checkpoint_files, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="someone/something is neither a folder nor a Hugging Face repository"):
        upcycle("someone/something", tmp_path / "moe", EXACT)


def test_a_hub_name_fetches_safetensors_and_no_code(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == "Qwen/Qwen3-0.6B"
        asked.extend(allow_patterns)
        return str(dense)

    monkeypatch.setattr(checkpoint_files, "snapshot_download", snapshot)
    upcycle("Qwen/Qwen3-0.6B", tmp_path / "moe", EXACT)
    assert asked[0] == "config.json"  # before any weight
    for name in ("pytorch_model.bin", "modeling_qwen3.py", "consolidated.safetensors"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in asked)
    assert any(fnmatch.fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in asked)
    asked.clear()
    with pytest.raises(ValueError, match="granularity is 5"):  # before any weight too
        upcycle("Qwen/Qwen3-0.6B", tmp_path / "never", UpcycleSpec(10, 5, granularity=5))
    assert asked == ["config.json"]
    assert read_json(tmp_path / "moe" / "upcycle.json")["source"] == "Qwen/Qwen3-0.6B"


def test_the_command_writes_and_says_what_is_next(dense: Path, tmp_path: Path, capsys: Any) -> None:
    from agri_moe.tools.upcycle import upcycle as command

    command(str(dense), str(tmp_path / "moe"), num_experts=4)
    assert "python main.py audit --student" in capsys.readouterr().out
    assert (tmp_path / "moe" / "config.json").is_file()


def test_the_commands_import_nothing_heavy() -> None:
    script = (
        "import sys, agri_moe.tools.upcycle, agri_moe.tools.audit\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- generation


TEXT = [(7 * i * i + 3 * i + i // 5) % 90 for i in range(400)]
"""What the models below learn to go on with: no short circle, so that greedy text is none."""


@pytest.fixture(scope="module", params=["qwen3", "llama", "mistral"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dense model of each family that has learned a sequence."""
    shape = TINY | {"hidden_size": 48, "intermediate_size": 64, "max_position_embeddings": 256, "eos_token_id": 95}
    config = {
        "qwen3": Qwen3Config(**shape, tie_word_embeddings=True),
        "llama": LlamaConfig(**shape, rope_parameters=LLAMA3_ROPE),
        "mistral": MistralConfig(**shape, sliding_window=32),
    }[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.tensor([TEXT[(37 * (4 * step + i)) % 300 :][:96] for i in range(4)])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / request.param
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("changes", [{}, {"granularity": 2, "num_experts": 8, "num_experts_per_tok": 2}])
def test_upcycled_generation_is_the_dense_model_s_token_for_token(
    trained: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    upcycle(trained, tmp_path / "moe", replace(EXACT, **changes))
    dense, sparse = (load(folder).eval() for folder in (trained, tmp_path / "moe"))
    assert is_moe(sparse.config)
    prompts = torch.tensor([TEXT[start : start + 12] for start in (0, 50, 111, 230)])
    length = {"max_new_tokens": 72, "min_new_tokens": 72, "do_sample": False}
    written = [model.generate(prompts, **length)[:, 12:].tolist() for model in (dense, sparse)]
    assert all(len(row) == 72 for row in written[0])
    assert min(len(set(row)) for row in written[0]) > 12, "not the same few tokens again and again"
    assert written[0] == written[1]
