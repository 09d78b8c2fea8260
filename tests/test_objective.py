import math

import pytest
import torch

from agri_moe.data.chat import Segment
from agri_moe.losses import LogitLoss, hidden_distance, linear_cka, routing
from agri_moe.models.causal import Forward
from agri_moe.objective import Objective
from agri_moe.schedules import AdaptiveTemperature, Moment, Schedule
from agri_moe.teacher import TeacherSignal
from agri_moe.terms import CKA, KL, Anchor, Attention, CrossEntropy, Diversity, Hidden

NOW = Moment()


def batch(rows: list[list[int]], segments: list[list[int]], control: set[int]) -> dict[str, torch.Tensor]:
    """One sequence per row, targets shifted by hand."""
    ids = torch.tensor(rows)
    target = torch.roll(ids, -1, 1)
    target_segments = torch.roll(torch.tensor(segments), -1, 1)
    target[:, -1] = target_segments[:, -1] = 0
    counts = torch.zeros(2, len(Segment), dtype=torch.int64)
    for t, s in zip(target.flatten().tolist(), target_segments.flatten().tolist(), strict=True):
        if s:
            counts[0, s] += 1
            counts[1, s] += t in control
    return {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
        "segment_ids": torch.tensor(segments),
        "row_ids": torch.arange(len(rows))[:, None].expand_as(ids).contiguous(),
        "target_ids": target,
        "target_segments": target_segments,
        "step_targets": counts,
        "step_tokens": torch.tensor(ids.numel()),
        "step_batches": torch.tensor(1),
    }


U, T, A = Segment.USER, Segment.THOUGHT, Segment.ASSISTANT
ROW, SEGMENTS, CONTROL = [1, 5, 6, 2, 7, 8, 3], [U, T, T, T, A, A, A], {2, 3}


def test_exactly_the_named_positions_are_selected():
    selected = Objective().select(batch([ROW], [SEGMENTS], CONTROL), sorted(CONTROL))
    # Position t predicts token t + 1. KL: advisory tokens that are no control token; CE: all after the prompt.
    assert selected["positions"].tolist() == [3, 4, 0, 1, 2, 5]
    assert selected["targets"].tolist() == [7, 8, 5, 6, 2, 3]
    assert selected["kl_targets"].tolist() == [7, 8]
    assert selected["segments"].tolist() == [A, A, T, T, T, A]
    assert sorted(selected["sample"].tolist()) == [0, 1, 3, 4], "the teacher is not asked about control tokens"


def test_sample_does_not_depend_on_packing():
    torch.manual_seed(0)
    rows = torch.randint(4, 50, (6, 20)).tolist()
    segments = [[U] * 5 + [T] * 5 + [A] * 10] * 6
    apart = batch(rows, segments, set())
    packed = {k: (v.reshape(2, 60) if v.dim() == 2 and v.shape[1] == 20 else v) for k, v in apart.items()}
    objective = Objective(cka=CKA(weight=1.0, sample_tokens=16))
    first, second = objective.select(apart, []), objective.select(packed, [])
    assert len(first["sample"]) == 16
    assert first["sample"].tolist() == second["sample"].tolist()
    rows_hit = torch.bincount(apart["row_ids"].flatten()[first["sample"]], minlength=6)
    assert (rows_hit > 0).sum() >= 4, "the hash spreads the sample over the rows"


def out(layers=None, **more):
    """A student's forward pass of which only some parts matter."""
    parts = {"read": None, "router_logits": [], "layers": layers or {}, "projected": {}, "attention": {}, "experts": []}
    return Forward(**parts | more)


def heard(layers=None, attention=None):
    return TeacherSignal(torch.empty(0, 2), torch.empty(4, 2), layers or {}, attention or {})


def terms_of(objective, student, signal, data, *, anchor=None, routed=None, now=NOW, sizes=(1, 1), running=None):
    plan = objective.plan(*sizes)
    running = objective.running(plan) if running is None else running
    return objective.sample_terms(student, signal, anchor, routed, data, plan=plan, now=now, running=running)


