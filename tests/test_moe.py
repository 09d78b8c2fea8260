"""The mixture of experts against a loop over tokens written from the papers."""

import math

import pytest
import torch
import torch.nn.functional as F

from agri_moe.models.moe import MoE, Replacement, RoutingRule, assign

D, E, N = 8, 4, 11
EQUAL, UNEQUAL = (4, 4, 4, 4), (3, 8, 1, 4)


TOP_2 = RoutingRule()


def made(widths=UNEQUAL, rule=TOP_2, dtype=torch.float64, **options):
    moe = MoE(D, widths, rule, F.silu, **options).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return moe


def tokens(dtype=torch.float64, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def expert(moe, e, x_D):
    """One expert on one token, neuron by neuron."""
    answer = torch.zeros(D, dtype=x_D.dtype)
    start = sum(moe.widths[:e])
    for s in range(start, start + moe.widths[e]):
        up = moe.up_SD[s] @ x_D + (0 if moe.up_bias_S is None else moe.up_bias_S[s])
        if moe.gate_SD is None:
            h = F.silu(up)
        else:
            h = F.silu(moe.gate_SD[s] @ x_D + (0 if moe.gate_bias_S is None else moe.gate_bias_S[s])) * up
        answer = answer + h * moe.down_SD[s]
    return answer


def chosen_by_loop(moe, x_ND, noise_NE):
    """{(token, expert): weight}, by the words of the papers."""
    rule = moe.rule
    logits = (x_ND @ moe.router_ED.T) / float(moe.temperature)
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    asked = logits if noise_NE is None else logits + noise_NE
    asked_p = (torch.exp(asked) / torch.exp(asked).sum(-1, keepdim=True)).detach()
    room = min(len(x_ND), math.ceil(rule.capacity_factor * len(x_ND) * rule.top_k / E))
    weights = {}
    if rule.kind == "expert_choice":
        pairs = [
            (n, e) for e in range(E) for n in sorted(range(len(x_ND)), key=lambda n, e=e: -float(asked_p[n, e]))[:room]
        ]
        for n in range(len(x_ND)):
            mine = [e for m, e in pairs if m == n]
            for e in mine:
                weights[n, e] = p[n, e] / sum(p[n, f] for f in mine)
        return weights
    for n in range(len(x_ND)):
        best = sorted(range(E), key=lambda e, n=n: -float(asked_p[n, e]))[: rule.top_k]
        for e in best:
            weights[n, e] = p[n, e] / sum(p[n, f] for f in best)
    if rule.drop:
        for e in range(E):
            comers = sorted((n for n, f in weights if f == e), key=lambda n, e=e: -float(asked_p[n, e]))
            for n in comers[room:]:
                del weights[n, e]
    return weights


def by_loop(moe, x_ND, noise_NE=None):
    rows = [torch.zeros(D, dtype=x_ND.dtype) for _ in x_ND]
    for (n, e), weight in chosen_by_loop(moe, x_ND, noise_NE).items():
        rows[n] = rows[n] + weight * expert(moe, e, x_ND[n])
    output = torch.stack(rows)
    return output if moe.bias_D is None else output + moe.bias_D


RULES = {
    "token_choice": RoutingRule(),
    "top_1": RoutingRule(top_k=1),
    "all": RoutingRule(top_k=E),
    "dropping": RoutingRule(drop=True, capacity_factor=0.8),
    "room_for_all": RoutingRule(drop=True, capacity_factor=100.0),
    "expert_choice": RoutingRule("expert_choice"),
    "expert_choice_tight": RoutingRule("expert_choice", top_k=1, capacity_factor=1.0),
}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("widths", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_equals_a_loop_over_tokens(rule, widths, noisy):
    moe, x = made(widths, rule, torch.float32).double(), tokens()
    noise = torch.randn(N, E, generator=torch.Generator().manual_seed(2), dtype=x.dtype) if noisy else None
    if widths == EQUAL:  # grouped products have no float64
        moe, x, noise = moe.float(), x.float(), None if noise is None else noise.float()
    expected = by_loop(moe, x, noise)
    got = moe(x, noise)
    tolerance = 1e-5 if widths == EQUAL else 1e-12
    torch.testing.assert_close(got.output_ND, expected, rtol=tolerance, atol=tolerance)
    pairs = chosen_by_loop(moe, x, noise)
    assert got.assignment.load_E.tolist() == [sum(f == e for _, f in pairs) for e in range(E)]
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    ours = torch.autograd.grad((got.output_ND * direction).sum(), list(moe.parameters()), allow_unused=True)
    theirs = torch.autograd.grad((expected * direction).sum(), list(moe.parameters()), allow_unused=True)
    for (name, parameter), a, b in zip(moe.named_parameters(), ours, theirs, strict=True):
        b = torch.zeros_like(parameter) if b is None else b
        torch.testing.assert_close(
            a, b, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"gated": False},
        {"gated": False, "inner_bias": True, "output_bias": True},
        {"inner_bias": True, "output_bias": True},
    ],
)
@pytest.mark.parametrize("widths", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_two_matrices_and_biases(options, widths):
    moe, x = made(widths, dtype=torch.float32, **options), tokens(torch.float32)
    torch.testing.assert_close(moe(x).output_ND, by_loop(moe, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [RULES["token_choice"], RULES["dropping"], RULES["expert_choice"]])
def test_gradients_numerically(rule):
    moe = made(rule=rule)
    x = tokens(n=5)
    names = [name for name, _ in moe.named_parameters()]

    def run(*values):
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,)).output_ND

    assert torch.autograd.gradcheck(run, tuple(moe.parameters()))


