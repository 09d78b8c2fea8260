"""Other ways of routing: each against a loop over tokens in float64, against the stock block, and through whole runs."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import chi2
from test_cli import refused, scalars
from test_experts import moe
from test_shared_core import shared_core
from test_sharding import on_ranks
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from agri_moe.cli import main
from agri_moe.losses import max_violation
from agri_moe.models.causal import CausalModel
from agri_moe.models.routing import Routers, RoutingConfig, kept_routing
from agri_moe.models.sharding import shard
from agri_moe.schedules import Schedule
from agri_moe.trained import load_checkpoint

N, E, K, D = 24, 4, 2, 32
VALID = torch.tensor([i for i in range(N) if i % 6 != 5])
NEUTRAL = RoutingConfig()
WAYS = {
    "temperature": RoutingConfig(temperature=0.5),
    "gaussian": RoutingConfig(noise="gaussian", noise_scale=0.7),
    "gumbel": RoutingConfig(noise="gumbel", temperature=2.0),
    "drop": RoutingConfig(drop=True, capacity_factor=0.8),
    "noise and drop": RoutingConfig(drop=True, capacity_factor=1.0, noise="gaussian", noise_scale=0.5),
    "bias": RoutingConfig(bias_update_rate=0.1),
    "bias, noise and drop": RoutingConfig(bias_update_rate=0.1, noise="gumbel", drop=True),
    "expert choice": RoutingConfig(kind="expert_choice", capacity_factor=0.75),
    "expert choice with noise": RoutingConfig(kind="expert_choice", noise="gaussian", noise_scale=0.3),
}
BIAS = torch.tensor([[0.3, -0.2, 0.0, 0.1], [0.0, 0.5, -0.5, 0.2]])


def routed(config: RoutingConfig, hf: PreTrainedModel | None = None) -> tuple[PreTrainedModel, Routers]:
    """A model whose routers have something to say, and its routers, at the first step of a run."""
    hf = moe() if hf is None else hf
    hf.config._experts_implementation = "eager"  # grouped products know no float64
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.mlp.gate.weight.normal_(std=0.3)
    routers = Routers(hf.train(), config)
    routers.begin_step(0)
    if routers.bias_LE is not None:
        routers.bias_LE.copy_(BIAS)
    return hf, routers


def ask(hf: Any, routers: Routers, hidden_ND: torch.Tensor, valid: torch.Tensor | None = VALID) -> Any:
    """The first block's answers, and what the routers have counted there."""
    if valid is not None:
        routers.expect(valid)
    routers.begin_pass()
    torch.manual_seed(7)
    answers = hf.model.layers[0].mlp(hidden_ND[None])[0]
    return answers, routers.end_pass()[0] if valid is not None else None


def noise_of(config: RoutingConfig, tokens: int) -> torch.Tensor:
    """What the generator gives after the seed of `ask`."""
    torch.manual_seed(7)
    if config.noise == "gaussian":
        return config.noise_scale * torch.randn(tokens, E, dtype=torch.float64)
    if config.noise == "gumbel":
        return -config.noise_scale * torch.empty(tokens, E, dtype=torch.float64).exponential_().log()
    return torch.zeros(tokens, E, dtype=torch.float64)


def by_hand(block: Any, hidden: torch.Tensor, config: RoutingConfig) -> tuple[torch.Tensor, list[list[int]]]:
    """Answers, and the tokens that each expert works on, one token and one expert at a time."""
    own = VALID.tolist()
    logits = {n: [float(w @ hidden[n]) / config.temperature for w in block.gate.weight] for n in own}
    noise = noise_of(config, len(own) if config.kind == "expert_choice" else N)
    rows = range(len(own)) if config.kind == "expert_choice" else own
    noisy = {n: softmax([a + float(b) for a, b in zip(logits[n], noise[i], strict=True)]) for n, i in zip(own, rows, strict=True)}
    p = {n: softmax(logits[n]) for n in own}
    bias = BIAS[0].double().tolist() if config.bias_update_rate else [0.0] * E
    room = math.ceil(config.capacity_factor * len(own) * K / E)
    if config.kind == "expert_choice":
        chosen = [sorted(own, key=lambda n: -noisy[n][e])[:room] for e in range(E)]
        weights = {n: {e: p[n][e] for e in range(E) if n in chosen[e]} for n in own}
        weights = {n: {e: w / sum(of.values()) for e, w in of.items()} for n, of in weights.items()}
    else:
        best = {n: sorted(range(E), key=lambda e: -(noisy[n][e] + bias[e]))[:K] for n in own}
        weights = {n: {e: p[n][e] / sum(p[n][b] for b in best[n]) for e in best[n]} for n in own}
        chosen = [[n for n in own if e in best[n]] for e in range(E)]
        if config.drop:
            chosen = [sorted(chosen[e], key=lambda n: -noisy[n][e])[:room] for e in range(E)]
    out = torch.zeros(N, D, dtype=torch.float64)
    for e, n in ((e, n) for e in range(E) for n in chosen[e]):
        gate, up = (block.experts.gate_up_proj[e] @ hidden[n]).chunk(2)
        out[n] += weights[n][e] * (block.experts.down_proj[e] @ (F.silu(gate) * up))
    return out, chosen


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