def logits_of(objective, data, *, now=NOW, running=None, teacher=True, seed=0):
    """The fused loss on random hidden states, and the full logits that it stands for."""
    torch.manual_seed(seed)
    n, m = len(data["targets"]), len(data["kl_targets"])
    hidden, head = torch.randn(n, 8), torch.randn(12, 8)
    t_hidden, t_head = torch.randn(m, 8), torch.randn(12, 8)
    signal = TeacherSignal(t_hidden, t_head, {}, {}) if teacher else None
    got = objective.logit_loss(hidden, head, data, signal, now=now, running=running or {})
    return got, hidden @ head.T, t_hidden @ t_head.T


def test_scales_divide_once_by_the_whole_step():
    objective = Objective(ce=CrossEntropy(weight=2.0), kl=KL(weight=3.0, temperature=2.0))
    data = batch([ROW], [SEGMENTS], CONTROL)
    data["step_targets"] = data["step_targets"] * 4  # a step four times this micro-batch
    data |= objective.select(data, sorted(CONTROL))
    got, logits, wanted = logits_of(objective, data, now=Moment(replicas=4))
    ce = torch.nn.functional.cross_entropy(logits, data["targets"], reduction="sum")
    kl = 4 * torch.nn.functional.kl_div(
        (logits[:2] / 2).log_softmax(-1), (wanted / 2).log_softmax(-1), reduction="sum", log_target=True
    )
    assert got.loss.item() == pytest.approx((2 * ce / 24 * 4 + 3 * kl / 8 * 4).item(), rel=1e-5)
    terms = objective.logit_terms(got, data, with_teacher=True)
    assert (terms["ce"].total / terms["ce"].tokens).item() == pytest.approx(ce.item() / 6, rel=1e-5)
    assert (terms["kl"].total / terms["kl"].tokens).item() == pytest.approx(kl.item() / 2, rel=1e-5)


def test_alpha_blends():
    data = batch([ROW], [SEGMENTS], CONTROL)
    blend = Objective(alpha=Schedule(start=0.0, end=1.0, steps=4), kl=KL(temperature=2.0))
    apart = Objective(ce=CrossEntropy(weight=0.75), kl=KL(weight=0.25, temperature=2.0))
    assert blend.uses("kl")
    data |= apart.select(data, sorted(CONTROL))
    first = logits_of(blend, data, now=Moment(step=1))[0]
    second = logits_of(apart, data)[0]
    assert first.loss.item() == pytest.approx(second.loss.item(), rel=1e-6)


def test_the_thought_fades_in():
    data = batch([ROW], [SEGMENTS], CONTROL)
    objective = Objective(ce=CrossEntropy(thought_weight=Schedule(start=0.0, end=1.0, steps=4)))
    data |= objective.select(data, sorted(CONTROL))
    thought = data["segments"] == T
    for step, weight in ((0, 0.0), (1, 0.25), (4, 1.0)):
        got, logits, _ = logits_of(objective, data, now=Moment(step=step), teacher=False)
        nll = torch.nn.functional.cross_entropy(logits, data["targets"], reduction="none")
        factor = torch.where(thought, weight, 1.0)
        assert got.loss.item() == pytest.approx(((factor * nll).sum() / factor.sum()).item(), rel=1e-5)
        assert got.ce_sum.item() == pytest.approx(nll.sum().item(), rel=1e-5), "what is logged has no weight"


def test_adaptive_temperature_follows_the_entropy():
    data = batch([ROW], [SEGMENTS], CONTROL)
    objective = Objective(kl=KL(weight=1.0, temperature=AdaptiveTemperature(maximum=3.0)))
    data |= objective.select(data, sorted(CONTROL))
    running = objective.running(objective.plan(2, 2))
    got, _, wanted = logits_of(objective, data, running=running)
    entropy = torch.distributions.Categorical(logits=wanted).entropy()
    terms = objective.logit_terms(got, data, with_teacher=True)
    assert terms["teacher_entropy"].total.item() == pytest.approx(entropy.sum().item(), rel=1e-5)
    assert terms["teacher_entropy"].tokens.item() == 2
    running["teacher_entropy"].update(entropy.mean(), torch.tensor(True))
    fixed = Objective(kl=KL(weight=1.0, temperature=1 + 2 * math.exp(-entropy.mean().item())))
    again, there = logits_of(objective, data, running=running)[0], logits_of(fixed, data)[0]
    assert again.loss.item() == pytest.approx(there.loss.item(), rel=1e-5)


