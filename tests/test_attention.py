"""Attention read beside the kernel, its distance, and its share on the thought."""

import copy
import math

import numpy as np
import pytest
import torch
import yaml
from torch.autograd import gradcheck
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.callbacks.attention import AttentionMonitor, advisory_queries
from agri_moe.cli import main
from agri_moe.data.chat import Segment
from agri_moe.losses import align_attention, attention_distance, attention_mass, uniform_head_map
from agri_moe.models.attention import attention_at, capture_attention, capture_queries_keys, check_readable, unreadable

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "initializer_range": 0.6,  # wide enough for attention that is not flat
}
SPARSE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "qwen3": {},
    "qwen3_windowed": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3_moe": SPARSE,
    "qwen2": {},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": 8},
    "mixtral": SPARSE,
}
ROWS = [[5, 14, 3], [20], [1, 1, 9, 11]]  # tokens of the rows in each sequence; the rest is padding
QUERIES = torch.tensor([[0, 4, 11, 18, 21, -1], [19, 3, -1, 12, 12, 0], [0, 1, 2, 10, 21, 23]])


def build(family: str, implementation: str, dtype=torch.float64, **changes):
    options = {"model_type": family, **SHAPE, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(**options)
    config._attn_implementation = implementation
    config._experts_implementation = "eager"  # the grouped one has no float64
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


def packed_batch(width: int = 24) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    positions = torch.zeros(len(ROWS), width, dtype=torch.int64)
    for b, lengths in enumerate(ROWS):
        places = torch.cat([torch.arange(n) for n in lengths])
        positions[b, : len(places)] = places
    ids = torch.randint(64, positions.shape)
    return {"input_ids": ids, "position_ids": positions, "queries": QUERIES}


def read(model, batch, how=capture_attention):
    layers = model.model.layers
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    if how is capture_attention:
        with capture_attention(layers, batch) as attention:
            model.model(**inputs)
        return attention
    with capture_queries_keys(layers) as captured:
        model.model(**inputs)
    return [attention_at(qk, batch) for qk in captured]


def eager_at(model, batch):
    """What transformers' eager attention says of the same queries, averaged in groups."""
    out = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, output_attentions=True
    )
    return [grouped(a, batch["queries"]) for a in out.attentions]


def grouped(attention_BHTT, queries_BQ):
    at = queries_BQ.clamp(min=0)[:, None, :, None].expand(-1, attention_BHTT.shape[1], -1, attention_BHTT.shape[3])
    rows_BHQT = attention_BHTT.gather(2, at) * (queries_BQ >= 0)[:, None, :, None]
    return rows_BHQT.unflatten(1, (2, -1)).mean(2)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_attention_on_packed_rows_and_padding(family, implementation):
    batch = packed_batch()
    with torch.no_grad():
        expected = eager_at(build(family, "eager"), batch)
        model = build(family, implementation)
        for attention in (read(model, batch), read(model, batch, capture_queries_keys)):
            assert len(attention) == 2
            for got, want in zip(attention, expected, strict=True):
                assert got.dtype == torch.float64
                assert got.shape == (3, 2, 6, 24)
                # Eager softmax is in float32 in every model.
                torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
    assert (expected[0] > 0.2).double().mean() < 0.5, "attention that is not flat, or nothing is tested"


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_packed_rows_attend_as_the_rows_alone(family):
    model, batch = build(family, "sdpa"), packed_batch()
    with torch.no_grad():
        together = read(model, batch)[-1]
        for b, lengths in enumerate(ROWS):
            for start, n in zip(np.cumsum([0, *lengths]), lengths, strict=False):
                row = slice(start, start + n)
                alone = {name: batch[name][b : b + 1, row] for name in ("input_ids", "position_ids")}
                inside = [i for i, t in enumerate(QUERIES[b].tolist()) if start <= t < start + n]
                alone["queries"] = QUERIES[b : b + 1, inside] - start
                torch.testing.assert_close(together[b, :, inside, row], read(model, alone)[-1][0])
                outside = together[b][:, inside].sum() - together[b, :, inside, row].sum()
                assert outside.abs() < 1e-12


