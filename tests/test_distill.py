"""The heart: one micro-batch through teacher, student and objective."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agri_moe.data.chat import Chat
from agri_moe.data.packing import StepTotals, collate, count_targets
from agri_moe.models.causal import CausalModel, start_rows
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.distill import DistillModule
from agri_moe.models.source import StudentConfig, check_vocabulary, untrained_tokens
from agri_moe.models.upcycle import UpcycleSpec, load_upcycled
from agri_moe.objective import Objective
from agri_moe.teacher import OnlineTeacher, TeacherConfig
from agri_moe.terms import CKA, KL, Balance, CrossEntropy, RouterZ

SPEC = UpcycleSpec(num_experts=4, num_experts_per_tok=2, jitter=0.3)


def make_module(chat, dense, teacher, objective, replicas=1, dtype=torch.float32, **options) -> DistillModule:
    """A module as `configure_model` leaves it, without a trainer."""
    module = DistillModule(
        StudentConfig(source=str(dense), upcycle=SPEC),
        TeacherConfig(source=str(teacher), dtype="float32"),
        objective=objective,
        **options,
    )
    hf = load_upcycled(str(dense), SPEC, dtype=dtype)
    start_rows(hf, chat.new_marker_pieces)
    module.build(hf)
    t = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    start_rows(t, chat.new_marker_pieces)
    object.__setattr__(module, "teacher", OnlineTeacher(CausalModel(t)))
    module.__dict__["replicas"] = replicas
    module.__dict__["control_ids"] = sorted(chat.control_ids)
    return module


def totals(chat, rows, batches) -> StepTotals:
    counts = [count_targets(r.input_ids, r.segment_ids, chat.control_ids) for r in rows]
    counts = np.sum(counts, axis=0) if counts else np.zeros((2, 5), dtype=np.int64)
    return StepTotals(counts, sum(len(r.input_ids) for r in rows), batches)


def gradients(module, chat, micro_batches, all_rows):
    """Gradient of one optimizer step as the framework would form it: each micro-batch's loss over their number."""
    module.model.zero_grad()
    step = totals(chat, all_rows, len(micro_batches))
    for sequences in micro_batches:
        batch = collate(sequences, step, 2048, chat.pad_id)
        batch = module.on_before_batch_transfer(batch, 0)
        out = module.learn(batch, *module.signals(batch, module.objective))
        (out["loss"] / module.replicas).backward()
    values = {n: sums[0] / sums[1] for n, sums in module._step_terms.items()}
    module._step_terms.clear()
    return values, {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}


SUMS = Objective(
    ce=CrossEntropy(weight=0.5, label_smoothing=0.1),
    kl=KL(weight=1.0, temperature=2.0),
    balance=Balance(weight=0.0),
    router_z=RouterZ(weight=0.01),
)
ALL = Objective(ce=CrossEntropy(weight=0.5), kl=KL(weight=1.0), cka=CKA(weight=0.5, sample_tokens=64))


def relative(a, b):
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)).item() for n in b)


@pytest.mark.parametrize("layout", [[12], [4, 4, 4], [1, 5, 2, 4]])
def test_packed_equals_unpacked_in_loss_and_gradient(chat, rows, dense, teacher, layout):
    alone = make_module(chat, dense, teacher, SUMS, replicas=len(rows))
    packed = make_module(chat, dense, teacher, SUMS)
    expected, expected_grad = gradients(alone, chat, [[[row]] for row in rows], rows)
    sequences = [rows[a:b] for a, b in pairwise(np.cumsum([0, *layout]))]
    got, got_grad = gradients(packed, chat, [sequences], rows)
    for name in ("ce", "kl", "router_z"):
        assert got[name].item() == pytest.approx(expected[name].item(), rel=2e-5)
    assert got_grad.keys() == expected_grad.keys()
    assert relative(got_grad, expected_grad) < 2e-4


def test_packed_equals_unpacked_in_bf16(chat, rows, dense, teacher):
    with torch.autocast("cpu", torch.bfloat16):
        alone = make_module(chat, dense, teacher, SUMS, replicas=len(rows))
        expected, expected_grad = gradients(alone, chat, [[[row]] for row in rows], rows)
        packed = make_module(chat, dense, teacher, SUMS)
        got, got_grad = gradients(packed, chat, [[rows[:6], rows[6:]]], rows)
    assert got["ce"].item() == pytest.approx(expected["ce"].item(), rel=2e-3)
    assert got["kl"].item() == pytest.approx(expected["kl"].item(), rel=2e-2)
    dot = sum((got_grad[n] * expected_grad[n]).sum() for n in got_grad)
    norms = [sum((g[n] ** 2).sum() for n in g).sqrt() for g in (got_grad, expected_grad)]
    assert (dot / (norms[0] * norms[1])).item() > 0.995, "bf16 rounding turns the gradient by less than 6 degrees"