def test_statistics_are_means_over_micro_batches():
    objective = Objective(cka=CKA(weight=0.5))
    data = batch([ROW], [SEGMENTS], CONTROL) | {"step_batches": torch.tensor(2)}
    data |= objective.select(data, sorted(CONTROL))
    assert data["cka_sample"].tolist() == [0, 1, 2, 3]
    torch.manual_seed(0)
    x, y, logits = torch.randn(4, 5), torch.randn(4, 3), [torch.randn(7, 4), torch.randn(7, 4)]
    routed = routing(logits, 2, torch.ones(7, dtype=torch.bool))
    terms = terms_of(objective, out({0: x}), heard({0: y}), data, routed=routed, now=Moment(replicas=4))
    distance = 1 - linear_cka(x, y)
    assert terms["cka"].loss.item() == pytest.approx(0.5 * 4 / 2 * distance.item(), rel=1e-5)
    assert terms["cka"].total.item() == pytest.approx(distance.item())
    z = torch.stack([layer.logsumexp(-1) ** 2 for layer in logits]).mean(0).sum()
    assert terms["router_z"].loss.item() == pytest.approx(0.001 * 4 * z.item() / 7, rel=1e-5)
    assert terms["router_z"].tokens.item() == 7


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_hidden_distance_counts_for_the_tokens_it_was_drawn_from(distance):
    objective = Objective(hidden=Hidden(weight=0.5, distance=distance, sample_tokens=4, segments=["assistant"]))
    row, segments = [1, 5, 6, 2, 7, 8, 9, 10, 11, 12, 3], [U, T, T, T, *[A] * 7]
    data = batch([row], [segments], CONTROL)
    data["step_targets"] = data["step_targets"] * 3
    data |= objective.select(data, sorted(CONTROL))
    assert data["hidden_tokens"].item() == 6, "six advisory tokens that are no control token"
    assert len(data["hidden_sample"]) == 4
    torch.manual_seed(0)
    x, y = torch.randn(len(data["sample"]), 5), torch.randn(len(data["sample"]), 5)
    term = terms_of(objective, out({0: x}), heard({0: y}), data, now=Moment(replicas=2))["hidden"]
    mean = hidden_distance(x[data["hidden_sample"]], y[data["hidden_sample"]], distance).mean().item()
    assert term.loss.item() == pytest.approx(0.5 * 2 * mean * 6 / 18, rel=1e-5)
    assert (term.total / term.tokens).item() == pytest.approx(mean, rel=1e-5)


def test_layer_weights_and_layer_maps_in_a_term():
    objective = Objective(cka=CKA(weight=1.0, layers=[(0, 3), (1, 0)], layer_weights="progressive"))
    data = batch([ROW], [SEGMENTS], CONTROL)
    data |= objective.select(data, sorted(CONTROL))
    torch.manual_seed(0)
    x, y = {i: torch.randn(4, 5) for i in range(2)}, {j: torch.randn(4, 3) for j in (0, 3)}
    term = terms_of(objective, out(x), heard(y), data, sizes=(2, 4), now=Moment(progress=1.0))["cka"]
    first, second = 1 - linear_cka(x[0], y[3]), 1 - linear_cka(x[1], y[0])
    # Depths 1/4 and 3/4 at the end of training: weights 0.5 and 1.5.
    assert term.loss.item() == pytest.approx(((0.5 * first + 1.5 * second) / 2).item(), rel=1e-5)
    assert term.total.item() == pytest.approx(((first + second) / 2).item(), rel=1e-5)
    assert term.layers.tolist() == pytest.approx([first.item(), second.item()])


def test_balanced_layers_contribute_alike():
    objective = Objective(cka=CKA(weight=1.0, layer_weights="balanced", debiased=False))
    data = batch([ROW], [SEGMENTS], CONTROL)
    data |= objective.select(data, sorted(CONTROL))
    torch.manual_seed(0)
    x, y = {i: torch.randn(4, 5) for i in range(2)}, {j: torch.randn(4, 3) for j in range(2)}
    running = objective.running(objective.plan(2, 2))
    first = terms_of(objective, out(x), heard(y), data, sizes=(2, 2), running=running)["cka"]
    running["cka"].update(first.layers, torch.tensor(True))
    second = terms_of(objective, out(x), heard(y), data, sizes=(2, 2), running=running)["cka"]
    inverse = 1 / first.layers
    expected = (inverse / inverse.mean() * first.layers).mean()
    assert second.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert second.total.item() == pytest.approx(first.total.item())


