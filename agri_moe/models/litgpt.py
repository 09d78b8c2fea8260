"""LitGPT's checkpoints, `lit_model.pth` beside `model_config.yaml`: one table of names, read both ways.

What LitGPT's model computes with these settings is what transformers' does: a mixture takes the softmax over the chosen
experts only (`norm_topk_prob`), queries, keys and values lie one below the other in one matrix, and a tied head is
stored twice. Written against litgpt 0.5.13 (litgpt/config.py, litgpt/model.py).

Shapes: Q rows of all query heads, K rows of all key heads (as many as of values), D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from agri_moe.models.checkpoint_files import LITGPT as WEIGHTS
from agri_moe.models.checkpoint_files import read_json

SETTINGS = "model_config.yaml"
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


@dataclass(frozen=True)
class Row:
    """One line of the table: {l} is the layer, {e} the expert; several names on the right lie below each other."""

    lit: str
    hf: tuple[str, ...]


def _row(lit: str, *hf: str) -> Row:
    return Row(f"transformer.h.{{l}}.{lit}.weight", tuple(f"model.layers.{{l}}.{name}.weight" for name in hf))


_ALL = (
    Row(EMBEDDING, ("model.embed_tokens.weight",)),
    Row("transformer.ln_f.weight", ("model.norm.weight",)),
    Row(HEAD, ("lm_head.weight",)),
    _row("norm_1", "input_layernorm"),
    _row("norm_2", "post_attention_layernorm"),
    _row("attn.qkv", *(f"self_attn.{name}_proj" for name in "qkv")),
    _row("attn.proj", "self_attn.o_proj"),
)
_QK_NORM = (_row("attn.norm_q", "self_attn.q_norm"), _row("attn.norm_k", "self_attn.k_norm"))
_DENSE = (
    _row("mlp.fc_1", "mlp.gate_proj"),
    _row("mlp.fc_2", "mlp.up_proj"),
    _row("mlp.proj", "mlp.down_proj"),
)
_QWEN3_EXPERTS = (
    _row("mlp.gate", "mlp.gate"),
    _row("mlp.experts.{e}.fc_1", "mlp.experts.{e}.gate_proj"),
    _row("mlp.experts.{e}.fc_2", "mlp.experts.{e}.up_proj"),
    _row("mlp.experts.{e}.proj", "mlp.experts.{e}.down_proj"),
)
_MIXTRAL_EXPERTS = (
    _row("mlp.gate", "block_sparse_moe.gate"),
    _row("mlp.experts.{e}.fc_1", "block_sparse_moe.experts.{e}.w1"),
    _row("mlp.experts.{e}.fc_2", "block_sparse_moe.experts.{e}.w3"),
    _row("mlp.experts.{e}.proj", "block_sparse_moe.experts.{e}.w2"),
)


@dataclass(frozen=True)
class Family:
    """A Hugging Face model type, by what LitGPT's settings say of it."""

    rows: tuple[Row, ...]
    norm_qk: bool
    mlp_class_name: str
    architecture: str


FAMILIES = {
    "qwen3": Family(_ALL + _QK_NORM + _DENSE, True, "LLaMAMLP", "Qwen3ForCausalLM"),
    "qwen3_moe": Family(_ALL + _QK_NORM + _QWEN3_EXPERTS, True, "LLaMAMoE", "Qwen3MoeForCausalLM"),
    "llama": Family(_ALL + _DENSE, False, "LLaMAMLP", "LlamaForCausalLM"),
    "mistral": Family(_ALL + _DENSE, False, "LLaMAMLP", "MistralForCausalLM"),  # which comes in again as Llama
    "mixtral": Family(_ALL + _MIXTRAL_EXPERTS, False, "LLaMAMoE", "MixtralForCausalLM"),
}
# What each of these must be, absent or not: anything else is another function than any of the families computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "norm_class_name": ("RMSNorm",), "parallel_residual": (False,), "bias": (False,), "rotary_percentage": (1.0,),
    "attn_bias": (False, None), "lm_head_bias": (False, None), "norm_qk_type": ("default", None),
    "post_attention_norm": (False, None), "post_mlp_norm": (False, None), "shared_attention_norm": (False, None),
    "norm_1": (True, None), "norm_2": (True, None), "rope_condense_ratio": (1, None), "rope_indices": (None,),
    "rope_interleave": (False, None), "rope_local_base_freq": (None,), "scale_embeddings": (False, None),
    "final_logit_softcapping": (None,), "attention_logit_softcapping": (None,), "attention_scores_scalar": (None,),
    "sliding_window_size": (None,), "latent_attention": (None,), "n_shared_expert": (0, None),
    "n_expert_groups": (0, None), "first_k_dense_replace": (0, None), "routed_scaling_factor": (1.0, None),
}  # fmt: skip
# LitGPT's name -> Hugging Face's, for a number that both keep.
_SIZES = {
    "padded_vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_query_groups": "num_key_value_heads", "head_size": "head_dim",
    "intermediate_size": "intermediate_size", "block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps",
}  # fmt: skip
_EXPERT_SIZES = {"n_expert": "num_local_experts", "n_expert_per_token": "num_experts_per_tok"}
_LLAMA3 = {
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}  # fmt: skip


