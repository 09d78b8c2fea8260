"""A dense model with its networks replaced: through the package, and as a stock model with padded experts."""

import json

import pytest
import torch
from test_ffn import small
from transformers import AutoModelForCausalLM

from agri_moe.cli import main
from agri_moe.models.ffn import find_ffns, prove, put_in_place
from agri_moe.models.moe import Replacement, RoutingRule
from agri_moe.models.replaced import is_replaced, new_moe, stock_model
from agri_moe.trained import load_checkpoint

WIDTHS = ((8, 3, 8, 5), (8, 4, 4, 8), (1, 2, 3, 18))


def replaced(family, rule=RoutingRule(), layers=3):  # noqa: B008 (frozen)
    model = small(family)
    ffns = prove(model, find_ffns(model, "x"), "x")
    blocks = {}
    for ffn, widths in list(zip(ffns, WIDTHS, strict=True))[:layers]:
        moe = new_moe(ffn, widths, rule)
        generator = torch.Generator().manual_seed(ffn.layer)
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        moe.temperature.fill_(0.5)
        blocks[ffn.name] = Replacement(moe)
    put_in_place(model, blocks, ffns)
    return model.eval()


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
def test_experts_of_unequal_width_are_a_stock_model_with_zeros(family, tmp_path):
    model = replaced(family)
    assert is_replaced(model)
    stock_model(model, "--checkpoint").save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(stock).__name__ == {"qwen3": "Qwen3MoeForCausalLM"}.get(family, "MixtralForCausalLM")
    tokens = torch.arange(2 * 20).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    width = stock.model.layers[0].mlp.experts.down_proj.shape[-1]
    assert width == 32  # the widest, 18, made a multiple of 16
    assert not stock.model.layers[0].mlp.experts.down_proj[1, :, 3:].any()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: replaced("qwen3", RoutingRule("expert_choice")), "the experts choose their tokens"),
        (lambda: replaced("gemma"), r"a gemma has no stock mixture of experts \(one of qwen3, llama, mistral has\)"),
        (lambda: replaced("gpt_neox"), "a gpt_neox has no stock mixture of experts"),
        (lambda: replaced("qwen3", layers=2), "2 of 3 layers are trained"),
    ],
)
def test_what_no_stock_model_holds_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        stock_model(model(), "--checkpoint x.ckpt")


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_run_is_exported_and_loads_through_the_package(layerwise_config, mode, tmp_path, capsys):
    cli = main(["fit", f"--config={layerwise_config(mode=mode)}"])
    output = tmp_path / "stock"
    main(["export", "--output", str(output), "--run_root", str(tmp_path), "--dtype", "float32"])
    assert json.loads((output / "config.json").read_text())["num_experts"] == 4
    path = sorted((cli.run.folder / "checkpoints").glob("*.ckpt"))[-1]
    model, chat = load_checkpoint(path, "--model")
    stock = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
    prompt = torch.tensor([chat.encode_prompt("फसल: गेहूँ")])
    with torch.no_grad():
        torch.testing.assert_close(stock(prompt).logits, model(prompt).logits, rtol=1e-4, atol=1e-5)
        trained = stock.model.layers[1].mlp.experts.down_proj
    last = cli.model.layers[-1]
    torch.testing.assert_close(trained[0], last.down_SD[: last.widths[0]].T.detach())
    capsys.readouterr()
    main(["generate", "--model", str(path), "--scenario", "फसल: गेहूँ", "--max_new_tokens", "4"])
    assert capsys.readouterr().out


def test_a_sequential_run_without_its_layers_says_so(layerwise_config, tmp_path):
    cli = main(["fit", f"--config={layerwise_config(mode='sequential')}"])
    (cli.run.folder / "layers" / "layer_00.safetensors").write_bytes(b"cut")
    path = sorted((cli.run.folder / "checkpoints").glob("*.ckpt"))[-1]
    with pytest.raises(ValueError, match=r"layer_00\.safetensors is missing or damaged"):
        load_checkpoint(path, "--model")