def test_anchor_and_teacher_are_compared_apart():
    objective = Objective(cka=CKA(weight=1.0), anchor=Anchor(cka=CKA(weight=2.0), hidden=Hidden(weight=3.0)))
    data = batch([ROW], [SEGMENTS], CONTROL)
    data |= objective.select(data, sorted(CONTROL))
    torch.manual_seed(0)
    x, y, dense = torch.randn(4, 5), torch.randn(4, 3), torch.randn(4, 5)
    terms = terms_of(objective, out({0: x}), heard({0: y}), data, anchor=heard({0: dense}))
    assert terms["cka"].total.item() == pytest.approx(1 - linear_cka(x, y).item(), rel=1e-5)
    assert terms["anchor_cka"].loss.item() == pytest.approx(2 * (1 - linear_cka(x, dense).item()), rel=1e-5)
    same = terms_of(objective, out({0: x}), heard({0: y}), data, anchor=heard({0: x}))
    assert same["anchor_hidden"].loss.item() == 0.0
    assert same["anchor_cka"].total.item() == pytest.approx(0.0, abs=1e-5)


def test_attention_is_a_statistic_of_the_sampled_queries():
    objective = Objective(attention=Attention(weight=0.5, queries=2))
    data = batch([ROW], [SEGMENTS], CONTROL)
    data |= objective.select(data, sorted(CONTROL))
    assert sorted(data["queries"].tolist()[0]) == [3, 4]
    assert torch.equal(data["queries"], data["teacher_queries"])
    assert data["key_tokens"][..., 0].tolist() == [list(range(7))]
    torch.manual_seed(0)
    causal = torch.arange(7) <= data["queries"][0][:, None]
    student, teacher = (torch.randn(1, 2, 2, 7).masked_fill(~causal, -torch.inf).softmax(-1) for _ in range(2))
    student.requires_grad_()
    term = terms_of(objective, out(attention={0: student}), heard(attention={0: teacher}), data)["attention"]
    kl = torch.where(causal, teacher * (teacher.clamp(min=1e-30) / student.clamp(min=1e-30)).log(), 0.0).sum(-1).mean()
    assert term.total.item() == pytest.approx(kl.item(), rel=1e-5)
    assert term.loss.item() == pytest.approx(0.5 * kl.item(), rel=1e-5)
    term.loss.backward()
    assert torch.isfinite(student.grad).all()


