"""Other ways of routing: each against a loop over tokens in float64, against the stock block, in whole runs."""

import copy
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import refused, scalars
from test_distill import SPEC, SUMS, make_module, totals
from test_experts import moe
from test_representation import HostReads
from test_sharding import on_ranks
from test_shared_core import shared_core
from test_two_ranks import launch, sharded
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.cli import main
from agri_moe.data.packing import collate
from agri_moe.losses import max_violation
from agri_moe.models.causal import CausalModel
from agri_moe.models.routing import Routers, RoutingConfig, kept_routing
from agri_moe.models.sharding import shard
from agri_moe.schedules import Schedule
from agri_moe.trained import load_checkpoint, read_sharded

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
    "bias, noise and drop": RoutingConfig(bias_update_rate=0.1, noise="gumbel", drop=True, capacity_factor=0.9),
    "expert choice": RoutingConfig(kind="expert_choice", capacity_factor=0.75),
    "expert choice with noise": RoutingConfig(kind="expert_choice", noise="gaussian", noise_scale=0.3),
}
BIAS = torch.tensor([[0.3, -0.2, 0.0, 0.1], [0.0, 0.5, -0.5, 0.2]])


def decided(dtype: torch.dtype = torch.float32) -> Any:
    """A model whose routers have something to say."""
    hf = moe().to(dtype)
    hf.config._experts_implementation = "eager"  # grouped products know no float64
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.mlp.gate.weight.normal_(std=0.3)
    return hf.train()


def routed(config: RoutingConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, Routers]:
    """The same and its routers, at the first step of a run."""
    hf = decided(dtype)
    routers = Routers(hf, config)
    routers.begin_step(0)
    if routers.bias_LE is not None:
        routers.bias_LE.copy_(BIAS)
    return hf, routers


def ask(hf: Any, routers: Routers, hidden_ND: torch.Tensor, valid: torch.Tensor = VALID) -> Any:
    """The first block's answers, and what the routers have counted there."""
    routers.expect(valid)
    routers.begin_pass()
    torch.manual_seed(7)
    answers = hf.model.layers[0].mlp(hidden_ND[None])[0]
    return answers, routers.end_pass()[0]


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
    logits = {n: [(w @ hidden[n]).item() / config.temperature for w in block.gate.weight] for n in own}
    noise = noise_of(config, len(own) if config.kind == "expert_choice" else N)
    rows = range(len(own)) if config.kind == "expert_choice" else own
    noisy = {
        n: softmax([a + float(b) for a, b in zip(logits[n], noise[i], strict=True)])
        for n, i in zip(own, rows, strict=True)
    }
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
    for e, n in ((expert, token) for expert in range(E) for token in chosen[expert]):
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
    hf, routers = routed(config, torch.float64)
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


@pytest.mark.parametrize("name", ["bias, noise and drop", "expert choice with noise"])
def test_a_batch_without_tokens_and_a_router_that_is_certain(name):
    """The last micro-batches of an epoch may be empty; and a bias may choose experts of probability 0."""
    hf, _ = routed(NEUTRAL)
    hf.config._experts_implementation = "grouped_mm"
    routers = Routers(hf, WAYS[name])
    block = hf.model.layers[0].mlp
    answers, load = ask(hf, routers, torch.randn(6, D), torch.arange(0))
    assert not load.any()
    answers.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in block.parameters())
    if routers.bias_LE is not None:
        with torch.no_grad():
            block.gate.weight *= 1e4
            routers.bias_LE.copy_(torch.tensor([[-2.0, -2.0, 2.0, 2.0]] * 2))
    answers, load = ask(hf, routers, torch.randn(N, D))
    answers.sum().backward()
    assert torch.isfinite(answers).all()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


