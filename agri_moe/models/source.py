"""Which model a setting names, and what stands in its folder.

Everything here up to `ModelConfig.load` reads configs and tokenizers only, so that a mistake is found before weights.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from agri_moe.data.chat import Chat
from agri_moe.models.causal import start_rows
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.upcycle import UpcycleSpec, is_moe, load_upcycled, moe_config


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model; None if its folder has none."""
    if cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    return AutoTokenizer.from_pretrained(source)


def untrained_markers(source: str, chat: Chat) -> dict[int, list[int]]:
    """The markers that the model in `source` never learned: id -> ids of the plain-text pieces.

    A marker that stands in the model's own tokenizer was learned. Where the folder has no tokenizer, those count as
    new that the data's tokenizer lacked before they were added.
    """
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        return chat.new_marker_pieces
    known = tokenizer.get_added_vocab()
    return {
        token: pieces
        for token, pieces in chat.new_marker_pieces.items()
        if known.get(chat.tokenizer.convert_ids_to_tokens(token)) != token
    }


def check_vocabulary(source: str | None, config: PreTrainedConfig, chat: Chat, key: str) -> None:
    """Check that a model reads the token ids that the data is made of.

    Raises:
        ValueError: If its matrix is too small, or its own tokenizer gives a token another id.
    """
    tokens = chat.tokenizer.get_vocab()
    new = set(chat.new_marker_pieces)
    needed = 1 + max(i for i in tokens.values() if i not in new)
    if config.vocab_size < needed:
        raise ValueError(
            f"{key}: {source or 'this config'} has {config.vocab_size:,} vocabulary rows, but data.tokenizer has "
            f"{needed:,} entries; teacher, student and data must share one tokenizer."
        )
    own = load_tokenizer(source) if source else None
    if own is None:
        return
    theirs = own.get_vocab()
    for token, i in sorted(tokens.items(), key=lambda item: item[1]):
        if i not in new and theirs.get(token) != i:
            raise ValueError(
                f"{key}: the tokenizer of {source} has {token!r} at {theirs.get(token, 'no id')}, data.tokenizer "
                f"at {i}; teacher, student and data must share one tokenizer."
            )


@dataclass
class ModelConfig:
    """Which model to train.

    Args:
        source: Folder or hub name of a checkpoint. A dense one is upcycled on the fly if `upcycle` is given; a
            Mixture-of-Experts is used as it is.
        upcycle: How to make a dense source sparse; null keeps it dense.
        config: Instead of a source: a Hugging Face config with its `model_type`, for a model with random weights.
        attn_implementation: Attention kernel, by its Hugging Face name.
    """

    source: str | None = None
    upcycle: UpcycleSpec | None = None
    config: dict[str, Any] | None = None
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = "sdpa"

    def hf_config(self, key: str, chat: Chat) -> PreTrainedConfig:
        """The config of the model to train. Reads no weights; `key` is this setting's name, for messages."""
        if (self.source is None) == (self.config is None):
            raise ValueError(f"{key} needs either a source (folder or hub name) or a config, not both or neither.")
        if self.config is not None:
            options = dict(self.config)
            if "model_type" not in options:
                raise ValueError(f"{key}.config needs a model_type, such as qwen3 or qwen3_moe.")
            size = 128 * math.ceil(len(chat.tokenizer) / 128)
            options.setdefault("vocab_size", size)
            config = AutoConfig.for_model(**options, eos_token_id=chat.end_id, pad_token_id=chat.pad_id)
        else:
            config = load_config(str(self.source), f"{key}.source")
        return moe_config(config, self.upcycle) if self.upcycle and not is_moe(config) else config

    def load(self, key: str, chat: Chat) -> PreTrainedModel:
        """The model with float32 weights, and rows for the chat's new markers."""
        options = {"attn_implementation": self.attn_implementation}
        if self.source is None:
            config = self.hf_config(key, chat)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        if self.upcycle and not is_moe(load_config(self.source, f"{key}.source")):
            model = load_upcycled(self.source, self.upcycle, dtype=torch.float32)
            model.set_attn_implementation(self.attn_implementation)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32, **options)
        start_rows(model, untrained_markers(self.source, chat))
        return model


@dataclass
class StudentConfig(ModelConfig):
    """The student: as `ModelConfig`, but a dense source is upcycled unless told otherwise."""

    upcycle: UpcycleSpec | None = field(default_factory=UpcycleSpec)
