"""LitGPT's checkpoints, in and out, against the litgpt package's own models where it is installed."""

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from test_cli import refused
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.cli import main
from agri_moe.models.checkpoint_files import load_config, stored_tensors
from agri_moe.models.litgpt import names
from agri_moe.trained import load_pretrained

TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 600
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 24, "norm_topk_prob": True, "tie_word_embeddings": False},
    "llama": {
        "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 16}
    },
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS | {"sliding_window": None},
}


def small(family, chat, **changes):
    """A random model in which everything counts: norms that are not one, and weights of some size."""
    options = SIZES | FAMILIES[family] | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=len(chat.tokenizer), **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter) if parameter.dim() == 1 else parameter * 8)
    return model.eval()


@pytest.fixture
def write(chat, tmp_path):
    """Writes a model as a Hugging Face folder and exports it to LitGPT."""

    def write(family, **changes):
        source, folder = tmp_path / "source", tmp_path / "lit"
        model = small(family, chat, **changes)
        model.save_pretrained(source)
        chat.save(source)
        arguments = ["--checkpoint", str(source), "--output", str(folder), "--dtype", "float32"]
        main(["export", "--format", "litgpt", *arguments])
        return model, folder

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_litgpt_computes_what_we_export(family, write):
    """The package's own model, built from the two files alone and strict about names and shapes."""
    litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed")
    model, folder = write(family)
    theirs = litgpt.GPT(litgpt.Config.from_file(folder / "model_config.yaml")).eval()
    theirs.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True), strict=True)
    with torch.inference_mode():
        expected = model(TOKENS).logits
        torch.testing.assert_close(theirs(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5, "random weights large enough for a difference to show"


@pytest.mark.parametrize("family", [*FAMILIES])
def test_we_compute_what_litgpt_saved(family, chat, tmp_path):
    """A random model of theirs, saved as their recipes save it."""
    litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed")
    from litgpt.utils import save_config

    sizes = {
        "block_size": 64, "n_layer": 3, "n_embd": 32, "n_head": 4, "head_size": 16, "n_query_groups": 2,
        "vocab_size": 600, "padded_vocab_size": 608, "intermediate_size": 48,
    }  # fmt: skip
    experts = {"n_expert": 5, "n_expert_per_token": 2}
    name, changes = {
        "qwen3": ("Qwen3-0.6B", {}),
        "qwen3_moe": ("Qwen3-30B-A3B", experts | {"moe_intermediate_size": 24}),
        "llama": ("Llama-3.2-1B", {}),
        "mistral": ("Mistral-7B-v0.3", {}),
        "mixtral": ("Mixtral-8x7B-v0.1", experts),
    }[family]
    config = litgpt.Config.from_name(name, **sizes | changes)
    torch.manual_seed(0)
    theirs = litgpt.GPT(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter) if parameter.dim() == 1 else parameter)
    torch.save({"model": theirs.state_dict()}, tmp_path / "lit_model.pth")
    save_config(config, tmp_path)
    ours = load_pretrained(tmp_path, "auto")
    assert ours.config.model_type == {"mistral": "llama"}.get(family, family)
    with torch.inference_mode():
        expected = theirs(TOKENS)
        torch.testing.assert_close(ours(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_names_are_those_of_litgpts_own_converter(write, tmp_path):
    """Their script reads our Hugging Face folder and must write the tensors that we write."""
    pytest.importorskip("litgpt", reason="litgpt is not installed")
    from litgpt import Config
    from litgpt.scripts import convert_hf_checkpoint as theirs

    _, folder = write("qwen3_moe")
    main(["export", "--checkpoint", str(folder), "--output", str(tmp_path / "hf"), "--dtype", "float32"])
    hf = {name: tensor.read() for name, tensor in stored_tensors(tmp_path / "hf").items()}
    state: dict = {}
    theirs.copy_weights_qwen_3(Config.from_file(folder / "model_config.yaml"), {}, state, hf)
    ours = torch.load(folder / "lit_model.pth", weights_only=True)
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_again_is_the_same_model(family, write):
    model, folder = write(family)
    config = load_config(folder, "source")
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert len(names(config)) == len(torch.load(folder / "lit_model.pth", weights_only=True))
    again = load_pretrained(folder, "auto", attn_implementation="eager")
    assert again.generation_config.eos_token_id == again.config.eos_token_id is not None
    with torch.inference_mode():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_litgpt_folder_serves_where_a_hugging_face_folder_does(write, tmp_path, capsys):
    model, folder = write("qwen3")
    assert ModelCard.load(folder / "README.md").data.library_name == "litgpt"
    main(["upcycle", "--source", str(folder), "--output", str(tmp_path / "moe"), "--jitter", "0"])
    main(["audit", "--student", str(tmp_path / "moe"), "--source", str(folder)])
    assert "same first choice 100.0%" in capsys.readouterr().out
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with torch.inference_mode():
        torch.testing.assert_close(sparse(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-3)
    main(["generate", "--model", str(folder), "--scenario", "गेहूँ", "--max_new_tokens", "4"])
    main(["export", "--checkpoint", str(folder), "--output", str(tmp_path / "hf"), "--dtype", "float32"])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_what_does_not_come_in_is_refused_by_name(write):
    _, folder = write("qwen3")
    settings_file, weights_file = folder / "model_config.yaml", folder / "lit_model.pth"
    settings = yaml.safe_load(settings_file.read_text())
    state = torch.load(weights_file, weights_only=True)

    def message(settings=settings, state=state):
        settings_file.write_text(yaml.safe_dump(settings))
        torch.save(state, weights_file)
        with pytest.raises(ValueError, match=str(folder)) as caught:
            load_pretrained(folder, "auto")
        return str(caught.value)

    pythia = {"name": "pythia-14m", "mlp_class_name": "GptNeoxMLP", "norm_qk": False}
    assert "pythia-14m, with mlp_class_name: GptNeoxMLP; LitGPT checkpoints are read of Qwen3" in message(
        settings | pythia
    )
    assert "Gemma-2-2b, with final_logit_softcapping: 30.0" in message(
        settings | {"name": "Gemma-2-2b", "final_logit_softcapping": 30.0}
    )
    assert "lacks n_embd, rope_base" in message({k: v for k, v in settings.items() if k not in ("n_embd", "rope_base")})
    assert "rope_adjustments with beta_fast" in message(settings | {"rope_adjustments": {"beta_fast": 32}})
    lacking = {name: tensor for name, tensor in state.items() if ".1.attn" not in name}
    assert "lacks transformer.h.1.attn.qkv.weight, transformer.h.1.attn.proj.weight" in message(state=lacking)
    assert "and 1 more" in message(state=lacking)
    assert "holds transformer.h.0.attn.qkv.bias, for which Qwen3ForCausalLM has no place" in message(
        state=state | {"transformer.h.0.attn.qkv.bias": torch.zeros(128)}
    )
    assert "attn.qkv.weight with 128 rows: model_config.yaml asks for 192" in message(settings | {"n_query_groups": 4})
    assert "mlp.gate_proj.weight is F32 [48, 32] and not [40, 32]" in message(settings | {"intermediate_size": 40})
    weights_file.write_bytes(weights_file.read_bytes()[:999])
    with pytest.raises(ValueError, match="is damaged"):
        load_config(folder, "source")
    settings_file.unlink()
    with pytest.raises(ValueError, match="model_config.yaml is missing"):
        load_config(folder, "source")


@pytest.mark.parametrize(
    ("family", "changes", "needle"),
    [
        ("qwen3", {"attention_bias": True}, "has attention_bias: True, which LitGPT's model cannot"),
        ("qwen3_moe", {"norm_topk_prob": False}, "has norm_topk_prob: False"),
        ("mistral", {"sliding_window": 8}, "has sliding_window: 8"),
    ],
)
def test_what_litgpt_does_not_have_is_refused(family, changes, needle, chat, tmp_path, capsys):
    small(family, chat, **changes).save_pretrained(tmp_path / "source")
    chat.save(tmp_path / "source")
    arguments = ["--checkpoint", str(tmp_path / "source"), "--output", str(tmp_path / "lit")]
    assert needle in refused(capsys, "export", "--format", "litgpt", *arguments)
    assert not (tmp_path / "lit").exists()
