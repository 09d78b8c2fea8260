"""Shared-core experts: their answers and gradients, their small format, and the stock model they multiply out to."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from agri_moe.models.base import parameter_counts
from agri_moe.models.causal import CausalModel, Reads
from agri_moe.models.experts import visits
from agri_moe.models.shared_core import SharedCoreForCausalLM, multiplied_out, shared_core_config, sparse_layers

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "tie_word_embeddings": True, "mlp_only_layers": [1], "eos_token_id": 3,
}  # fmt: skip


def shared_core(seed: int = 0) -> SharedCoreForCausalLM:
    """A small model, one of its layers dense, whose experts differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(shared_core_config(Qwen3MoeConfig(**SIZES), rank=8)).eval()
    with torch.no_grad():
        for layer in sparse_layers(model):
            for parameter in layer.mlp.experts.parameters():
                parameter.normal_(0.0, 0.3)
            layer.mlp.gate.weight.normal_()
    return model


def by_hand(experts, hidden_ND, index_NK, weights_NK):
    """One token and expert at a time, in float64 and from the definition."""
    core, a, b = experts.shared_core, experts.input_wrapper, experts.output_wrapper
    rows = []
    for x, index, weights in zip(hidden_ND.double(), index_NK.tolist(), weights_NK.double(), strict=True):
        total = torch.zeros_like(x)
        for expert, weight in zip(index, weights, strict=True):
            z = x + a.up[expert].double() @ (a.down[expert].double() @ x)
            h = F.silu(core.gate_proj.weight.double() @ z) * (core.up_proj.weight.double() @ z)
            y = core.down_proj.weight.double() @ h
            total = total + weight * (y + b.up[expert].double() @ (b.down[expert].double() @ y))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("chosen", ["any", "one expert takes all", "one expert gets none"])
def test_answers_and_gradients_are_the_definitions(chosen):
    experts = sparse_layers(shared_core())[0].mlp.experts
    hidden = torch.randn(9, 32, requires_grad=True)
    logits = torch.randn(9, 4)
    if chosen == "one expert takes all":
        logits[:, 2] += 100
    if chosen == "one expert gets none":
        logits[:, 1] -= 100
    weights, index = logits.softmax(-1).topk(2)
    weights = weights.detach().requires_grad_()
    inputs = [hidden, weights, *experts.parameters()]
    out = experts(hidden, index, weights)
    expected = by_hand(experts, hidden, index, weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(expected)
    ours = torch.autograd.grad((out * probe.float()).sum(), inputs)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_products_are_bfloat16_and_the_stream_stays():
    experts = sparse_layers(shared_core())[0].mlp.experts
    hidden = torch.randn(9, 32)
    weights, index = torch.randn(9, 4).softmax(-1).topk(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(hidden, index, weights)
    assert out.dtype == torch.float32
    expected = by_hand(experts, hidden, index, weights).float()
    assert 1e-4 < (out - expected).norm() / expected.norm() < 2e-2


def test_multiplied_out_it_is_a_stock_model_with_the_same_logits(tmp_path):
    model = shared_core()
    stock = multiplied_out(model)
    assert type(stock) is Qwen3MoeForCausalLM
    assert stock.config.model_type == "qwen3_moe"
    stock.save_pretrained(tmp_path)
    assert "shared_core" not in (tmp_path / "config.json").read_text()
    ids = torch.randint(0, 96, (2, 11))
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-5, atol=1e-5)
        reloaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(reloaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert stock.lm_head.weight is not model.lm_head.weight


def test_the_small_format_comes_back_bit_for_bit(tmp_path):
    model = shared_core()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is SharedCoreForCausalLM
    assert reloaded.config.shared_core_rank == 8
    ours, theirs = model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.device("meta"):  # as settings are checked and sharded models begin
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {n: p.shape for n, p in shape.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_new_wrappers_change_nothing_and_learn():
    model = AutoModelForCausalLM.from_config(shared_core_config(Qwen3MoeConfig(**SIZES), rank=8))
    experts = sparse_layers(model)[0].mlp.experts
    for expert in (0, 3):
        torch.testing.assert_close(experts.gate_up_proj[expert, :24], experts.shared_core.gate_proj.weight)
        torch.testing.assert_close(experts.down_proj[expert], experts.shared_core.down_proj.weight)
    model(torch.randint(0, 96, (2, 11))).logits.square().sum().backward()
    assert all(wrapper.up.grad.abs().sum() > 0 for wrapper in (experts.input_wrapper, experts.output_wrapper))


@pytest.mark.parametrize("rank", [0, 12])
def test_a_rank_that_no_kernel_takes_is_refused(rank):
    with pytest.raises(ValueError, match=f"shared_core_rank is {rank}: it must be a positive multiple of 8"):
        shared_core_config(Qwen3MoeConfig(**SIZES), rank)


def test_what_the_objective_reads_is_what_the_stock_model_shows():
    """Routers, residual streams and the outputs of all experts, through the model that is trained."""
    model = shared_core()
    ids = torch.randint(0, 96, (1, 12))
    batch = {"input_ids": ids, "position_ids": torch.arange(12)[None], "sample": torch.tensor([1, 5])}
    batch["expert_sample"] = torch.tensor([0, 3, 7])
    reads = Reads(layers=[0, 2], experts=True)
    seen = []
    for hf in (model, multiplied_out(model)):
        out = CausalModel(copy.deepcopy(hf))(batch, torch.arange(12), lambda hidden, head: hidden, reads)
        seen.append([out.read, *out.router_logits, *out.layers.values(), *out.experts])
    assert len(seen[0]) == 1 + 2 + 2 + 2
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_core_is_active_for_every_token():
    model = shared_core()
    total, active, _ = parameter_counts(CausalModel(model))
    wrappers = sum(p.numel() for name, p in model.named_parameters() if "_wrapper." in name)
    assert wrappers == 2 * 2 * 4 * 2 * 32 * 8  # layers, sides, experts, matrices of rank 8
    assert total - active == wrappers // 2
    assert visits("model.layers.0.mlp.experts.shared_core.up_proj.weight", 2, 4) == 2.0
