"""Feed-forward networks are found by structure, in families that name them differently."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.models.ffn import describe, find_ffns, only_first_layers, prove, put_in_place, record

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16}
# family -> what its config needs, whether it has a gate, how its activation is called in the line
FAMILIES = {
    "llama": ({}, True),
    "mistral": ({"head_dim": 4}, True),
    "qwen2": ({}, True),
    "qwen3": ({"head_dim": 4}, True),
    "gemma": ({"head_dim": 4}, True),
    "gemma2": ({"head_dim": 4}, True),
    "phi3": ({"num_key_value_heads": 2}, True),
    "gpt_neox": ({}, False),
    "phi": ({}, False),
    "starcoder2": ({}, False),
    "opt": (OPT, False),
}


def small(family, **changes):
    torch.manual_seed(0)
    options = SMALL | FAMILIES[family][0] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0.0, 0.1)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_networks_are_found_and_run_as_found(family):
    model = small(family)
    with torch.device("meta"):
        assert len(find_ffns(AutoModelForCausalLM.from_config(model.config), "model.source")) == 3
    ffns = prove(model, find_ffns(model, "model.source"), "model.source")
    assert [ffn.layer for ffn in ffns] == [0, 1, 2]
    assert {ffn.width for ffn in ffns} == {24}
    assert {ffn.gated for ffn in ffns} == {FAMILIES[family][1]}
    assert f"3 feed-forward networks ({ffns[0].layers_name}.*" in describe(ffns)
    assert "D 16, F 24" in describe(ffns)
    assert "float32" in describe(ffns)
    tokens = torch.arange(12)[None]
    with torch.no_grad(), record(ffns) as kept:
        model(tokens, use_cache=False)
    for ffn, (x, y) in zip(ffns, kept, strict=True):
        torch.testing.assert_close(ffn.answer(x), y)
        weights = ffn.weights()
        rebuilt = ffn.neurons(x) @ weights["down_SD"] + weights.get("bias_D", 0)
        torch.testing.assert_close(rebuilt, y)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_block_takes_the_place_of_a_network(family):
    model = small(family)
    ffns = prove(model, find_ffns(model, "model.source"), "model.source")
    tokens = torch.arange(12)[None]
    before = model(tokens).logits
    other = copy.deepcopy(model)
    theirs = prove(other, find_ffns(other, "model.source"), "model.source")

    class Same(nn.Module):
        def __init__(self, ffn):
            super().__init__()
            self.ffn = ffn

        def forward(self, x):
            return self.ffn.answer(x)

    put_in_place(other, {theirs[1].name: Same(ffns[1])}, theirs)
    torch.testing.assert_close(other(tokens).logits, before)

    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    put_in_place(other, {theirs[2].name: Zero()}, theirs)
    assert not torch.allclose(other(tokens).logits, before)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_the_pass_ends_after_a_layer(family):
    model = small(family)
    ffns = find_ffns(model, "model.source")
    tokens = torch.arange(12)[None]
    with torch.no_grad(), record(ffns) as whole:
        model.base_model(tokens, use_cache=False)
    with torch.no_grad(), only_first_layers(model, ffns[1]), record(ffns) as part:
        model.base_model(tokens, use_cache=False)
    assert len(part) == 2
    assert all(
        torch.equal(a, b) for one, other in zip(part, whole, strict=False) for a, b in zip(one, other, strict=True)
    )
    with torch.no_grad(), record(ffns) as again:
        model.base_model(tokens, use_cache=False)
    assert len(again) == 3


def test_what_has_none_is_refused_in_one_sentence():
    moe = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SMALL, num_local_experts=2))
    with pytest.raises(ValueError, match=r"model\.source is a mixtral, which is sparse already"):
        find_ffns(moe, "model.source")
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="no feed-forward network was found"):
        find_ffns(gpt2, "model.source")


def test_maps_that_do_something_else_are_refused():
    model = small("llama")
    ffns = find_ffns(model, "model.source")
    ffns[1].owner.forward = lambda x: ffns[1].down(torch.relu(ffns[1].readers[0](x)))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp looks like a feed-forward network"):
        prove(model, ffns, "model.source")