def test_diversity_is_small_for_unlike_experts():
    objective = Objective(diversity=Diversity(weight=0.1, sample_tokens=4))
    data = batch([ROW], [SEGMENTS], CONTROL)
    data |= objective.select(data, sorted(CONTROL))
    assert len(data["expert_sample"]) == 4
    torch.manual_seed(0)
    routed = routing([torch.randn(7, 3)], 2, torch.ones(7, dtype=torch.bool))
    outputs = torch.randn(3, 40, 50)
    term = terms_of(objective, out(experts=[outputs]), None, data, routed=routed)["diversity"]
    pairs = [linear_cka(outputs[i], outputs[j]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert term.total.item() == pytest.approx(sum(pairs) / 3, abs=1e-6)
    copies = terms_of(objective, out(experts=[outputs[:1].expand(3, -1, -1)]), None, data, routed=routed)["diversity"]
    assert copies.total.item() == pytest.approx(1.0, rel=1e-5)
    assert copies.loss.item() == pytest.approx(0.1, rel=1e-5)


def test_a_micro_batch_of_padding_adds_nothing():
    everything = Objective(
        kl=KL(weight=1.0),
        cka=CKA(weight=1.0),
        hidden=Hidden(weight=1.0),
        attention=Attention(weight=1.0),
        diversity=Diversity(weight=1.0),
    )
    data = batch([[0] * 8], [[0] * 8], set()) | {"step_batches": torch.tensor(1)}
    data |= everything.select(data, [])
    routed = routing([torch.randn(8, 4, requires_grad=True)], 2, torch.zeros(8, dtype=torch.bool))
    queries = data["queries"].shape[1]
    student = out(
        {0: torch.empty(0, 5, requires_grad=True)},
        attention={0: torch.zeros(1, 2, queries, 8, requires_grad=True)},
        experts=[torch.empty(3, 0, 5, requires_grad=True)],
    )
    teacher = heard({0: torch.empty(0, 5)}, {0: torch.zeros(1, 2, queries, 8)})
    terms = terms_of(everything, student, teacher, data, routed=routed)
    assert {name: term.loss.item() for name, term in terms.items()} == dict.fromkeys(
        ("cka", "hidden", "attention", "diversity", "balance", "router_z"), 0.0
    )
    assert all(term.tokens.item() == 0 for term in terms.values())
    assert all(term.loss.requires_grad for term in terms.values())


def test_a_view_that_is_not_the_same():
    """The teacher's row has two tokens in front and lacks the thought."""
    data = batch([ROW, ROW], [SEGMENTS, SEGMENTS], CONTROL)
    # Student tokens 0 (prompt), 4 and 5 (advisory) stand in the teacher's row at 2, 4 and 5; its width is 8.
    tokens = torch.tensor([2, -1, -1, -1, 4, 5, -1])
    data |= {
        "teacher_input_ids": torch.zeros(2, 8, dtype=torch.int64),
        "teacher_position_ids": torch.arange(8).expand(2, 8).contiguous(),
        "teacher_tokens": torch.stack([tokens, tokens.where(tokens < 0, tokens + 8)]),
    }
    objective = Objective(kl=KL(weight=1.0), cka=CKA(weight=1.0), attention=Attention(weight=1.0, queries=4))
    data |= objective.select(data, sorted(CONTROL))
    assert data["kl_targets"].tolist() == [7, 8, 7, 8]
    assert data["positions"].tolist()[:4] == [3, 4, 10, 11]
    assert data["teacher_positions"].tolist() == [3, 4, 11, 12], "one before the teacher's own token"
    pairs = dict(zip(data["sample"].tolist(), data["teacher_sample"].tolist(), strict=True))
    assert pairs == {3: 3, 4: 4, 10: 11, 11: 12}
    assert [sorted(row) for row in data["queries"].tolist()] == [[-1, -1, 3, 4]] * 2
    assert [sorted(row) for row in data["teacher_queries"].tolist()] == [[-1, -1, 3, 4]] * 2
    assert data["key_tokens"][..., 0].tolist() == [tokens.tolist()] * 2


def test_own_words_are_not_learned_by_heart():
    objective = Objective(
        alpha=0.3, kl=KL(divergence="jsd"), hidden=Hidden(weight=1.0), anchor=Anchor(cka=CKA(weight=1.0))
    )
    only = objective.divergence_only()
    assert not only.uses("ce", "cka", "hidden", "attention", "anchor_cka", "anchor_hidden")
    assert (only.kl_weight, only.ce_weight_at(0), only.kl.divergence) == (0.3, 0.0, "jsd")
    assert only.uses("balance", "router_z")


def test_logit_terms_without_a_teacher():
    zero = torch.zeros(())
    data = {"targets": torch.zeros(3), "kl_targets": torch.zeros(1)}
    assert set(Objective(kl=KL(weight=1.0)).logit_terms(LogitLoss(zero, zero, zero), data, with_teacher=False)) == {
        "ce"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Objective(ce=CrossEntropy(weight=-1.0)), "objective.ce.weight"),
        (lambda: Objective(kl=KL(temperature=0.0)), "objective.kl.temperature"),
        (lambda: Objective(ce=CrossEntropy(label_smoothing=1.0)), "label_smoothing"),
        (lambda: Objective(kl=KL(weight=1.0, segments=["user"])), "objective.kl.segments names user"),
        (lambda: Objective(cka=CKA(sample_tokens=2)), "objective.cka.sample_tokens"),
        (lambda: Objective(anchor=Anchor(hidden=Hidden(weight=-1.0))), "objective.anchor.hidden.weight"),
        (lambda: Objective(alpha=1.5), "objective.alpha"),
        (lambda: Objective(alpha=0.5, kl=KL(weight=1.0)), "leave those two out"),
        (lambda: Objective(kl=KL(beta=1.0)), "objective.kl.beta"),
        (
            lambda: Objective(attention=Attention(weight=1.0, segments=["user"])),
            "objective.attention.segments names user",
        ),
        (lambda: Objective(attention=Attention(queries=0)), "objective.attention.queries"),
        (lambda: Objective(ce=CrossEntropy(segments=[])), "objective.ce.segments is empty"),
        (lambda: Objective(kl=KL(weight=1.0, segments=[])), "objective.kl.segments is empty"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()
