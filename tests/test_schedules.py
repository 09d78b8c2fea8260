import math

import pytest
import torch

from agri_moe.schedules import (
    AdaptiveTemperature,
    RunningMean,
    Schedule,
    bounds,
    is_on,
    layer_weights,
    value_at,
)

YES, NO = torch.tensor(True), torch.tensor(False)


def test_schedule_by_step():
    linear = Schedule(start=1.0, end=3.0, steps=4, delay=2)
    assert [linear.at(s) for s in (0, 2, 3, 4, 6, 99)] == [1.0, 1.0, 1.5, 2.0, 3.0, 3.0]
    cosine = Schedule(start=0.0, end=1.0, steps=4, kind="cosine")
    assert cosine.at(1) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert cosine.at(2) == pytest.approx(0.5)
    jump = Schedule(start=0.0, end=1.0, steps=4, kind="constant")
    assert [jump.at(s) for s in (0, 3, 4)] == [0.0, 0.0, 1.0]
    assert value_at(0.5, 10) == 0.5
    assert bounds(linear) == (1.0, 3.0)
    assert is_on(cosine)
    assert not is_on(0.0)
    with pytest.raises(ValueError, match="steps >= 1"):
        Schedule(start=0, end=1, steps=0)


def test_running_mean_by_hand():
    mean = RunningMean(2, decay=0.5)
    assert mean.value.tolist() == [0.0, 0.0]
    mean.update(torch.tensor([4.0, 8.0]), YES)
    assert mean.value.tolist() == [4.0, 8.0]  # one value is its own mean, whatever the decay
    mean.update(torch.tensor([1.0, 2.0]), YES)
    # (0.5 * 4 * 0.5 + 0.5 * 1) / (1 - 0.25) = (1 + 0.5) / 0.75
    assert mean.value.tolist() == pytest.approx([2.0, 4.0])
    mean.update(torch.tensor([math.nan, math.inf]), NO)
    assert mean.value.tolist() == pytest.approx([2.0, 4.0])


def test_running_mean_is_saved_and_not_rounded():
    mean = RunningMean(1)
    mean.update(torch.tensor([1.001]), YES)
    assert mean.to(torch.bfloat16).total.dtype == torch.float32
    other = RunningMean(1)
    other.load_state_dict(mean.state_dict())
    assert other.value.item() == pytest.approx(1.001)


def test_adaptive_temperature_by_hand():
    rule = AdaptiveTemperature(minimum=1.0, maximum=3.0, scale=2.0, decay=0.5)
    entropy = RunningMean(decay=0.5)
    assert rule.at(entropy).item() == 1.0, "no entropy is known yet"
    entropy.update(torch.tensor(0.0), YES)
    assert rule.at(entropy).item() == pytest.approx(3.0)
    entropy.update(torch.tensor(3.0), YES)  # running mean (0 + 0.5 * 3) / 0.75 = 2
    assert rule.at(entropy).item() == pytest.approx(1 + 2 * math.exp(-1))
    for _ in range(40):
        entropy.update(torch.tensor(1000.0), YES)
    assert rule.at(entropy).item() == pytest.approx(1.0)
    assert bounds(rule) == (1.0, 3.0)


@pytest.mark.parametrize("wrong", [{"minimum": 0.0}, {"minimum": 3.0}, {"scale": 0.0}, {"decay": 1.0}])
def test_impossible_temperatures_are_refused(wrong):
    with pytest.raises(ValueError, match="adaptive temperature"):
        AdaptiveTemperature(**wrong)


def test_progressive_weights_by_hand():
    # Depths 1/8, 3/8, 5/8, 7/8; at p = 0 the weights are 1 - d over their mean 1/2.
    assert layer_weights("progressive", 4, 0.0, None).tolist() == pytest.approx([1.75, 1.25, 0.75, 0.25])
    assert layer_weights("progressive", 4, 0.5, None).tolist() == pytest.approx([1.0] * 4)
    assert layer_weights("progressive", 4, 1.0, None).tolist() == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert layer_weights("equal", 3, 0.3, None).tolist() == [1.0] * 3
    assert layer_weights("progressive", 1, 1.0, None).tolist() == [1.0]


def test_balanced_weights_by_hand():
    running = RunningMean(3, decay=0.9)
    assert layer_weights("balanced", 3, 0.0, running).tolist() == [1.0] * 3
    running.update(torch.tensor([0.1, 0.2, 0.4]), YES)
    weights = layer_weights("balanced", 3, 0.0, running)
    # 1 / R = 10, 5, 2.5, mean 35 / 6
    assert weights.tolist() == pytest.approx([60 / 35, 30 / 35, 15 / 35])
    contributions = weights * running.value
    assert contributions.tolist() == pytest.approx([contributions[0].item()] * 3)


def test_a_layer_that_agrees_does_not_take_all_the_weight():
    running = RunningMean(2)
    running.update(torch.tensor([0.0, 1.0]), YES)
    # The floor is a hundredth of the mean 0.5: weights 200 and 1 over their mean.
    assert layer_weights("balanced", 2, 0.0, running).tolist() == pytest.approx([200 / 100.5, 1 / 100.5])
    running = RunningMean(2)
    running.update(torch.zeros(2), YES)
    assert layer_weights("balanced", 2, 0.0, running).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [([0.0] * 40, [1.0] * 40), ([-1e-6, -2e-6], [1.0, 1.0]), ([-1e-3, 0.2], [200 / 100.5, 1 / 100.5])],
)
def test_no_loss_at_all_or_one_below_zero_weighs_no_more_than_the_floor(losses, wanted):
    """1 - debiased CKA of equal models is 0 but for rounding, and may be negative."""
    running = RunningMean(len(losses))
    running.update(torch.tensor(losses), YES)
    assert layer_weights("balanced", len(losses), 0.0, running).tolist() == pytest.approx(wanted)


def test_running_mean_is_in_float32_where_bf16_is_the_default():
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does while a module is built
    try:
        running = RunningMean(2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert running.total.dtype == running.weight.dtype == torch.float32