def test_no_query_is_zero_and_every_other_sums_to_one():
    with torch.no_grad():
        for attention in read(build("qwen3", "sdpa"), packed_batch()):
            expected = (QUERIES >= 0).double()[:, None].expand(-1, 2, -1)
            torch.testing.assert_close(attention.sum(-1), expected)
            assert (attention[QUERIES[:, None].expand(-1, 2, -1) < 0] == 0).all()


def scalar(attention):
    torch.manual_seed(5)
    return sum((torch.randn(a.shape, dtype=torch.float64) * a.double().square()).sum() for a in attention)


def gradient(model, attention):
    scalar(attention).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "qwen3_moe"])
def test_gradient_equals_that_through_eager_attention(family, monkeypatch):
    # transformers' eager softmax is float32; in float64 the two gradients can be told from rounding.
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
    batch = packed_batch()
    eager, model = build(family, "eager"), build(family, "sdpa")
    expected, got = gradient(eager, eager_at(eager, batch)), gradient(model, read(model, batch))
    assert expected.keys() == got.keys()
    assert expected["model.embed_tokens.weight"].norm() > 1e-3
    for name, value in expected.items():
        # Norms are in float32 in every model.
        assert (got[name] - value).norm() <= 1e-6 * value.norm(), name


def test_a_query_of_minus_one_has_no_gradient():
    model, batch = build("qwen3", "sdpa"), packed_batch()
    batch["queries"] = torch.full((3, 2), -1)
    assert all((g == 0).all() for g in gradient(model, read(model, batch)).values())


@pytest.mark.parametrize("how", [capture_attention, capture_queries_keys])
def test_gradient_checkpointing_changes_nothing(how):
    batch = packed_batch()
    plain = build("qwen3_moe", "sdpa").train()
    recomputing = copy.deepcopy(plain)
    recomputing.gradient_checkpointing_enable({"use_reentrant": False})
    expected, got = (gradient(model, read(model, batch, how)) for model in (plain, recomputing))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_bfloat16_and_autocast_give_float32_near_the_truth():
    batch = packed_batch()
    with torch.no_grad():
        expected = read(build("qwen3", "sdpa", torch.float32, initializer_range=0.2), batch)
        low = read(build("qwen3", "sdpa", torch.bfloat16, initializer_range=0.2), batch)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = read(build("qwen3", "sdpa", torch.float32, initializer_range=0.2), batch)
    for attention in (low, mixed):
        for got, want in zip(attention, expected, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=0, atol=0.03)