def test_capacity_by_hand():
    """Four tokens that all want the first of two experts, which has room for two: the surer ones keep it."""
    sizes = {"hidden_size": D, "moe_intermediate_size": 48, "num_hidden_layers": 1, "num_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    config = AutoConfig.for_model("qwen3_moe", **sizes, **heads, num_experts_per_tok=1, norm_topk_prob=True)
    hf = AutoModelForCausalLM.from_config(config)
    block = hf.model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[0, 0] = 1.0
    hidden = torch.zeros(5, D)
    hidden[:, 0] = torch.tensor([1.0, 3.0, 9.0, 2.0, 4.0])  # the third is padding
    stock = block(hidden[None])[0]
    routers = Routers(hf.train(), RoutingConfig(drop=True, capacity_factor=1.0))
    answers, load = ask(hf, routers, hidden, torch.tensor([0, 1, 3, 4]))
    assert load.tolist() == [[4, 0], [2, 0]]
    torch.testing.assert_close(answers[[1, 4]], stock[[1, 4]])
    assert not answers[[0, 2, 3]].any()


@pytest.mark.parametrize(("top_k", "critical"), [(1, 16.27), (2, 31.26)])  # chi-square, 3 and 11 degrees, 0.999
def test_gumbel_noise_draws_without_replacement_in_proportion(top_k, critical):
    """Frequencies of what is drawn, in order, against exact probabilities."""
    draws = 20_000
    hf, _ = routed(RoutingConfig(noise="gumbel", temperature=1.5))
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
    assert statistic < critical


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
    expected = decided().model.layers[0].mlp(hidden[None])[0]
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
        hf = decided()
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


@pytest.mark.parametrize("name", ["bias, noise and drop", "expert choice with noise"])
def test_the_host_never_waits_for_the_device(name, chat, rows, dense, teacher):
    module = make_module(chat, dense, teacher, SUMS, routing=WAYS[name])
    batch = module.on_before_batch_transfer(collate([rows], totals(chat, rows, 1), 2048, chat.pad_id), 0)
    with HostReads() as reads:
        out = module.training_step(batch, 0)
        out["loss"].backward()
    assert [seen for seen in reads.seen if "losses/logits.py" not in seen] == []
    tokens = sum(len(row.input_ids) for row in rows)
    assert out["routing"].tokens == tokens
    assert torch.equal(out["routing"].wanted_LE.sum(-1), torch.tensor([2.0 * tokens] * 2))
    load_L = out["routing"].load_LE.sum(-1)
    assert (load_L <= 1.25 * 2 * tokens + SPEC.num_experts).all()
    assert ((load_L < 2 * tokens) == WAYS[name].drop).all()


# ---------------------------------------------------------------------- the bias


def test_the_bias_by_hand():
    _, routers = routed(RoutingConfig(bias_update_rate=0.25, bias_anneal_steps=2))
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
    hf, routers = routed(RoutingConfig(bias_update_rate=0.004))
    with torch.no_grad():
        hf.model.layers[0].mlp.gate.weight[0] += 0.05
    routers.bias_LE.zero_()
    torch.manual_seed(0)
    hidden = torch.randn(512, D) + 0.5
    found = []
    for _ in range(250):
        _, load = ask(hf, routers, hidden, torch.arange(512))
        found.append(max_violation(load[:1]).item())
        routers.end_step(torch.stack([load[0], load[0]]), remaining=1000)
    assert found[0] > 0.3
    assert found[-1] < 0.15


# ---------------------------------------------------------------------- two ranks


def test_in_pieces_the_routers_choose_as_in_a_whole_model(corpus):
    on_ranks(_check_pieces, corpus / "tokenizer", [WAYS["bias, noise and drop"], WAYS["expert choice with noise"]])


def _check_pieces(mesh: Any, _: Any, configs: list[RoutingConfig]) -> None:
    batch = {"input_ids": torch.arange(24).view(2, 12), "position_ids": torch.arange(12).expand(2, 12)}
    batch["token_positions"] = VALID
    for config in configs:
        found = []
        for cut in (False, True):
            model = CausalModel(decided(), routing=config)
            if cut:
                shard(model, mesh, None)
            assert model.routing is not None
            model.routing.begin_step(0)
            torch.manual_seed(3)
            out = model(batch, torch.arange(24), lambda hidden, head: (hidden @ head.T).logsumexp(-1).square().sum())
            out.read.backward()
            gradients = [p.grad.full_tensor() if cut else p.grad for p in model.hf.parameters()]
            found.append([out.read.detach(), *out.loads, *gradients])
        for whole, pieces in zip(*found, strict=True):
            torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- whole runs


@pytest.fixture
def pretrain(distill_config, tmp_path):
    """Writes a small run with routing of its own."""
    config = yaml.safe_load(distill_config.read_text())
    options = config["model"]["init_args"]
    config["model"] = {
        "class_path": "PretrainModule",
        "init_args": {
            "network": {"source": options["student"]["source"], "upcycle": options["student"]["upcycle"]},
            "learning_rate": 1e-2,
            "objective": {"balance": {"weight": 0.0}},
        },
    }
    kept = ("Checkpoint", "RouterMonitor")
    callbacks = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(kept)]
    config["trainer"] |= {"callbacks": callbacks, "max_steps": 4, "val_check_interval": 4}

    def write(name: str, routing: dict[str, Any], dense: bool = False, tokens: int = 1024, **trainer: Any) -> str:
        own = copy.deepcopy(config)
        own["data"]["init_args"]["tokens_per_batch"] = tokens  # of each rank
        own["trainer"] |= {"default_root_dir": str(tmp_path / name)} | trainer
        own["model"]["init_args"]["routing"] = routing
        if dense:
            del own["model"]["init_args"]["network"]["upcycle"]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(own))
        return str(path)

    return write


