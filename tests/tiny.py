"""A tokenizer in Qwen3's form, small enough to train in a test, and the place of the real one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>"]  # as in Qwen3: added, but not marked special
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = [
    "धान की पत्तियों पर भूरे धब्बे दिख रहे हैं।",
    "गेहूँ में पीला रतुआ: मैंकोज़ेब का छिड़काव करें।",
    "The leaves turn yellow.\n\nSpray 2 g per litre.",
    "फसल: चना\nअवस्था: फूल\nमौसम: बादल\n\n",
]


def write_tokenizer(folder: Path, vocab_size: int = 420, metaspace: bool = False) -> Path:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    alphabet: list[str] = []
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.NFC()
        split: Any = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


def real_data() -> Path:
    """The folder of real rows, or a skip that says why."""
    folder = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "qwen3-0.6b" / "tokenizer.json").is_file():
        pytest.skip(f"no real rows and Qwen3 tokenizer at {folder}: set AGRI_MOE_DATA")
    return folder
