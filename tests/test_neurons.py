"""How experts begin, and how neurons change hands."""

import pytest
import torch
import torch.nn.functional as F
from test_ffn import small

from agri_moe.models.ffn import find_ffns, prove
from agri_moe.models.moe import MoE, RoutingRule
from agri_moe.models.neurons import slices, start_at_random, start_from_dense, token_groups

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