def test_layers_come_in_the_order_asked_and_hooks_are_gone():
    model, batch = build("llama", "sdpa"), packed_batch()
    layers = list(model.model.layers)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        forwards = read(model, batch)
        with capture_attention(layers[::-1], batch) as backwards:
            model.model(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(backwards, reversed(forwards), strict=True))
    with pytest.raises(RuntimeError, match="stop"), capture_queries_keys(layers):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "Gemma2Attention"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2}, "Gemma3Attention"),
        ({"model_type": "olmo2"}, "Olmo2Attention"),
        ({"model_type": "gpt_oss", "layer_types": ["full_attention"] * 2, **SPARSE}, "GptOssAttention"),
        ({"model_type": "cohere"}, "CohereAttention"),
        ({"model_type": "glm", "pad_token_id": 0}, "GlmAttention"),
        ({"model_type": "stablelm"}, "StableLmAttention"),
    ],
)
def test_other_attention_is_refused_without_weights(options, name):
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE | options))
    with pytest.raises(ValueError, match=rf"objective.attention cannot read {name}: use a model of the families"):
        check_readable(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_these_families_are_readable_without_weights(family):
    with torch.device("meta"):
        model = build(family, "sdpa")
    check_readable(model)
    assert unreadable(model) is None


# ---------------------------------------------------------------------- distance


def distributions(*shape, seed=0, temperature=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (temperature * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def distance_by_hand(student, teacher, mask, pairs):
    """Plain Python, one query at a time."""
    total, count = 0.0, 0
    for b in range(student.shape[0]):
        shared = [t for t in range(student.shape[3]) if mask[b, t]]
        for q in range(student.shape[2]):
            sides = [([teacher[b, h, q, t].item() for t in shared], [student[b, g, q, t].item() for t in shared])
                     for g, h in pairs]  # fmt: skip
            if not all(sum(a) > 0 and sum(s) > 0 for a, s in sides):
                continue
            count += 1
            for a, s in sides:
                total += sum(
                    x / sum(a) * math.log(x / sum(a) * sum(s) / y) for x, y in zip(a, s, strict=True) if x > 0
                ) / len(pairs)
    return total, count


def ragged():
    """Two sequences, queries that see few or no keys, keys without a counterpart."""
    student, teacher = distributions(2, 2, 5, 9, seed=1), distributions(2, 4, 5, 9, seed=2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:], mask[1, 0], mask[1, 4] = False, False, False
    student[0, :, 1], teacher[0, :, 1] = 0, 0  # no query
    teacher[0, :, 2] = 0  # no counterpart
    student[1, :, 0, 1:], teacher[1, :, 0, 1:] = 0, 0  # all mass on a key that is not shared
    student[1, :, 1, 2:], teacher[1, :, 1, 2:] = 0, 0  # one shared key
    teacher[1, :, 2, 3:7] = 0
    return student, teacher, mask


@pytest.mark.parametrize("pairs", [[(0, 0), (1, 2)], [(1, 3)], [(0, 0), (0, 1), (1, 2), (1, 3)]])
def test_distance_equals_the_formula(pairs):
    student, teacher, mask = ragged()
    total, count = attention_distance(student, teacher, mask, pairs)
    expected, number = distance_by_hand(student, teacher, mask, pairs)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert count.item() == number == 7
    assert count.dtype == torch.float32
    single, _ = attention_distance(student.float(), teacher.float(), mask, pairs)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_distance_passes_gradcheck():
    teacher, mask = (
        distributions(2, 2, 3, 6, seed=3),
        torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) < 0.7,
    )
    teacher[0, :, 0, :2] = 0
    logits = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    pairs = [(0, 1), (1, 0)]
    assert gradcheck(lambda x: attention_distance(x.softmax(-1), teacher, mask, pairs)[0], [logits])


def test_distance_is_zero_where_the_two_agree():
    student, _, mask = ragged()
    for dtype in (torch.float32, torch.float64):
        p = student.to(dtype).requires_grad_()
        total, count = attention_distance(p, p.detach(), mask, [(0, 0), (1, 1)])
        assert total.abs() <= 1e-7
        assert count == 8
        # Also where the teacher has mass on tokens that the student does not have: both are renormalised.
        scaled, _ = attention_distance(p, p.detach() * 0.3, mask, [(0, 0), (1, 1)])
        assert scaled.abs() <= 1e-6
        total.backward()
        assert p.grad.isfinite().all()


def test_distance_is_finite_in_value_and_gradient_at_the_edges():
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, -200.0], [0.0, 0.0, 0.0]])[None, None].requires_grad_()
    teacher = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[None, None]
    mask = torch.tensor([[True, True, False]])
    total, count = attention_distance(logits.softmax(-1), teacher, mask, [(0, 0)])
    (1e4 * total).backward()
    assert count == 2
    assert 0 < total < 100
    assert logits.grad.isfinite().all()
    none, count = attention_distance(logits.softmax(-1), teacher, torch.zeros_like(mask), [(0, 0)])
    assert none == count == 0
    logits.grad = None
    none.backward()
    assert (logits.grad == 0).all()


def test_distance_refuses_heads_that_are_not_there():
    p = distributions(1, 2, 1, 3)
    for pairs in ([], [(2, 0)], [(0, -1)], [(0, 2)]):
        with pytest.raises(ValueError, match=r"objective\.attention\.heads"):
            attention_distance(p, p, torch.ones(1, 3, dtype=torch.bool), pairs)


def test_alignment_takes_the_teachers_probability_of_the_same_token():
    teacher = distributions(2, 3, 2, 5)
    tokens = torch.tensor([[-1, 1, 2, 4], [0, -1, -1, -1]])
    aligned = align_attention(teacher, tokens[..., None])
    for b, g, q, t in np.ndindex(2, 3, 2, 4):
        u = tokens[b, t]
        assert aligned[b, g, q, t] == (teacher[b, g, q, u] if u >= 0 else 0)