def logits_of(hf: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return hf.eval()(torch.arange(40)[None], **options).logits


def test_a_run_resumes_bit_for_bit_and_keeps_its_bias(pretrain, tmp_path, capsys):
    routing = {
        "noise": "gumbel",
        "noise_scale": {"start": 1.0, "end": 0.5, "steps": 4},
        "temperature": {"start": 2.0, "end": 1.5, "steps": 3},
        "drop": True,
        "capacity_factor": 1.0,
        "bias_update_rate": 0.002,
    }
    config = pretrain("run", routing)
    whole = main(["fit", "--config", config, "--model.gradient_checkpointing=true"])
    run = whole.run.folder
    half, last = (run / "checkpoints" / f"step=0000000{step}.ckpt" for step in (2, 4))
    again = main(["fit", "--config", config, "--model.gradient_checkpointing=true", f"--resume={half}"])
    states = [
        torch.load(c.run.folder / "checkpoints" / last.name, weights_only=True)["state_dict"] for c in (whole, again)
    ]
    assert again.run.number == 1
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    logged, resumed = scalars(run), scalars(again.run.folder)
    for tag in ("train/ce", "train/router_temperature", "train/max_violation", "train/dropped", "val/ce"):
        assert resumed[tag] == logged[tag][-len(resumed[tag]) :]
    assert [v for _, v in logged["train/router_temperature"]] == pytest.approx([2.0, 2 - 0.5 / 3, 2 - 1 / 3, 1.5])
    assert all(0 < v < 1 for _, v in logged["train/dropped"])
    bias = states[0]["model.routing.bias_LE"]
    torch.testing.assert_close((bias / 0.002).round() * 0.002, bias)
    assert bias.any()

    # Evaluation is without noise, and has the bias; so has what is read from the checkpoint.
    validated = main(["validate", f"--ckpt_path={last}", "--config", config]).trainer.callback_metrics
    assert float(validated["val/ce"]) == pytest.approx(logged["val/ce"][-1][1], rel=1e-6)
    model, _ = load_checkpoint(last, "--model")
    assert kept_routing(model) == "token_choice"
    whole.model.model.routing.begin_pass()
    torch.testing.assert_close(logits_of(model), logits_of(whole.model.model.hf), rtol=1e-4, atol=1e-4)

    export = ["export", "--checkpoint", str(last), "--output", str(tmp_path / "out"), "--dtype", "float32"]
    assert "no place: train its last steps with model.routing.bias_anneal_steps" in refused(capsys, *export)
    main([*export, "--drop_router_bias", "true"])
    said = re.search(
        r"left out: (\d+\.\d)% of the choices of experts on a probe of \d+ tokens", capsys.readouterr().out
    )
    assert 0 < float(said[1]) < 100
    assert f"## Routing\n\nThe routers' biases were {said[0]}" in (tmp_path / "out" / "README.md").read_text()
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        logits_of(without_bias(last)),
        rtol=0,
        atol=1e-5,
    )


def without_bias(checkpoint: Path) -> Any:
    """The stock model of a checkpoint, its temperature by hand."""
    content = torch.load(checkpoint, weights_only=True)
    state = {name.removeprefix("model.hf."): t for name, t in content["state_dict"].items() if ".hf." in name}
    for name in state:
        if name.endswith("mlp.gate.weight"):
            state[name] = state[name] / content["state_dict"]["model.routing.temperature"]
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content["hf_config"]))
    hf.load_state_dict(state)
    return hf


def test_two_ranks_move_the_bias_as_one_does(pretrain, tmp_path, capsys):
    """Loads are summed over ranks and micro-batches; and a sharded checkpoint keeps the bias too."""
    routing = {"bias_update_rate": 0.002, "temperature": 0.5}
    one = main(["fit", "--config", pretrain("one", routing, tokens=1024)])
    launch(Path(pretrain("two", routing, tokens=512, **sharded(2))))
    run = tmp_path / "two" / "lightning_logs" / "version_0"
    saved = run / "checkpoints" / "step=00000004.ckpt"
    bias = read_sharded(saved, {"state_dict"})["state_dict"]["model.routing.bias_LE"]
    assert one.model.model.routing.bias_LE.any()
    assert torch.equal(bias, one.model.model.routing.bias_LE)
    expected, logged = scalars(one.run.folder), scalars(run)
    for tag in ("train/ce", "train/max_violation", "val/ce", "val/balance_score"):
        assert [v for _, v in logged[tag]] == pytest.approx([v for _, v in expected[tag]], rel=2e-3), tag
    told = refused(capsys, "export", "--checkpoint", str(saved), "--output", str(tmp_path / "out"))
    assert "its routers choose by a bias" in told


