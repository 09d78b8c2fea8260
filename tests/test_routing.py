"""Router losses against a loop over tokens, transformers and values by hand."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func,
    router_z_loss_func,
)

from agri_moe.losses import balance_loss, max_violation, routing
from agri_moe.metrics import RoutingStatistics, balance_score, balanced_perplexity


def naive_routing(layers: list[Tensor], top_k: int, valid: Tensor) -> dict[str, Tensor]:
    """One token at a time."""
    load, probability = (torch.zeros(len(layers), layers[0].shape[1]) for _ in range(2))
    entropy, z, tokens = torch.zeros(len(layers)), 0.0, int(valid.sum())
    for i, logits in enumerate(layers):
        for token in torch.nonzero(valid).flatten().tolist():
            p = logits[token].float().softmax(0)
            for expert in p.argsort(descending=True)[:top_k]:
                load[i, expert] += 1
            probability[i] += p / tokens
            entropy[i] -= sum(q * q.log() for q in p)
            z = z + torch.log(logits[token].float().exp().sum()) ** 2 / len(layers)
    return {"load_LE": load, "probability_LE": probability, "entropy_L": entropy, "z_sum": z}


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_equals_a_loop_over_tokens(top_k, dtype):
    torch.manual_seed(0)
    layers = [torch.randn(12, 5).to(dtype) for _ in range(3)]
    valid = torch.rand(12) > 0.4
    for logits in layers:
        logits[~valid] = float("nan")  # padding never counts, whatever is in it
    ours = routing(layers, top_k, valid)
    for name, value in naive_routing(layers, top_k, valid).items():
        torch.testing.assert_close(getattr(ours, name), value)
    assert ours.tokens == valid.sum()
    assert torch.equal(ours.load_LE.sum(-1), (ours.tokens * top_k).expand(3))


def test_padding_gets_no_gradient():
    logits = torch.randn(6, 4, requires_grad=True)
    valid = torch.tensor([True, False, True, True, False, True])
    ours = routing([logits], 2, valid)
    (balance_loss(ours).sum() + ours.z_sum).backward()
    assert logits.grad[~valid].abs().sum() == 0
    assert (logits.grad[valid].abs().sum(-1) > 0).all()
    assert not ours.load_LE.requires_grad
    assert not ours.entropy_L.requires_grad


@pytest.mark.parametrize("top_k", [1, 2])
def test_transformers_balance_loss_is_k_times_ours(top_k):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(0)
    logits = torch.randn(20, 6, requires_grad=True)
    valid = torch.arange(20) % 5 != 0
    ours = balance_loss(routing([logits], top_k, valid))
    theirs = load_balancing_loss_func((logits,), 6, top_k, attention_mask=valid[None])
    torch.testing.assert_close(top_k * ours[0], theirs)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (top_k * ours[0], theirs)]
    torch.testing.assert_close(*gradients)


def test_layers_collapsed_on_disjoint_experts_score_as_collapsed():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    first, second = torch.zeros(10, 2), torch.zeros(10, 2)
    first[:, 0], second[:, 1] = 50.0, 50.0
    ours = balance_loss(routing([first, second], 1, torch.ones(10, dtype=torch.bool)))
    torch.testing.assert_close(ours, torch.tensor([2.0, 2.0]))  # E when collapsed
    assert load_balancing_loss_func((first, second), 2, 1) == pytest.approx(1.0)  # pooled, it looks balanced


def test_collapse_shows_in_score_and_perplexity_too():
    """Each layer answers for itself: pooled, the load of these two would be perfectly even."""
    first, second = torch.zeros(10, 2), torch.zeros(10, 2)
    first[:, 0], second[:, 1] = 50.0, 50.0
    metric = RoutingStatistics(2, 2)
    metric.update(routing([first, second], 1, torch.ones(10, dtype=torch.bool)))
    found = metric.compute()
    assert found["balance"].tolist() == [0.0, 0.0]
    assert found["dead"].tolist() == [0.5, 0.5]
    assert balance_score(found["load"].sum(0)).item() == pytest.approx(1.0)
    assert balanced_perplexity(1.0, found["balance"].mean(), beta=0.5).item() == pytest.approx(math.exp(1.5))


def test_balance_loss_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    # P = (0.3, 0.45, 0.25); at top-1 f = (1/2, 1/2, 0), at top-2 (1/4, 2/4, 1/4).
    for top_k, expected in ((1, 3 * (0.15 + 0.225)), (2, 3 * (0.075 + 0.225 + 0.0625))):
        assert balance_loss(routing([logits], top_k, torch.ones(2).bool())).item() == pytest.approx(expected)


def test_what_experts_worked_on_is_no_part_of_the_balance_loss():
    logits = torch.tensor([[2.0, 1, 0, 0]]).repeat(6, 1)
    even = torch.full((1, 4), 3.0)
    ours = routing([logits], 2, torch.ones(6).bool(), even)
    assert torch.equal(ours.load_LE, even)
    assert ours.wanted_LE.tolist() == [[6.0, 6, 0, 0]]
    assert torch.equal(balance_loss(ours), balance_loss(routing([logits], 2, torch.ones(6).bool())))


def test_balance_loss_is_one_at_balance():
    logits = 3.0 * torch.eye(4).repeat(5, 1)
    torch.testing.assert_close(balance_loss(routing([logits], 1, torch.ones(20).bool())), torch.ones(1))


def test_z_loss_by_hand():
    # logsumexp(0, 0) = log 2; logsumexp(log 3, 0) = log 4 = 2 log 2. Sum of squares 5 log^2 2, halved by a
    # second layer whose logits (-log 2 twice) have logsumexp 0.
    log2 = torch.tensor(2.0).log()
    first = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]])
    second = -log2.expand(2, 2)
    ours = routing([first, second], 1, torch.ones(2).bool())
    torch.testing.assert_close(ours.z_sum, 2.5 * log2**2)


def test_switch_transformers_in_transformers_has_the_same_losses():
    """Where one expert is chosen its balance loss is ours, and its z-loss is the mean over tokens of ours."""
    torch.manual_seed(0)
    logits = torch.randn(3, 20, 6)  # groups, tokens, experts, of which transformers takes the mean over groups
    whole = routing([logits.flatten(0, 1)], 1, torch.ones(60).bool())
    assert (whole.z_sum / whole.tokens).item() == pytest.approx(router_z_loss_func(logits).item())
    p = logits.softmax(-1)
    theirs = load_balancing_loss_func(p, p.argmax(-1))
    ours = torch.stack([balance_loss(routing([group], 1, torch.ones(20).bool()))[0] for group in logits])
    assert ours.mean().item() == pytest.approx(theirs.item())


def test_how_far_the_busiest_expert_is_above_the_mean():
    assert max_violation(torch.tensor([[5.0, 1, 3, 3], [0, 0, 0, 12]])).item() == pytest.approx((2 / 3 + 3) / 2)
    assert max_violation(torch.full((1, 4), 7.0)) == max_violation(torch.zeros(2, 4)) == 0


def test_no_valid_token_is_a_zero_with_a_graph():
    logits = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    ours = routing(logits, 2, torch.zeros(4, dtype=torch.bool))
    loss = balance_loss(ours).sum() + ours.z_sum
    assert loss == ours.tokens == ours.entropy_L.sum() == 0
    loss.backward()
    assert all(layer.grad is not None and not layer.grad.any() for layer in logits)


def test_routing_refuses_what_does_not_fit():
    valid = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="no router logits"):
        routing([], 1, valid)
    with pytest.raises(ValueError, match="not \\[N, E\\]"):
        routing([torch.zeros(4, 3), torch.zeros(4, 2)], 1, valid)
    with pytest.raises(ValueError, match="not \\[N, E\\]"):
        routing([torch.zeros(5, 3)], 1, valid)
    with pytest.raises(ValueError, match="top_k 4"):
        routing([torch.zeros(4, 3)], 4, valid)
