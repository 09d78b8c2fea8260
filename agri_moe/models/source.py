"""Which model a setting names, and what stands in its folder.

Everything here up to `ModelConfig.load` reads configs and tokenizers only, so that a mistake is found before weights.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
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
from agri_moe.models.causal import grow, start_rows
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.sharding import draw, materialise
from agri_moe.models.upcycle import (
    Placed,
    UpcycleSpec,
    fill,
    is_moe,
    load_upcycled,
    moe_config,
    stored_placed,
    unreadable,
    upcycled_placed,
)
from agri_moe.trained import load_pretrained


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model; None if its folder has none."""
    if cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def untrained_tokens(source: str, chat: Chat) -> dict[int, list[int]]:
    """The markers and merged tokens that the model in `source` never learned: id -> ids of the plain-text pieces.

    One that stands in the model's own tokenizer was learned. Where the folder has no tokenizer, those markers count as
    new that the data's tokenizer lacked before they were added.

    Raises:
        ValueError: If there are merged tokens, and no tokenizer to tell whether the model has learned them.
    """
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        if chat.merged:
            raise ValueError(
                f"{source} has no tokenizer.json, so that nobody knows whether it has learned the merged tokens of "
                "data.tokenizer: put the model's own tokenizer in its folder."
            )
        return chat.new_marker_pieces
    known = tokenizer.get_vocab()
    return {
        token: pieces
        for token, pieces in chat.untrained_pieces.items()
        if chat.tokenizer.convert_ids_to_tokens(token) not in known
    }


def check_vocabulary(source: str | None, config: PreTrainedConfig, chat: Chat, key: str) -> None:
    """Check that a model reads the token ids that the data is made of.

    Raises:
        ValueError: If its matrix is too small, or its own tokenizer gives a token another id.
    """
    tokens = chat.tokenizer.get_vocab()
    new = set(untrained_tokens(source, chat) if source else chat.new_marker_pieces)
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

    def load(
        self, key: str, chat: Chat, dtype: torch.dtype = torch.float32, quantization: Any = None
    ) -> PreTrainedModel:
        """The model, whole, with rows for the chat's new tokens; `quantization` is for one that is not trained."""
        attention = self.attn_implementation
        if self.source is None:
            config = self.hf_config(key, chat)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if self._upcycles(key):
            assert self.upcycle is not None, "it upcycles"
            model = load_upcycled(self.source, self.upcycle, dtype=dtype)
            model.set_attn_implementation(attention)
        else:
            model = load_pretrained(self.source, dtype, quantization, attn_implementation=attention)
        start_rows(model, untrained_tokens(self.source, chat), chat.merged)
        return model

    def in_pieces(self, key: str, chat: Chat, dtype: torch.dtype = torch.float32) -> "Pieces | None":
        """The same model for ranks that hold a piece of it each; None, and a warning, where only `load` can read it."""
        config = self.hf_config(key, chat)
        if self.source is None:
            return Pieces(config, dtype, self.attn_implementation)
        new_rows = untrained_tokens(self.source, chat)
        if self._upcycles(key):
            assert self.upcycle is not None, "it upcycles"
            tensors = partial(upcycled_placed, self.source, self.upcycle)
        elif (reason := unreadable(self.source)) is None:
            tensors = partial(stored_placed, self.source)
        else:
            rank_zero_warn(
                f"{key}: {self.source} cannot be read piece by piece, because {reason}; every rank reads all of it."
            )
            return None
        return Pieces(config, dtype, self.attn_implementation, tensors, new_rows, frozenset(chat.merged))

    def _upcycles(self, key: str) -> bool:
        return self.upcycle is not None and not is_moe(load_config(str(self.source), f"{key}.source"))


@dataclass(frozen=True)
class Pieces:
    """A model that no rank ever holds whole: first its shape, which is cut, then each rank's piece of every value.

    Args:
        config: Of the model.
        dtype: Of its weights.
        attn_implementation: Attention kernel.
        tensors: Gives its weights; None draws them at random, as transformers does.
        new_rows: Markers and merged tokens that it never learned, with their pieces.
        merged: Ids of the latter.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    attn_implementation: str
    tensors: Callable[[], Iterator[Placed]] | None = None
    new_rows: dict[int, list[int]] = field(default_factory=dict)
    merged: frozenset[int] = frozenset()

    def shape(self) -> PreTrainedModel:
        """The model on the meta device."""
        config = copy.deepcopy(self.config)  # which becomes the model's own, and may grow
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation=self.attn_implementation
            )
            grow(hf, self.new_rows)
        return hf

    def fill(self, hf: PreTrainedModel, device: torch.device) -> None:
        """Give what `shape` returned its values, once it is sharded; every rank must call this.

        Memory: this rank's pieces, and the tensors of one layer's experts or one matrix.
        """
        materialise(hf, device)
        if self.tensors is None:
            hf.apply(partial(draw, hf))
            return
        fill(hf, self.tensors())
        start_rows(hf, self.new_rows, self.merged, stored=self.config.vocab_size)


@dataclass
class StudentConfig(ModelConfig):
    """The student: as `ModelConfig`, but a dense source is upcycled unless told otherwise."""

    upcycle: UpcycleSpec | None = field(default_factory=UpcycleSpec)