def test_temperature_and_an_annealed_bias_leave_a_stock_model(pretrain, tmp_path):
    routing = {"temperature": 0.7, "bias_update_rate": 0.05, "bias_anneal_steps": 3}
    cli = main(["fit", "--config", pretrain("run", routing)])
    middle, last = (cli.run.folder / "checkpoints" / f"step=0000000{step}.ckpt" for step in (2, 4))
    biases = [torch.load(c, weights_only=True)["state_dict"]["model.routing.bias_LE"] for c in (middle, last)]
    assert biases[0].abs().max().item() == pytest.approx(0.05 * 2 / 3)
    assert not biases[1].any()
    main(["export", "--output", str(tmp_path / "out"), "--checkpoint", str(last), "--dtype", "float32"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(stock), logits_of(cli.model.model.hf), rtol=1e-4, atol=1e-5)


def test_expert_choice_trains_and_is_not_exported(pretrain, tmp_path, capsys):
    with pytest.warns(UserWarning, match=r"kind: expert_choice: .* export refuses it"):
        cli = main(["fit", "--config", pretrain("run", {"kind": "expert_choice"})])
    logged = scalars(cli.run.folder)
    assert {value for _, value in logged["expert_balance/layer_00"]} == {1.0}
    assert {value for _, value in logged["train/max_violation"]} == {0.0}
    checkpoint = str(cli.run.folder / "checkpoints" / "step=00000004.ckpt")
    message = refused(capsys, "export", "--checkpoint", checkpoint, "--output", str(tmp_path / "out"))
    assert "the experts choose their tokens, and no stock model has that" in message
    main(["generate", "--model", checkpoint, "--scenario=फसल: धान", "--max_new_tokens=4"])
    model, _ = load_checkpoint(cli.run.folder / "checkpoints" / "step=00000004.ckpt", "--model")
    torch.testing.assert_close(logits_of(model), logits_of(cli.model.model.hf), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("routing", "told"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0."),
        ({"temperature": Schedule(1.0, 0.0, steps=3)}, "it must be above 0."),
        ({"noise_scale": -1.0}, "noise_scale is -1.0: it must be at least 0."),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0: it must be above 0."),
        ({"bias_update_rate": -0.1}, "bias_update_rate is -0.1: it must be at least 0."),
        ({"kind": "expert_choice", "drop": True}, "drop is for token_choice"),
        ({"kind": "expert_choice", "bias_update_rate": 0.1}, "bias_update_rate is for token_choice"),
        ({"bias_anneal_steps": 2}, "bias_anneal_steps needs bias_update_rate above 0"),
    ],
)
def test_what_makes_no_sense_is_told(routing, told):
    with pytest.raises(ValueError, match=r"^model\.routing\." + ".*" + re.escape(told)):
        RoutingConfig(**routing).check(moe().config, "model.network")


def test_routers_that_are_not_known_are_refused():
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    other = AutoConfig.for_model("qwen2_moe", **options)
    with pytest.raises(ValueError, match=r"model\.network is a qwen2_moe, whose routers are not known here"):
        NEUTRAL.check(other, "model.network")


def test_a_checkpoint_of_other_routing_begins_afresh_or_is_told(chat, dense, teacher):
    biased, stock = (make_module(chat, dense, teacher, SUMS, routing=config) for config in (WAYS["bias"], None))
    checkpoint = {"state_dict": stock.state_dict()}
    biased.on_load_checkpoint(checkpoint)
    assert not checkpoint["state_dict"]["model.routing.bias_LE"].any()
    biased.load_state_dict(checkpoint["state_dict"])
    with pytest.warns(UserWarning, match=r"the checkpoint was trained with model\.routing"):
        stock.on_load_checkpoint(checkpoint)
    stock.load_state_dict(checkpoint["state_dict"])


def test_mistakes_are_told_before_anything_is_loaded(pretrain, capsys, no_models):
    told = refused(capsys, "fit", "--config", pretrain("dense", {}, dense=True))
    assert "model.routing is about experts, and model.network has none" in told
    annealed = {"bias_update_rate": 0.1, "bias_anneal_steps": 5}
    assert "is 5, and the run has 4 steps" in refused(capsys, "fit", "--config", pretrain("long", annealed))