def names(config: PreTrainedConfig) -> dict[str, tuple[str, ...]]:
    """LitGPT's name of every tensor of a model -> Hugging Face's, hub checkpoints' and per expert."""
    found: dict[str, tuple[str, ...]] = {}
    for row in FAMILIES[config.model_type].rows:
        for layer in range(config.num_hidden_layers if "{l}" in row.lit else 1):
            for expert in range(config.num_local_experts if "{e}" in row.lit else 1):
                found[row.lit.format(l=layer, e=expert)] = tuple(name.format(l=layer, e=expert) for name in row.hf)
    return found


# ---- reading


def read_config(folder: Path) -> PreTrainedConfig:
    """The Hugging Face config of a LitGPT checkpoint; the head counts as tied if it is stored equal to the embedding.

    Raises:
        ValueError: If the settings are missing or damaged, or describe a model of no family in `FAMILIES`.
    """
    settings = _settings(folder)
    model_type = _family(settings, folder / SETTINGS)
    sizes = _SIZES | (_EXPERT_SIZES if settings["mlp_class_name"] == "LLaMAMoE" else {})
    if missing := [key for key in (*sizes, "rope_base") if settings.get(key) is None]:
        raise ValueError(f"{folder / SETTINGS} lacks {', '.join(missing)}: take the file that LitGPT saved.")
    values = {theirs: settings[ours] for ours, theirs in sizes.items()}
    if model_type == "qwen3_moe":
        values |= {
            "moe_intermediate_size": settings.get("moe_intermediate_size") or settings["intermediate_size"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    elif model_type == "mixtral":
        values["intermediate_size"] = settings.get("moe_intermediate_size") or settings["intermediate_size"]
    generation = folder / "generation_config.json"
    tokens = read_json(generation) if generation.is_file() else {}
    return AutoConfig.for_model(
        model_type,
        **values,
        rope_parameters=_rope_parameters(settings, folder / SETTINGS),
        tie_word_embeddings=_tied(folder.resolve(), (folder / WEIGHTS).stat().st_mtime_ns),
        architectures=[FAMILIES[model_type].architecture],
        dtype=read_state(folder)[EMBEDDING].dtype,
        **{key: tokens.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"{path} is missing: LitGPT saves it beside {WEIGHTS}, and it says what model that is.")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: take the file that LitGPT saved.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings: take the file that LitGPT saved.")
    return values


def _family(settings: Mapping[str, Any], path: Path) -> str:
    name = settings.get("name") or "a model without a name"
    known = "LitGPT checkpoints are read of Qwen3, Qwen3-MoE, Llama and Mixtral"
    for key, allowed in _ONLY.items():
        if settings.get(key) not in allowed:
            raise ValueError(f"{path} describes {name}, with {key}: {settings.get(key)}; {known}.")
    if "Gemma" in str(name):  # LitGPT itself goes by the name there
        raise ValueError(f"{path} describes {name}; {known}.")
    for model_type, family in FAMILIES.items():
        if (settings.get("norm_qk", False), settings.get("mlp_class_name")) == (family.norm_qk, family.mlp_class_name):
            return model_type
    raise ValueError(f"{path} describes {name}, with mlp_class_name: {settings.get('mlp_class_name')}; {known}.")


def _rope_parameters(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    base = {"rope_theta": float(settings["rope_base"])}
    adjustments = settings.get("rope_adjustments")
    if not adjustments:
        return base | {"rope_type": "default"}
    if adjustments.keys() == _LLAMA3.keys():
        return base | {"rope_type": "llama3"} | {theirs: adjustments[ours] for ours, theirs in _LLAMA3.items()}
    if adjustments.keys() == {"factor"}:
        return base | {"rope_type": "linear", "factor": adjustments["factor"]}
    raise ValueError(f"{path} has rope_adjustments with {', '.join(adjustments)}: only linear and Llama 3's are known.")


@lru_cache(maxsize=8)
def _tied(folder: Path, _modified_ns: int) -> bool:
    state = read_state(folder)
    return torch.equal(state[HEAD], state[EMBEDDING])


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a LitGPT checkpoint under its own names, mapped from the file.

    Raises:
        ValueError: If the file is damaged, holds more than tensors, or lacks embedding or head.
    """
    path = folder / WEIGHTS
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no checkpoint that LitGPT saved, or it is damaged.") from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    _refuse_missing(path, [name for name in (EMBEDDING, HEAD) if name not in state])
    return state


def read_tensors(folder: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The same under Hugging Face's names, without a tied head.

    Raises:
        ValueError: If a tensor is missing, is too many, or has rows for other heads than the settings say.
    """
    path, state, table = folder / WEIGHTS, read_state(folder), names(config)
    _refuse_missing(path, [name for name in table if name not in state])
    if unknown := sorted(state.keys() - table.keys()):
        raise ValueError(f"{path} holds {_some(unknown)}, for which {config.architectures[0]} has no place.")
    found: dict[str, Tensor] = {}
    for lit, hf in table.items():
        if len(hf) == 1:
            found[hf[0]] = state[lit]
            continue
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        rows = [config.head_dim * count for count in heads]
        if state[lit].shape[0] != sum(rows):
            raise ValueError(f"{path} holds {lit} with {state[lit].shape[0]} rows: {SETTINGS} asks for {sum(rows)}.")
        found |= zip(hf, state[lit].split(rows), strict=True)
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def _refuse_missing(path: Path, missing: list[str]) -> None:
    if missing:
        raise ValueError(f"{path} lacks {_some(missing)}: the checkpoint is incomplete, or of another model.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- writing


def settings_for(config: PreTrainedConfig, name: str, tokens: int, key: str) -> dict[str, Any]:
    """What `model_config.yaml` must say for LitGPT to build this model.

    Args:
        config: Of the model.
        name: By which LitGPT shall call it.
        tokens: Entries of its tokenizer; LitGPT pads them to the rows of the embedding.
        key: The option that named the model, for messages.

    Raises:
        ValueError: If LitGPT has no such model.
    """
    _refuse_other(config, key)
    family = FAMILIES[config.model_type]
    sparse = family.mlp_class_name == "LLaMAMoE"
    sizes = _SIZES | (_EXPERT_SIZES if sparse else {})
    settings = {ours: getattr(config, theirs) for ours, theirs in sizes.items()}
    settings["head_size"] = config.head_dim or config.hidden_size // config.num_attention_heads  # Mistral has None
    if sparse:
        settings["moe_intermediate_size"] = getattr(config, "moe_intermediate_size", config.intermediate_size)
    rope = config.rope_parameters
    settings |= {
        "name": name,
        "vocab_size": min(tokens, config.vocab_size),
        "norm_class_name": "RMSNorm",
        "norm_qk": family.norm_qk,
        "parallel_residual": False,
        "bias": False,
        "rotary_percentage": 1.0,
        "rope_base": int(rope["rope_theta"]),
        "mlp_class_name": family.mlp_class_name,
    }
    if rope["rope_type"] == "llama3":
        settings["rope_adjustments"] = {ours: rope[theirs] for ours, theirs in _LLAMA3.items()}
    elif rope["rope_type"] == "linear":
        settings["rope_adjustments"] = {"factor": rope["factor"]}
    return settings


def _refuse_other(config: PreTrainedConfig, key: str) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{key} is a {config.model_type} model, and LitGPT checkpoints are written of {', '.join(FAMILIES)}: leave "
            "--format at huggingface."
        )
    rope = config.rope_parameters
    facts = {
        "attention_bias": not getattr(config, "attention_bias", False),
        "mlp_bias": not getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act == "silu",
        "sliding_window": not (getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)),
        "norm_topk_prob": getattr(config, "norm_topk_prob", True),
        "decoder_sparse_step": getattr(config, "decoder_sparse_step", 1) == 1,
        "mlp_only_layers": not getattr(config, "mlp_only_layers", None),
        "rope_parameters": rope["rope_type"] in ("default", "linear", "llama3") and rope["rope_theta"] % 1 == 0,
    }
    for name, kept in facts.items():
        if not kept:
            raise ValueError(
                f"{key} has {name}: {getattr(config, name)}, which LitGPT's model cannot: leave --format at "
                "huggingface."
            )


def write(folder: Path, tensors: Mapping[str, Tensor], config: PreTrainedConfig, settings: Mapping[str, Any]) -> None:
    """Write weights and settings as LitGPT saves them. Memory: the weights once more.

    Args:
        folder: Where to.
        tensors: Under the names of hub checkpoints, a tied head left out or not.
        config: Of the model.
        settings: From `settings_for`.
    """
    tensors = {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}
    # Copies: a view would be saved with all that it is a view of.
    state = {lit: torch.cat([tensors[name].detach().cpu() for name in hf]) for lit, hf in names(config).items()}
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    torch.save(state, folder / WEIGHTS)
    (folder / SETTINGS).write_text(yaml.safe_dump(dict(settings)), "utf-8")