# ---------------------------------------------------------------------- one block


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "shared core", "no norm_topk_prob"])
def test_at_neutral_values_the_block_is_the_stock_block(kind, autocast):
    hf: Any = shared_core() if kind == "shared core" else moe("mixtral" if kind == "mixtral" else "qwen3_moe")
    if kind == "no norm_topk_prob":
        for layer in hf.model.layers:
            layer.mlp.gate.norm_topk_prob = False
    found = []
    batch = {"input_ids": torch.randint(0, 60, (2, 12)), "position_ids": torch.arange(12).expand(2, 12)}
    batch["token_positions"] = torch.arange(24)
    for config in (None, NEUTRAL):
        own = copy.deepcopy(hf).train()
        model = CausalModel(own, routing=config)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(batch, torch.arange(24), lambda hidden, head: hidden @ head.T)
        out.read.float().logsumexp(-1).square().sum().backward()
        found.append(([out.read, *(t.float() for t in out.router_logits)], [p.grad for p in own.parameters()]))
        assert bool(out.loads) == (config is not None)
    for stock, ours in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))


@pytest.mark.parametrize("name", WAYS)
def test_each_way_equals_a_loop_over_tokens(name):
    config = WAYS[name]
    hf, routers = routed(config, moe().double())
    torch.manual_seed(2)
    hidden = torch.randn(N, D, dtype=torch.float64)
    expected, chosen = by_hand(hf.model.layers[0].mlp, hidden, config)
    hidden.requires_grad_()
    answers, load = ask(hf, routers, hidden)
    torch.testing.assert_close(answers[VALID], expected[VALID], rtol=1e-6, atol=1e-9)
    assert load[1].tolist() == [len(tokens) for tokens in chosen]
    if config.kind == "token_choice":
        assert load[0].sum() == len(VALID) * K
        assert torch.equal(*load) != config.drop, "something was dropped, where anything may be"
    parameters = [hidden, hf.model.layers[0].mlp.gate.weight, hf.model.layers[0].mlp.experts.down_proj]
    theirs = torch.autograd.grad(by_hand_with_graph(hf, hidden, chosen, config)[VALID].square().sum(), parameters)
    ours = torch.autograd.grad(answers[VALID].square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def by_hand_with_graph(hf: Any, hidden: torch.Tensor, chosen: list[list[int]], config: RoutingConfig) -> torch.Tensor:
    """The answers once more, from who works on what: the choice itself has no gradient."""
    block = hf.model.layers[0].mlp
    p = (hidden @ block.gate.weight.T / config.temperature).softmax(-1)
    if config.drop:  # a token's weights are divided by the sum over those that it chose, not those that had room
        undropped = RoutingConfig(**{**vars(config), "drop": False})
        _, wanted = by_hand(block, hidden.detach(), undropped)
    else:
        wanted = chosen
    out = torch.zeros(N, D, dtype=torch.float64)
    for n in VALID.tolist():
        total = sum(p[n, e] for e in range(E) if n in wanted[e])
        for e in (e for e in range(E) if n in chosen[e]):
            gate, up = (block.experts.gate_up_proj[e] @ hidden[n]).chunk(2)
            place = torch.zeros(N, 1, dtype=torch.float64)
            place[n] = 1
            out = out + place * (p[n, e] / total * (block.experts.down_proj[e] @ (F.silu(gate) * up)))
    return out


def test_capacity_by_hand():
    """Four tokens that all want the first of two experts, which has room for two: the surer ones keep it."""
    hf, routers = routed(RoutingConfig(drop=True, capacity_factor=1.0), one_expert_per_token())
    hidden = torch.zeros(5, D)
    hidden[:, 0] = torch.tensor([1.0, 3.0, 9.0, 2.0, 4.0])  # the third is padding
    answers, load = ask(hf, routers, hidden, torch.tensor([0, 1, 3, 4]))
    assert load.tolist() == [[4, 0], [2, 0]]
    assert answers.abs().sum(-1).gt(0).tolist() == [False, True, False, False, True]
    stock = one_expert_per_token().model.layers[0].mlp
    torch.testing.assert_close(answers[[1, 4]], stock(hidden[None])[0, [1, 4]])


def one_expert_per_token() -> PreTrainedModel:
    """Two experts, of which a token takes one: the first if its first number is above 0."""
    sizes = {"hidden_size": D, "moe_intermediate_size": 48, "num_hidden_layers": 1, "num_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", **sizes, **heads, num_experts_per_tok=1, norm_topk_prob=True)
    )
    router = hf.model.layers[0].mlp.gate.weight
    assert tuple(router.shape) == (2, D)
    hf.model.layers[0].mlp.gate.register_forward_pre_hook(lambda gate, _: _point(gate))
    return hf


def _point(gate: Any) -> None:
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[0, 0] = 1.0


