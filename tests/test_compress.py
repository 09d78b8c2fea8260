"""Compression to a shared core: each closed form against its definition, and the command from end to end."""

import json

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from agri_moe.cli import main
from agri_moe.models import compress as compression
from agri_moe.models.compress import (
    Core,
    Experts,
    Hidden,
    Tokens,
    Wrappers,
    covariance,
    effective_rank,
    expert_tokens,
    hidden_pairs,
    input_wrappers,
    matched,
    mean_cosine,
    nearest_down,
    nearest_gate_up,
    output_wrappers,
    shared,
)
from agri_moe.models.shared_core import SharedCoreForCausalLM, sparse_layers
from agri_moe.models.upcycle import UpcycleSpec, upcycle
from tests.test_cli import refused, scalars

E, D, WIDTH, R = 4, 16, 12, 8


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def unrelated() -> Experts:
    return Experts(torch.randn(E, WIDTH, D), torch.randn(E, WIDTH, D), torch.randn(E, D, WIDTH))


def ffn(experts: Experts, e: int, x: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ experts.gate_EFD[e].T) * (x @ experts.up_EFD[e].T)) @ experts.down_EDF[e].T


def some_tokens() -> list[Tokens]:
    """Inputs in which some directions are stronger than others, and tokens that count more than others."""
    return [Tokens(torch.randn(60, D) * torch.linspace(0.2, 2.0, D), torch.rand(60)) for _ in range(E)]


# ---------------------------------------------------------------------- one order of neurons


def test_matching_keeps_the_function():
    experts, x = unrelated(), torch.randn(30, D)
    for e in range(E):
        torch.testing.assert_close(ffn(matched(experts), e, x), ffn(experts, e, x), rtol=1e-4, atol=1e-4)


def test_matching_finds_copies_that_were_shuffled_turned_and_scaled():
    gate, up, down = torch.randn(WIDTH, D), torch.randn(WIDTH, D), torch.randn(D, WIDTH)
    copies = []
    for _ in range(E):
        order, sign = torch.randperm(WIDTH), torch.randint(0, 2, (WIDTH,)) * 2.0 - 1
        scale = sign * torch.rand(WIDTH).add(0.5)
        copies.append((gate[order], up[order] * scale[:, None], down[:, order] / scale))
    found = matched(Experts(*(torch.stack(parts) for parts in zip(*copies, strict=True))))
    for tensor in found:
        torch.testing.assert_close(tensor, tensor[:1].expand_as(tensor), rtol=1e-4, atol=1e-5)