def test_noise_chooses_and_does_not_weigh():
    moe, x = made(), tokens()
    noise = torch.zeros(N, E, dtype=x.dtype)
    noise[:, 2:] = 1e3
    got = moe(x, noise)
    assert got.assignment.load_E.tolist() == [0, 0, N, N]
    p = moe(x).logits_NE.softmax(-1)
    expected = p[:, 2] / (p[:, 2] + p[:, 3])
    mine = got.assignment.weight_A[:N][got.assignment.token_A[:N].argsort()]
    torch.testing.assert_close(mine, expected)


def test_weights_of_a_token_add_up_to_one_if_anybody_chose_it():
    for rule in (RULES["token_choice"], RULES["expert_choice_tight"]):
        logits = torch.randn(N, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        got = assign(logits, rule)
        share = torch.zeros(N, dtype=logits.dtype).index_add(0, got.token_A, got.weight_A)
        chosen = torch.zeros(N, dtype=logits.dtype).index_fill(0, got.token_A, 1.0)
        torch.testing.assert_close(share, chosen)
        assert got.experts.bincount(minlength=E).tolist() == got.count_E.tolist()


def test_temperature_divides_logits():
    moe, x = made(), tokens()
    before = moe(x).logits_NE
    moe.temperature.fill_(2.0)
    torch.testing.assert_close(moe(x).logits_NE, before / 2)


def test_borders_move_and_survive_a_checkpoint():
    moe, x = made(), tokens()
    moe.set_widths((8, 3, 4, 1))
    torch.testing.assert_close(moe(x).output_ND, by_loop(moe, x))
    other = made(EQUAL)
    other.load_state_dict(moe.state_dict())
    assert other.widths == (8, 3, 4, 1)
    torch.testing.assert_close(other(x).output_ND, moe(x).output_ND)
    with pytest.raises(ValueError, match="16 neurons in all"):
        moe.set_widths((8, 3, 4, 2))


def test_autocast_runs_the_experts_in_its_type():
    moe, x = made(EQUAL, dtype=torch.float32), tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe(x)
    assert got.output_ND.dtype == torch.bfloat16
    assert got.logits_NE.dtype == torch.float32
    torch.testing.assert_close(got.output_ND.float(), moe(x).output_ND, rtol=0.05, atol=0.05)


def test_padding_takes_no_room():
    moe, x = made(rule=RULES["expert_choice_tight"]), tokens()
    block = Replacement(moe)
    real = torch.tensor([0, 1, 4, 5, 9])
    block.positions_N = real
    got = block(x[None])[0]
    torch.testing.assert_close(got[real], by_loop(moe, x[real]))
    assert not got[[2, 3, 6, 7, 8, 10]].any()