def test_a_split_batch_gives_the_same_gradient(chat, rows, dense, teacher):
    whole = gradients(make_module(chat, dense, teacher, SUMS), chat, [[rows[:6], rows[6:]]], rows)
    parts = [[rows[:6]], [rows[6:9]], [rows[9:]]]
    split = gradients(make_module(chat, dense, teacher, SUMS, replicas=3), chat, parts, rows)
    assert relative(split[1], whole[1]) < 1e-4
    for name in ("ce", "kl", "router_z"):
        assert split[0][name].item() == pytest.approx(whole[0][name].item(), rel=1e-5)


def test_loss_equals_full_logits_computed_apart(chat, rows, dense, teacher):
    """The whole objective against plain transformers with every logit held, row by row."""
    module = make_module(chat, dense, teacher, SUMS)
    values, grads = gradients(module, chat, [[rows[:4], rows[4:8]]], rows[:8])
    student, plain_teacher = module.model.hf, module.teacher.model.hf
    control = torch.tensor(sorted(chat.control_ids))
    module.model.zero_grad()
    ce, kl, n_ce, n_kl = torch.zeros(()), torch.zeros(()), 0, 0
    logsums = []
    for row in rows[:8]:
        ids, segments = torch.tensor(row.input_ids)[None], torch.tensor(row.segment_ids)
        out = student(ids, output_router_logits=True, use_cache=False)
        logsums.append(torch.stack([r.logsumexp(-1) ** 2 for r in out.router_logits]).mean(0))
        logits, target = out.logits[0, :-1], ids[0, 1:]
        supervised = segments[1:] >= 3
        ce = ce + torch.nn.functional.cross_entropy(
            logits[supervised], target[supervised], reduction="sum", label_smoothing=0.1
        )
        with torch.no_grad():
            wanted = plain_teacher(ids, use_cache=False).logits[0, :-1]
        advisory = (segments[1:] == 4) & ~torch.isin(target, control)
        kl = kl + 4 * torch.nn.functional.kl_div(
            (logits[advisory] / 2).log_softmax(-1),
            (wanted[advisory] / 2).log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        n_ce, n_kl = n_ce + int(supervised.sum()), n_kl + int(advisory.sum())
    z = torch.cat(logsums).mean()
    (0.5 * ce / n_ce + kl / n_kl + 0.01 * z).backward()
    expected = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}
    assert values["ce"].item() == pytest.approx(ce.item() / n_ce, rel=1e-5)
    assert values["kl"].item() == pytest.approx(kl.item() / n_kl, rel=1e-4)
    assert values["router_z"].item() == pytest.approx(z.item(), rel=1e-5)
    assert relative(grads, expected) < 1e-4


def test_padding_and_checkpointing_change_nothing(chat, rows, dense, teacher):
    plain = gradients(make_module(chat, dense, teacher, ALL), chat, [[rows[:6], rows[6:]]], rows)
    module = make_module(chat, dense, teacher, ALL)
    module.model.hf.gradient_checkpointing_enable({"use_reentrant": False})
    module.model.train()
    checkpointed = gradients(module, chat, [[rows[:6], rows[6:]]], rows)
    for name, value in plain[0].items():
        assert checkpointed[0][name].item() == pytest.approx(value.item(), rel=1e-6)
    assert relative(checkpointed[1], plain[1]) < 1e-5
    padded = gradients(make_module(chat, dense, teacher, ALL), chat, [[rows[:6], rows[6:], rows[:0]]], rows)
    for name, value in plain[0].items():
        assert padded[0][name].item() == pytest.approx(value.item(), rel=1e-5)


def test_nothing_supervised_gives_a_graph_and_zero_gradient(chat, rows, dense, teacher):
    module = make_module(chat, dense, teacher, ALL)
    _, grads = gradients(module, chat, [[[]]], [])
    assert grads
    assert all(torch.isfinite(g).all() and g.abs().max() == 0 for g in grads.values())


def test_teacher_stays_out_of_the_module(chat, rows, dense, teacher):
    module = make_module(chat, dense, teacher, ALL)
    module.train()
    assert not any("teacher" in name for name in module.state_dict())
    assert not set(module.teacher.model.modules()) & set(module.modules())
    assert not module.teacher.model.training
    assert not any(p.requires_grad for p in module.teacher.model.parameters())


def test_equal_teacher_gives_zero_kl_and_perfect_cka(chat, rows, dense):
    spec = UpcycleSpec(num_experts=4, num_experts_per_tok=2, jitter=0.0)
    objective = Objective(ce=CrossEntropy(weight=0.0), kl=KL(weight=1.0), cka=CKA(weight=1.0))
    module = make_module(chat, dense, dense, objective)
    module.build(load_upcycled(str(dense), spec, dtype=torch.float32))
    start_rows(module.model.hf, chat.new_marker_pieces)
    values, _ = gradients(module, chat, [[rows]], rows)
    assert abs(values["kl"].item()) < 1e-5
    assert abs(values["cka"].item()) < 1e-4


