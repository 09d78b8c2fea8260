"""How experts begin, and how neurons change hands."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ffn import small

from agri_moe.models.ffn import find_ffns, prove
from agri_moe.models.moe import MoE, RoutingRule
from agri_moe.models.neurons import (
    Reallocation,
    move_neurons,
    plan_move,
    slices,
    start_at_random,
    start_from_dense,
    token_groups,
)

D = 16


def dense(family="llama", **changes):
    model = small(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)
    return prove(model, find_ffns(model, "model.source"), "model.source")[1]


def sample(n=512):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, D, generator=generator)
    return centres[torch.randint(8, (n,), generator=generator)] + 0.3 * torch.randn(n, D, generator=generator)


def start(ffn, width, experts=16, top_k=2):
    moe = MoE(
        D,
        [width] * experts,
        RoutingRule(top_k=top_k),
        ffn.act_fn,
        gated=ffn.gated,
        inner_bias="up_bias_S" in ffn.weights(),
        output_bias="bias_D" in ffn.weights(),
    )
    start_from_dense(moe, ffn, sample(), torch.Generator().manual_seed(0))
    return moe


@pytest.mark.parametrize(
    ("family", "top_k", "width"),
    [("llama", 2, 24), ("llama", 2, 12), ("llama", 4, 12), ("llama", 4, 6), ("gpt_neox", 2, 12), ("phi3", 1, 24)],
)
def test_whole_and_sliced_starts_are_the_dense_function(family, top_k, width):
    ffn = dense(family)
    moe = start(ffn, width, top_k=top_k)
    x = sample(64)
    with torch.no_grad():
        got, expected = moe(x).output_ND, ffn.answer(x)
    assert F.cosine_similarity(got, expected).min() > 1 - 1e-6
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_narrow_starts_take_what_speaks_to_each_group():
    """Better on average than the best fixed half, and every group's experts hold distinct neurons."""
    ffn = dense(intermediate_size=64)
    moe = start(ffn, 16)
    x = sample(2048)[512:]
    y = ffn.answer(x)
    h, down = ffn.neurons(x), ffn.weights()["down_SD"]
    half = (h.square() * down.square().sum(1)).mean(0).topk(32).indices
    fixed = (h[:, half] @ down[half] - y).norm()
    with torch.no_grad():
        ours = (moe(x).output_ND - y).norm()
    assert ours < 0.9 * fixed
    ups = moe.up_SD.view(8, 32, D)
    assert all(len(group.unique(dim=0)) == 32 for group in ups)
    load = moe(x).assignment.load_E.double()
    share = load / load.sum()
    assert torch.special.entr(share).sum() / torch.tensor(16.0).log() > 0.9


def test_groups_are_of_one_size():
    sizes = token_groups(sample(2000), 8, torch.Generator().manual_seed(0)).bincount(minlength=8)
    assert sizes.min() > 200
    assert sizes.max() < 300


def test_slices_hold_no_neuron_twice():
    assert slices(2, 16, 24, 24) == 1
    assert slices(2, 16, 12, 24) == 2
    assert slices(2, 16, 6, 24) == 2
    assert slices(4, 16, 12, 24) == 2
    assert slices(4, 10, 6, 24) == 2
    assert slices(2, 16, 18, 24) == 1


def test_a_start_is_the_same_each_time():
    ffn = dense()
    one, other = start(ffn, 6), start(ffn, 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_random_start():
    moe = MoE(D, [24] * 4, RoutingRule(), F.silu, inner_bias=True)
    start_at_random(moe, 0.02, torch.Generator().manual_seed(0))
    assert abs(moe.up_SD.std().item() - 0.02) < 0.002
    assert not moe.up_bias_S.any()


SMALL_STEPS = Reallocation(every_n_steps=1, min_width=4, max_width=32, multiple_of=2)


def test_widths_follow_losses_under_the_budget():
    widths = SMALL_STEPS.widths([16] * 8, [1.0, 8.0, 3.0, 7.0, 5.0, 2.0, 4.0, 6.0])
    assert widths == [14, 18, 16, 18, 16, 14, 16, 16]
    assert SMALL_STEPS.widths([16] * 8, [1.0] * 8) == [16] * 8
    assert SMALL_STEPS.widths([80, 80], [0.0, 1.0]) == [80, 80], "nothing above max_width"
    assert Reallocation(min_width=1, max_width=999, multiple_of=16, share=0.5).widths([80, 80], [0.0, 1.0]) == [64, 96]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=4, max_size=16), st.integers(1, 12))