def test_neurons_of_zeros_stay_zeros():
    experts = unrelated()
    for tensor in (experts.gate_EFD[:, :3], experts.up_EFD[:, :3], experts.down_EDF[..., :3]):
        tensor.zero_()
    for order in (torch.arange(WIDTH), torch.randperm(WIDTH)):
        experts.gate_EFD[1], experts.up_EFD[1] = experts.gate_EFD[1][order], experts.up_EFD[1][order]
        experts.down_EDF[1] = experts.down_EDF[1][:, order]
        found, x = matched(experts), torch.randn(30, D)
        assert ((found.up_EFD.norm(dim=2) == 0).sum(1) == 3).all()
        for e in range(E):
            torch.testing.assert_close(ffn(found, e, x), ffn(experts, e, x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- closed forms


def test_input_wrappers_are_the_best_of_their_rank():
    """Where the core has as many rows as columns it reaches everything, and Eckart and Young say how near one comes."""
    gate_up = torch.randn(E, D + 8, D, dtype=torch.float64)
    core = torch.randn(D + 8, D, dtype=torch.float64)
    core[D:] = gate_up[:, D:] = 0  # the core's range is all that the experts use
    covariances = [covariance(Tokens(torch.randn(60, D).double(), torch.rand(60).double())) for _ in range(E)]
    found = core @ input_wrappers(core, gate_up, covariances, R).matrices()
    for e in range(E):
        root = torch.linalg.cholesky(covariances[e])
        tail = torch.linalg.svdvals((gate_up[e] - core) @ root)[R:]
        error = ((found[e] - gate_up[e]) @ root).norm()
        torch.testing.assert_close(error, tail.norm(), rtol=1e-8, atol=1e-10)


def test_output_wrappers_are_the_best_of_their_rank():
    """As many answers as dimensions: then every change is reachable, and Eckart and Young hold for the answers."""
    core, down = torch.randn(D, D, dtype=torch.float64), torch.randn(E, D, D, dtype=torch.float64)
    hidden = []
    for _ in range(E):
        h = torch.randn(80, D, dtype=torch.float64)
        hidden.append(Hidden(h.T @ h, h.T @ h))
    found = output_wrappers(core, down, hidden, R).matrices() @ core
    for e in range(E):
        root = torch.linalg.cholesky(hidden[e].now)
        tail = torch.linalg.svdvals((down[e] - core) @ root)[R:]
        error = ((found[e] - down[e]) @ root).norm()
        torch.testing.assert_close(error, tail.norm(), rtol=1e-3, atol=1e-3)  # but for the ridge


def loss_of_outputs(core, wrappers, down, before, now):
    return sum(
        ((h @ core.T) @ b.T - g @ d.T).square().sum() for b, d, g, h in zip(wrappers, down, before, now, strict=True)
    )


def test_output_wrappers_make_good_what_the_neurons_lost():
    """Fitted to changed neurons they answer better than if fitted to those that were, by an independent regression."""
    core, down = torch.randn(D, WIDTH, dtype=torch.float64), torch.randn(E, D, WIDTH, dtype=torch.float64)
    before = [torch.randn(200, WIDTH, dtype=torch.float64) for _ in range(E)]
    now = [h + 0.5 * torch.randn_like(h) for h in before]
    aware = [Hidden(h.T @ h, g.T @ h) for g, h in zip(before, now, strict=True)]
    blind = [Hidden(g.T @ g, g.T @ g) for g in before]
    losses = [
        loss_of_outputs(core, output_wrappers(core, down, one, D).matrices(), down, before, now)
        for one in (aware, blind)
    ]
    assert losses[0] < 0.95 * losses[1]
    # At full rank it is ordinary least squares of what was answered on what the core answers now.
    best = 0.0
    for d, g, h in zip(down, before, now, strict=True):
        solution = torch.linalg.lstsq(h @ core.T, g @ d.T, driver="gelsd").solution
        best += (h @ core.T @ solution - g @ d.T).square().sum()
    torch.testing.assert_close(losses[0], best, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_cores_have_no_gradient_left(calibrated):
    gate_up = torch.randn(E, 2 * WIDTH, D, dtype=torch.float64)
    wrappers = torch.eye(D, dtype=torch.float64) + 0.3 * torch.randn(E, D, D, dtype=torch.float64)
    tokens = [Tokens(torch.randn(60, D).double(), torch.rand(60).double()) for _ in range(E)] if calibrated else None
    covariances = [covariance(t) for t in tokens] if tokens else None
    core = nearest_gate_up(gate_up, wrappers, covariances).requires_grad_()
    weights = covariances or [torch.eye(D, dtype=torch.float64)] * E
    error = core @ wrappers - gate_up
    loss = sum((e @ w * e).sum() for e, w in zip(error, weights, strict=True))
    assert torch.autograd.grad(loss, core)[0].norm() < 1e-8 * loss

    down = torch.randn(E, D, WIDTH, dtype=torch.float64)
    hidden = hidden_pairs(gate_up, gate_up + 0.1 * torch.randn_like(gate_up), tokens, F.silu)
    start = torch.randn(D, WIDTH, dtype=torch.float64)
    core = nearest_down(start, down, wrappers, hidden, steps=2000).requires_grad_()
    loss = sum(
        ((b @ core @ h.now) * (b @ core)).sum() - 2 * ((b @ core) * (d @ h.before_now)).sum()
        for b, d, h in zip(wrappers, down, hidden, strict=True)
    )
    assert torch.autograd.grad(loss, core)[0].norm() < 1e-3 * abs(loss)


def test_each_round_comes_nearer(monkeypatch):
    experts, tokens, errors = matched(unrelated()), some_tokens(), []
    for rounds in (0, 1, 4):
        monkeypatch.setattr(compression, "ROUNDS", rounds)
        core, before, after = shared(experts, R, tokens, F.silu)
        found = Experts.of(core.gate_up @ before.matrices(), after.matrices() @ core.down)
        errors.append(
            sum((ffn(found, e, t.x_nD) - ffn(experts, e, t.x_nD)).square().sum() for e, t in enumerate(tokens))
        )
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("calibrated", [True, False])
def test_experts_that_share_a_core_are_kept(calibrated):
    core = Core(torch.randn(2 * WIDTH, D), torch.randn(D, WIDTH))
    sides = [Wrappers(0.05 * torch.randn(E, D, 2), torch.randn(E, 2, D)) for _ in range(2)]
    experts = Experts.of(core.gate_up @ sides[0].matrices(), sides[1].matrices() @ core.down)
    tokens = some_tokens() if calibrated else None
    found, before, after = shared(experts, R, tokens, F.silu)
    torch.testing.assert_close(found.gate_up @ before.matrices(), experts.gate_up, rtol=1e-2, atol=2e-2)
    x = torch.randn(40, D)
    kept = Experts.of(found.gate_up @ before.matrices(), after.matrices() @ found.down)
    for e in range(E):
        assert (ffn(kept, e, x) - ffn(experts, e, x)).norm() < 0.02 * ffn(experts, e, x).norm()


def test_an_expert_is_fitted_on_its_own_tokens_and_a_little_of_all():
    x, weights = torch.randn(400, D), torch.zeros(400, 3)
    weights[:390, 0], weights[390:, 0], weights[390:, 1] = 1.0, 0.5, 0.5  # the third expert is never chosen
    found = expert_tokens(x, weights, seed=0)
    assert [len(t.x_nD) for t in found] == [400 + 2 * D, 10 + 2 * D, 2 * D]
    torch.testing.assert_close(found[1].x_nD[:10], x[390:])
    torch.testing.assert_close(found[1].counts_n[:10], torch.full((10,), 0.25))
    mean_square = (390 + 10 * 0.25 + 10 * 0.25) / 410
    assert found[2].counts_n.sum().item() == pytest.approx(D * mean_square, rel=1e-5)


def test_a_core_of_few_neurons_leaves_the_rest_of_the_rank_unused():
    """As zero-padded experts have them."""
    experts = unrelated()
    for tensor in (experts.gate_EFD[:, 2:], experts.up_EFD[:, 2:], experts.down_EDF[..., 2:]):
        tensor.zero_()
    core, before, after = shared(matched(experts), R, some_tokens(), F.silu)
    assert before.up.shape == after.up.shape == (E, D, R)
    assert all(tensor.isfinite().all() for tensor in (*core, *before, *after))
    found = Experts.of(core.gate_up @ before.matrices(), after.matrices() @ core.down)
    x = torch.randn(40, D)
    for e in range(E):
        assert (ffn(found, e, x) - ffn(experts, e, x)).norm() < 0.1 * ffn(experts, e, x).norm()


# ---------------------------------------------------------------------- the report


def test_effective_rank_and_cosine_by_hand():
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))) == pytest.approx((256 / 27) ** 0.25)
    assert effective_rank(torch.zeros(2, 2)) == 0.0
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 0.0]])
    assert mean_cosine(rows) == pytest.approx((0 + 2**-0.5 + 2**-0.5) / 3)
    assert mean_cosine(torch.zeros(3, 2)) == 0.0


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def moe(tmp_path_factory, dense):
    """An MoE of four experts that differ."""
    folder = tmp_path_factory.mktemp("moe") / "moe"
    upcycle(dense, folder, UpcycleSpec(num_experts=4, jitter=0.3, router_std=0.3))
    return folder


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, moe, corpus):
    folder = tmp_path_factory.mktemp("compressed") / "compressed"
    options = ["--calibration", str(corpus / "train.parquet"), "--calibration_tokens", "3000", "--device", "cpu"]
    main(["compress", "--source", str(moe), "--output", str(folder), "--rank", "16", *options])
    return folder