@pytest.mark.parametrize("top_k", [1, 2])
def test_gumbel_noise_draws_without_replacement_in_proportion(top_k):
    """Frequencies of the sets that are drawn, against their exact probabilities: chi-square."""
    draws = 20_000
    hf, routers = routed(RoutingConfig(noise="gumbel", temperature=1.5))
    gate = hf.model.layers[0].mlp.gate
    gate.top_k = top_k
    hidden = torch.randn(1, D)
    logits, _, experts = gate(hidden.expand(draws, D))
    p = logits[0].double().softmax(0).tolist()
    torch.testing.assert_close(logits[0], hidden[0] @ gate.weight.T / 1.5)
    orders = list(itertools.permutations(range(E), top_k))
    exact = []
    for order in orders:
        probability, left = 1.0, 1.0
        for expert in order:
            probability, left = probability * p[expert] / left, left - p[expert]
        exact.append(probability)
    assert sum(exact) == pytest.approx(1.0)
    seen = [int((experts == torch.tensor(order)).all(-1).sum()) for order in orders]
    statistic = sum((a - draws * b) ** 2 / (draws * b) for a, b in zip(seen, exact, strict=True))
    assert statistic < chi2.ppf(0.999, len(orders) - 1)


def test_noise_follows_its_schedule_and_evaluation_is_deterministic():
    config = RoutingConfig(
        noise="gaussian",
        noise_scale=Schedule(1.0, 0.0, steps=4),
        temperature=Schedule(4.0, 1.0, steps=2, kind="constant"),
        drop=True,
        capacity_factor=0.5,
    )
    hf, routers = routed(config)
    hidden = torch.randn(N, D)
    noisy, load = ask(hf, routers, hidden)
    assert load[1].sum() < load[0].sum()
    with torch.no_grad():
        stock, _ = routed(NEUTRAL)
        expected = stock.model.layers[0].mlp(hidden[None])[0]
    routers.begin_step(1)
    assert (routers.noise_scale, routers.temperature.item()) == (0.75, 4.0)
    routers.begin_step(4)
    assert (routers.noise_scale, routers.temperature.item()) == (0.0, 1.0)
    hf.eval()
    routers.begin_step(2)
    answers, load = ask(hf, routers, hidden)
    torch.testing.assert_close(answers, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(*load)
    assert not torch.allclose(noisy, answers)


@pytest.mark.parametrize("name", ["gumbel", "noise and drop", "bias", "expert choice with noise"])
def test_checkpointing_draws_the_same_noise_again(name):
    batch = {"input_ids": torch.arange(24).view(2, 12), "position_ids": torch.arange(12).expand(2, 12)}
    batch["token_positions"] = VALID
    found = []
    for checkpointed in (False, True):
        hf, _ = routed(NEUTRAL)
        for layer in hf.model.layers:
            del layer.mlp.gate.forward
        if checkpointed:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        model = CausalModel(hf, routing=WAYS[name])
        assert model.routing is not None
        model.routing.begin_step(0)
        torch.manual_seed(3)
        out = model(batch, torch.arange(24), lambda hidden, head: (hidden @ head.T).logsumexp(-1).square().sum())
        torch.rand(1)  # something else is drawn before the backward pass
        out.read.backward()
        found.append([out.read.detach(), *out.loads, *(p.grad for p in hf.parameters())])
        assert len(out.loads) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------- the bias


def test_the_bias_by_hand():
    hf, routers = routed(RoutingConfig(bias_update_rate=0.25, bias_anneal_steps=2))
    routers.bias_LE.zero_()
    loads = torch.tensor([[5.0, 1, 3, 3], [0, 0, 0, 12]])
    routers.end_step(loads, remaining=4)
    assert routers.bias_LE.tolist() == [[-0.25, 0.25, 0, 0], [0.25, 0.25, 0.25, -0.25]]
    routers.end_step(loads, remaining=3)
    assert routers.bias_LE[0].tolist() == [-0.5, 0.5, 0, 0]
    routers.end_step(loads, remaining=2)
    assert routers.bias_LE[0].tolist() == [-0.25, 0.25, 0, 0], "half of the way is left"
    routers.end_step(loads, remaining=1)
    assert not routers.bias_LE.any()
    assert max_violation(loads).item() == pytest.approx(((5 - 3) / 3 + (12 - 3) / 3) / 2)
    assert max_violation(torch.zeros(2, 4)) == 0
    routers.bias_LE.copy_(BIAS)
    routers.to(torch.bfloat16)
    assert torch.equal(routers.bias_LE, BIAS), "nothing rounds it"


def test_the_bias_evens_out_a_load():
    hf, routers = routed(RoutingConfig(bias_update_rate=0.01))
    with torch.no_grad():
        hf.model.layers[0].mlp.gate.weight[0] += 0.05
    routers.bias_LE.zero_()
    torch.manual_seed(0)
    hidden = torch.randn(512, D) + 0.5
    found = []
    for _ in range(150):
        _, load = ask(hf, routers, hidden, torch.arange(512))
        found.append(max_violation(load[:1]).item())
        routers.end_step(torch.stack([load[0], load[0]]), remaining=1000)
    assert found[0] > 0.3
    assert found[-1] < 0.1