def test_limits_hold_over_many_reallocations(losses, times):
    widths = [16] * len(losses)
    for turn in range(times):
        before = widths
        widths = SMALL_STEPS.widths(widths, losses[turn % len(losses) :] + losses[: turn % len(losses)])
        assert sum(widths) == 16 * len(losses)
        assert all(4 <= width <= 32 and width % 2 == 0 for width in widths)
        assert all(new <= 1.25 * old and new >= 0.8 * old - 1e-9 for new, old in zip(widths, before, strict=True))


def trained(widths):
    """A mixture with moments, after a few steps."""
    moe = MoE(D, widths, RoutingRule(), F.silu)
    start_at_random(moe, 0.3, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
    for step in range(3):
        moe(sample(64) + step).output_ND.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return moe, optimizer


def test_growing_alone_keeps_the_function():
    """Neurons that nobody hears are taken from; so all that changes is that others are split."""
    moe, optimizer = trained((12, 12, 12, 12))
    with torch.no_grad():
        moe.down_SD[:6].zero_()
    x = sample(256)
    before = moe(x).output_ND.detach()
    move = plan_move(moe, (8, 16, 12, 12), moe.strengths(x))
    move_neurons(moe, (8, 16, 12, 12), move, optimizer, torch.Generator().manual_seed(1))
    after = moe(x).output_ND.detach()
    assert moe.widths == (8, 16, 12, 12)
    assert (after - before).norm() < 1e-3 * before.norm()
    assert not torch.equal(after, before)
    # The halves are apart, and will stay so.
    halves = (move.split_S == -1).nonzero()[:, 0]
    assert len(halves) == 4
    for row in halves.tolist():
        twin = int(((move.row_S == move.row_S[row]) & (move.split_S == 1)).nonzero()[0, 0])
        assert not torch.equal(moe.up_SD[row], moe.up_SD[twin])
        assert torch.equal(moe.down_SD[row], moe.down_SD[twin])


def test_shrinking_takes_the_weakest():
    moe, _ = trained((12, 12, 12, 12))
    x = sample(256)
    strength = moe.strengths(x)
    move = plan_move(moe, (8, 16, 12, 12), strength)
    kept = set(move.row_S[:8].tolist())
    assert kept == set(strength[:12].topk(8).indices.tolist())
    # By loop: what a neuron adds, weighted by the router, on its expert's tokens.
    out = moe(x).assignment
    mine = out.experts == 0
    tokens, weights = x[out.token_A[mine]], out.weight_A[mine]
    h = F.silu(tokens @ moe.gate_SD[3]) * (tokens @ moe.up_SD[3])
    expected = (h * weights).square().sum() * moe.down_SD[3].square().sum()
    torch.testing.assert_close(strength[3], expected.detach(), rtol=1e-4, atol=1e-6)


def test_moments_go_with_their_neurons():
    moe, optimizer = trained((12, 12, 12, 12))
    old = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in moe.per_neuron.items()}
    move = plan_move(moe, (8, 16, 12, 12), moe.strengths(sample(256)))
    move_neurons(moe, (8, 16, 12, 12), move, optimizer, torch.Generator().manual_seed(1))
    half = move.split_S != 0
    for name, parameter in moe.per_neuron.items():
        state = optimizer.state[parameter]
        assert state["step"] == 3
        for key, share in (("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
            expected = old[name][key][move.row_S]
            if name != "down_SD":
                expected[half] *= share
            torch.testing.assert_close(state[key], expected)
    # That is what the gradients do: those of a half are half, where it reads.
    x = sample(256)
    moe(x).output_ND.square().sum().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in moe.parameters())


def test_a_reallocation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"model\.reallocation\.growth_factor is 0\.5: it must be above 1"):
        Reallocation(growth_factor=0.5)
    with pytest.raises(ValueError, match="experts begin with 100 neurons"):
        Reallocation().check(100)