def logits(model):
    with torch.inference_mode():
        return model.eval()(torch.arange(40).view(2, 20) + 60).logits


def test_the_command_reports_and_writes(moe, compressed):
    source = Qwen3MoeForCausalLM.from_pretrained(moe)
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert type(model) is SharedCoreForCausalLM
    change = (logits(model) - logits(source)).norm() / logits(source).norm()
    assert 1e-5 < change < 0.1
    for ours, theirs in zip(sparse_layers(model), sparse_layers(source), strict=True):
        torch.testing.assert_close(ours.mlp.gate.weight, theirs.mlp.gate.weight)
        torch.testing.assert_close(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
    layers = json.loads((compressed / "compression.json").read_text())["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    size = (3 * 64 * 32 + 4 * 4 * 32 * 16) / (4 * 3 * 64 * 32)
    for layer in layers:
        assert layer["size"] == pytest.approx(size)
        assert 0 < layer["output_error"] < 0.3
    assert (compressed / "tokenizer.json").exists()


def test_calibration_keeps_more_than_weights_alone(moe, compressed, rows, tmp_path, capsys):
    main(["compress", "--source", str(moe), "--output", str(tmp_path / "weights"), "--rank", "16"])
    assert "room taken" in capsys.readouterr().out
    models = [Qwen3MoeForCausalLM.from_pretrained(moe)]
    models += [AutoModelForCausalLM.from_pretrained(folder) for folder in (compressed, tmp_path / "weights")]
    with torch.inference_mode():  # rows that nothing was fitted on
        source, *ours = (torch.cat([m(torch.tensor(row.input_ids)[None]).logits[0] for row in rows]) for m in models)
    assert (ours[0] - source).norm() < 0.8 * (ours[1] - source).norm()


def test_without_an_output_nothing_is_written(moe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["compress", "--source", str(moe), "--rank", "8"])
    assert "Nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_compressed_student_learns_in_two_stages_and_is_exported_to_stock(moe, compressed, distill_config, tmp_path):
    """From the cached answers of what it was compressed from, by the patterns of the shipped config."""
    config = yaml.safe_load(distill_config.read_text())
    options = config["model"]["init_args"]
    options["student"] = {"source": str(compressed)}
    options["teacher"] = {"source": str(moe), "cache": str(tmp_path / "answers"), "dtype": "float32"}
    options["objective"] = {"ce": {"weight": 1.0}, "kl": {"weight": 1.0}}
    wrappers = {".*input_wrapper.*|.*output_wrapper.*": 2.0}
    first = {"steps": 3, "train": [".*shared_core.*", ".*_wrapper.*"], "learning_rate_multipliers": wrappers}
    options["stages"] = [first, {"learning_rate": 1e-3}]
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:2]
    distill_config.write_text(yaml.safe_dump(config))
    main(["cache", "--config", str(distill_config), "--output", str(tmp_path / "answers"), "--k", "16"])
    cli = main(["fit", "--config", str(distill_config)])
    logged = scalars(cli.run.folder)
    assert [value for _, value in logged["train/stage"]] == [1, 1, 1, 2, 2, 2]
    assert logged["val/ce"][-1][1] < logged["train/ce"][0][1]
    main(["export", "--run_root", str(tmp_path), "--output", str(tmp_path / "stock"), "--dtype", "float32"])
    stock = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(logits(stock), logits(cli.model.model.hf), rtol=1e-4, atol=1e-4)
    main(["export", "--checkpoint", str(compressed), "--output", str(tmp_path / "untrained"), "--dtype", "float32"])
    untrained = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "untrained")
    torch.testing.assert_close(
        logits(untrained), logits(AutoModelForCausalLM.from_pretrained(compressed)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"--rank": "12"}, "multiple of 8"),
        ({"--rank": "40"}, "--rank is 40: above 32 nothing is saved"),
        ({"--calibration": "nowhere.parquet"}, "nowhere.parquet"),
        ({"--calibration_tokens": "0", "--calibration": "x"}, "--calibration_tokens is 0"),
        ({"--source": "DENSE"}, "is a qwen3 model; only a qwen3_moe can be compressed"),
        ({"--source": "nowhere"}, "--source: nowhere is no folder or hub name"),
        ({"--output": "EXISTS"}, "exists"),
    ],
)
def test_mistakes_are_named_before_any_weight_is_read(options, needle, capsys, no_models, moe, dense, tmp_path):
    given = {"--source": str(moe), "--rank": "8", "--output": str(tmp_path / "new")} | options
    places = {"DENSE": str(dense), "EXISTS": str(moe)}
    assert needle in refused(capsys, "compress", *(places.get(v, v) for pair in given.items() for v in pair))
    assert not (tmp_path / "new").exists()
