"""Experts under autocast: the type of their products, and what comes out, expert by expert."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.models.causal import CausalModel
from agri_moe.models.experts import AUTOCAST


class GroupedTypes(TorchDispatchMode):
    """Collect the types of what grouped products multiply."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "grouped_mm" in func.name():
            self.seen |= {a.dtype for a in args if torch.is_tensor(a) and a.is_floating_point()}
        return func(*args, **(kwargs or {}))


def moe(model_type="qwen3_moe"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads, **experts))


def by_hand(experts, hidden_ND, index_NK, weights_NK):
    """One token and expert at a time, in float64."""
    out = torch.zeros_like(hidden_ND, dtype=torch.float64)
    gate_up, down = experts.gate_up_proj.double(), experts.down_proj.double()
    for token in range(len(hidden_ND)):
        for expert, weight in zip(index_NK[token], weights_NK[token], strict=True):
            gate, up = (gate_up[expert] @ hidden_ND[token].double()).chunk(2)
            out[token] += weight.double() * (down[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_products_follow_autocast_and_answers_stay(model_type):
    hf = moe(model_type)
    model = CausalModel(hf)
    assert hf.config._experts_implementation == AUTOCAST
    experts = hf.model.layers[0].mlp.experts
    hidden = torch.randn(10, 32)
    weights, index = torch.randn(10, 4).softmax(-1).topk(2)
    expected = by_hand(experts, hidden, index, weights)
    for autocast, dtype, tolerance in ((False, torch.float32, 1e-5), (True, torch.bfloat16, 2e-2)):
        experts.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), GroupedTypes() as types:
            out = experts(hidden, index, weights)
            out.float().square().sum().backward()
        assert types.seen == {dtype}
        assert out.dtype == dtype
        assert (out.double() - expected).norm() < tolerance * expected.norm()
        reference = torch.autograd.grad(by_hand(experts, hidden, index, weights).square().sum(), experts.down_proj)[0]
        assert experts.down_proj.grad.dtype == torch.float32
        assert (experts.down_proj.grad - reference).norm() < 2 * tolerance * reference.norm()
    assert "experts_implementation" not in str(model.hf.config.to_dict())


def test_another_implementation_stays_as_chosen():
    hf = moe()
    hf.config._experts_implementation = "eager"
    CausalModel(hf)
    assert hf.config._experts_implementation == "eager"