def test_identical_experts_give_the_router_no_gradient_without_balance(chat, rows, dense, teacher):
    spec = UpcycleSpec(num_experts=4, num_experts_per_tok=2, jitter=0.0)
    off = Objective(kl=KL(weight=1.0), balance=Balance(weight=0.0), router_z=RouterZ(weight=0.0))
    on = Objective(kl=KL(weight=1.0), balance=Balance(weight=0.1), router_z=RouterZ(weight=0.0))
    norms = {}
    for name, objective in (("off", off), ("on", on)):
        module = make_module(chat, dense, teacher, objective)
        module.build(load_upcycled(str(dense), spec, dtype=torch.float32))
        grads = gradients(module, chat, [[rows]], rows)[1]
        norms[name] = max(g.norm().item() for n, g in grads.items() if "mlp.gate.weight" in n)
    assert norms["off"] < 1e-5 < norms["on"]


# ---------------------------------------------------------------------- freezing, learning rates


def test_freeze_and_multipliers(chat, dense, teacher):
    module = make_module(
        chat,
        dense,
        teacher,
        ALL,
        learning_rate=0.1,
        freeze=["self_attn", "norm"],
        learning_rate_multipliers={r"mlp\.gate\.weight": 3.0, "embed_tokens": 0.0},
    )
    trained = {n for n, p in module.model.hf.named_parameters() if p.requires_grad}
    assert trained == {n for n in trained if "experts" in n or "gate.weight" in n}
    module._trainer = SimpleNamespace(max_steps=10, accumulate_grad_batches=1)
    optimizer = module.configure_optimizers()["optimizer"]
    rates = {id(p): g["initial_lr"] for g in optimizer.param_groups for p in g["params"]}
    names = {id(p): n for n, p in module.model.hf.named_parameters()}
    assert {names[i]: r for i, r in rates.items()} == pytest.approx(
        {n: 0.3 if "gate.weight" in n else 0.1 for n in trained}
    )


def test_a_pattern_that_matches_nothing_is_an_error(chat, dense, teacher):
    with pytest.raises(ValueError, match="'attn_self' matches no parameter"):
        make_module(chat, dense, teacher, ALL, freeze=["attn_self"])
    with pytest.raises(ValueError, match="no regular expression"):
        make_module(chat, dense, teacher, ALL, freeze=["["])


def test_a_frozen_part_gets_no_gradient_and_does_not_move(chat, rows, dense, teacher):
    module = make_module(chat, dense, teacher, ALL, freeze=["self_attn", "norm"])
    before = copy.deepcopy(module.model.state_dict())
    _, grads = gradients(module, chat, [[rows]], rows)
    assert not any("self_attn" in n or "norm" in n for n in grads)
    torch.optim.AdamW([p for p in module.model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {n for n, v in module.model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved
    assert not any("self_attn" in n or "norm" in n for n in moved)


def test_a_bf16_module_keeps_the_positions_of_its_rotary_embedding(chat, dense, teacher):
    module = make_module(chat, dense, teacher, ALL)
    rotary = module.model.hf.model.rotary_emb
    before = rotary.inv_freq.clone()
    module.to(torch.bfloat16)
    assert module.model.hf.model.embed_tokens.weight.dtype == torch.bfloat16
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, before)
    assert torch.equal(module.model.hf.model.rotary_emb.original_inv_freq, before)


# ---------------------------------------------------------------------- vocabulary and markers


def test_new_markers_start_as_the_mean_of_their_pieces(chat, dense):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    before = model.get_input_embeddings().weight.clone()
    pieces = untrained_tokens(str(dense), chat)
    assert len(pieces) == 4
    start_rows(model, pieces)
    after = model.get_input_embeddings().weight
    assert after.shape == before.shape, "free rows are there, so the matrix does not grow"
    for token, parts in pieces.items():
        assert len(parts) > 1
        torch.testing.assert_close(after[token], before[parts].mean(0))
    others = [i for i in range(len(before)) if i not in pieces]
    assert torch.equal(after[others], before[others])


def test_matrix_grows_where_there_is_no_free_row(dense):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    rows = model.config.vocab_size
    start_rows(model, {rows: [1, 2], rows + 1: [3]})
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == rows + 128
    torch.testing.assert_close(weight[rows], weight[[1, 2]].mean(0))


def test_markers_of_a_trained_model_are_kept(chat, dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    chat.save(tmp_path)
    assert untrained_tokens(str(tmp_path), chat) == {}


def test_vocabularies_that_cannot_match_are_refused(chat, dense, tmp_path):
    config = load_config(str(dense), "model.teacher.source")
    config.vocab_size = 100
    with pytest.raises(ValueError, match=r"model\.teacher\.source: .* has 100 vocabulary rows"):
        check_vocabulary(str(dense), config, chat, "model.teacher.source")
    other = Chat.load(str(dense))
    text = other.tokenizer.backend_tokenizer.to_str().replace('"न"', '"न_"', 1)
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(text)
    with pytest.raises(ValueError, match="no folder or hub name"):
        load_config(str(tmp_path / "absent"), "model.teacher.source")
