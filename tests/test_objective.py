import math

import pytest
import torch

from agri_moe.data.chat import Segment
from agri_moe.losses import LogitLoss, linear_cka, routing
from agri_moe.objective import CKA, KL, CrossEntropy, Objective, Schedule, layer_map, value_at


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


def test_schedule_by_step():
    linear = Schedule(start=1.0, end=3.0, steps=4, delay=2)
    assert [linear.at(s) for s in (0, 2, 3, 4, 6, 99)] == [1.0, 1.0, 1.5, 2.0, 3.0, 3.0]
    cosine = Schedule(start=0.0, end=1.0, steps=4, kind="cosine")
    assert cosine.at(1) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert cosine.at(2) == pytest.approx(0.5)
    jump = Schedule(start=0.0, end=1.0, steps=4, kind="constant")
    assert [jump.at(s) for s in (0, 3, 4)] == [0.0, 0.0, 1.0]
    assert value_at(0.5, 10) == 0.5
    with pytest.raises(ValueError, match="steps >= 1"):
        Schedule(start=0, end=1, steps=0)


def test_exactly_the_named_positions_are_selected():
    selected = Objective().select(batch([ROW], [SEGMENTS], CONTROL), sorted(CONTROL))
    # Position t predicts token t + 1. KL: advisory tokens that are no control token; CE: all after the prompt.
    assert selected["positions"].tolist() == [3, 4, 0, 1, 2, 5]
    assert selected["targets"].tolist() == [7, 8, 5, 6, 2, 3]
    assert selected["kl_targets"].tolist() == [7, 8]
    assert selected["segments"].tolist() == [A, A, T, T, T, A]
    assert sorted(selected["sample"].tolist()) == [0, 1, 2, 3, 4, 5]


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


def test_scales_divide_once_by_the_whole_step():
    objective = Objective(ce=CrossEntropy(weight=2.0), kl=KL(weight=3.0, temperature=2.0))
    data = batch([ROW], [SEGMENTS], CONTROL)
    data["step_targets"] = data["step_targets"] * 4  # a step four times this micro-batch
    data |= objective.select(data, sorted(CONTROL))
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 8), torch.randn(12, 8)
    t_hidden, t_head = torch.randn(2, 8), torch.randn(12, 8)
    from agri_moe.teacher import TeacherSignal

    got = objective.logit_loss(hidden, head, data, TeacherSignal(t_hidden, t_head, []), step=0, replicas=4)
    logits = hidden @ head.T
    ce = torch.nn.functional.cross_entropy(logits, data["targets"], reduction="sum")
    kl = 4 * torch.nn.functional.kl_div(
        (logits[:2] / 2).log_softmax(-1),
        ((t_hidden @ t_head.T) / 2).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    assert got.loss.item() == pytest.approx((2 * ce / 24 * 4 + 3 * kl / 8 * 4).item(), rel=1e-5)
    terms = objective.logit_terms(got, data, with_teacher=True)
    assert (terms["ce"].total / terms["ce"].tokens).item() == pytest.approx(ce.item() / 6, rel=1e-5)
    assert (terms["kl"].total / terms["kl"].tokens).item() == pytest.approx(kl.item() / 2, rel=1e-5)


def test_sample_terms_are_means_over_micro_batches():
    objective = Objective(cka=CKA(weight=0.5))
    data = batch([ROW], [SEGMENTS], CONTROL) | {"step_batches": torch.tensor(2)}
    torch.manual_seed(0)
    x, y, logits = torch.randn(6, 5), torch.randn(6, 3), [torch.randn(7, 4), torch.randn(7, 4)]
    routed = routing(logits, 2, torch.ones(7, dtype=torch.bool))
    terms = objective.sample_terms([x], [y], routed, data, step=0, replicas=4)
    distance = 1 - linear_cka(x, y)
    assert terms["cka"].loss.item() == pytest.approx(0.5 * 4 / 2 * distance.item(), rel=1e-5)
    assert terms["cka"].total.item() == pytest.approx(distance.item())
    z = torch.stack([layer.logsumexp(-1) ** 2 for layer in logits]).mean(0).sum()
    assert terms["router_z"].loss.item() == pytest.approx(0.001 * 4 * z.item() / 7, rel=1e-5)
    assert terms["router_z"].tokens.item() == 7


def test_a_micro_batch_of_padding_adds_nothing():
    objective = Objective()
    data = batch([[0] * 8], [[0] * 8], set()) | {"step_batches": torch.tensor(1)}
    routed = routing([torch.randn(8, 4, requires_grad=True)], 2, torch.zeros(8, dtype=torch.bool))
    terms = objective.sample_terms([], [], routed, data, step=0, replicas=1)
    assert {name: term.loss.item() for name, term in terms.items()} == {"balance": 0.0, "router_z": 0.0}
    assert all(term.tokens.item() == 0 for term in terms.values())


def test_logit_terms_without_a_teacher():
    zero = torch.zeros(())
    data = {"targets": torch.zeros(3), "kl_targets": torch.zeros(1)}
    assert set(Objective(kl=KL(weight=1.0)).logit_terms(LogitLoss(zero, zero, zero), data, with_teacher=False)) == {
        "ce"
    }


def test_uniform_layer_map():
    assert layer_map(28, 40)[0] == (0, 0)
    assert layer_map(28, 40)[-1] == (27, 39)
    assert layer_map(2, 4) == [(0, 1), (1, 3)]
    assert layer_map(4, 4) == [(i, i) for i in range(4)]
    assert layer_map(4, 1) == [(i, 0) for i in range(4)]
    teacher_layers = [t for _, t in layer_map(28, 40)]
    assert teacher_layers == sorted(set(teacher_layers)), "each teacher layer at most once, in order"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Objective(ce=CrossEntropy(weight=-1.0)), "objective.ce.weight"),
        (lambda: Objective(kl=KL(temperature=0.0)), "objective.kl.temperature"),
        (lambda: Objective(ce=CrossEntropy(label_smoothing=1.0)), "label_smoothing"),
        (lambda: Objective(kl=KL(segments=["user"])), "objective.kl.segments names user"),
        (lambda: Objective(cka=CKA(sample_tokens=2)), "sample_tokens"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()