def test_mass_on_a_segment():
    attention = distributions(2, 3, 4, 6)
    attention[1, :, 2:] = 0
    segments = torch.tensor([[2, 3, 3, 4, 4, 0], [3, 3, 2, 2, 4, 4]])
    total, count = attention_mass(attention, segments, Segment.THOUGHT)
    expected = attention[0, :, :, 1:3].sum((0, 2)).div(3).sum() + attention[1, :, :, :2].sum((0, 2)).div(3).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count == 6
    assert [x.item() for x in attention_mass(attention * 0, segments, Segment.THOUGHT)] == [0, 0]


def test_uniform_head_map():
    assert uniform_head_map(2, 2) == [(0, 0), (1, 1)]
    assert uniform_head_map(2, 8) == [(0, 0), (1, 4)]
    assert uniform_head_map(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


# ---------------------------------------------------------------------- the callback


def test_queries_are_advisory_positions_of_rows_with_a_thought():
    s, u, h, a = Segment.SYSTEM, Segment.USER, Segment.THOUGHT, Segment.ASSISTANT
    batch = {
        "row_ids": torch.tensor([[7] * 6 + [8] * 4 + [-1] * 2]),
        "segment_ids": torch.tensor([[s, u, h, a, a, a, u, u, a, a, 0, 0]]),
        "target_segments": torch.tensor([[u, h, a, a, a, 0, u, a, a, 0, 0, 0]]),
    }
    assert advisory_queries(batch, 5).tolist() == [[2, 3, 4, -1, -1]]
    assert advisory_queries(batch, 2).tolist() == [[2, 3]]
    batch["segment_ids"][0, 2] = u
    assert advisory_queries(batch, 2).tolist() == [[-1, -1]]


def test_monitor_writes_before_and_after_and_remembers_where_it_began(distill_config, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = yaml.safe_load(distill_config.read_text())
    monitor = {"class_path": "agri_moe.callbacks.attention.AttentionMonitor", "init_args": {"queries": 8}}
    config["trainer"]["callbacks"] = [config["trainer"]["callbacks"][0], monitor]
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    cli = main(["fit", "--config", str(distill_config), "--trainer.max_steps=6"])
    run = distill_config.parent / "lightning_logs" / "version_0"
    before, after = (np.load(run / "attention" / f"step={step:08d}.npz") for step in (0, 6))
    for file, step in ((before, 0), (after, 6)):
        assert file["share"].shape == (2,)
        assert file["step"] == step
        assert ((file["share"] > 0) & (file["share"] < 1)).all()
    assert not np.allclose(before["share"], after["share"])
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"attention_to_thought", "attention_map"} <= set(events.Tags()["images"])
    (logged,) = events.Scalars("val/attention_to_thought")
    assert logged.value == pytest.approx(after["share"].mean(), rel=1e-5)
    assert cli.model.training

    content = torch.load(run / "checkpoints" / "step=00000006.ckpt", weights_only=True)
    (state,) = (state for name, state in content["callbacks"].items() if name.startswith("AttentionMonitor"))
    assert state["before"] == pytest.approx(before["share"].tolist())

    (run / "attention" / "step=00000000.npz").unlink()
    args = ["--trainer.max_steps=8", "--trainer.val_check_interval=16"]
    args += [f"--resume={run / 'checkpoints' / 'step=00000004.ckpt'}", "--resume_anyway=true"]
    resumed = main(["fit", "--config", str(distill_config), *args])
    (callback,) = (c for c in resumed.trainer.callbacks if isinstance(c, AttentionMonitor))
    assert callback.before == state["before"]
    assert {p.name for p in resumed.run.folder.rglob("attention/*.npz")} == {"step=00000008.npz"}

    text = distill_config.parent / "text.txt"
    text.write_text("\n".join(f"कुछ पाठ {i}" for i in range(50)), encoding="utf-8")
    config["data"] = {
        "class_path": "agri_moe.data.text_data.TextDataModule",
        "init_args": {"train": str(text), "tokenizer": config["data"]["init_args"]["tokenizer"], "block_size": 32},
    }
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(distill_config)])
    assert "AttentionMonitor needs thoughts" in capsys.readouterr().err
