"""benchmarks/hindi_tokens.py and hindi_words.py: what is compared is right. Nothing here is trained or timed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import real_data

from agri_moe.cli import main
from agri_moe.data.chat import Chat
from agri_moe.models.source import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import hindi_tokens
import hindi_words
from ablation import result_file
from hindi_tokens import CACHED, RATES, Hindi, Setting


@pytest.fixture
def hindi(tmp_path):
    real_data()
    return Hindi(Setting(), tmp_path)


def finish(hindi, tokenizer, arm, rate, seed, **numbers):
    config = hindi.config(tokenizer, arm, rate, seed)
    path = result_file(hindi.output, hindi_tokens.cell_name(tokenizer, arm, rate, seed), config)
    numbers = {"cpu_seconds_per_mb": 10.0, "cpu_seconds_per_advisory": 1.0, "tokens_per_advisory": 9} | numbers
    path.write_text(json.dumps({"config": config, "result": numbers | {"peak_mb": 1.0}}))


def test_the_students_learn_no_held_out_text(hindi):
    parts = {part: hindi_tokens.rows_of(part) for part in hindi_tokens.PARTS}
    texts = {part: {text for row in rows for text in row.values()} for part, rows in parts.items()}
    assert not texts["validation"] & (texts["first"] | texts["second"])
    for rows in parts.values():
        assert len(rows) > 80
        assert all(row["scenario"] and row["advisory"] for row in rows)


def test_the_rate_is_chosen_on_seed_0_and_compared_seed_by_seed(hindi, monkeypatch):
    monkeypatch.setattr(Hindi, "before", lambda self, tokenizer: 2.0)
    for tokenizer, best in (("qwen", 0), ("free_rows", 1)):
        for i, rate in enumerate(RATES):
            assert hindi.rate(tokenizer, "ce+kl") is None, "before all have been tried"
            loss = 1.0 if i == best else 1.5
            finish(hindi, tokenizer, CACHED, rate, 0, **{"val/bits_per_byte": loss})
        assert hindi.rate(tokenizer, "ce+kl") == hindi.rate(tokenizer, CACHED) == RATES[best]
    finish(hindi, "qwen", CACHED, RATES[1], 1, **{"val/bits_per_byte": 0.1})
    finish(hindi, "qwen", CACHED, RATES[0], 1, **{"val/bits_per_byte": 2.0})
    faster = {"val/bits_per_byte": 1.8, "cpu_seconds_per_mb": 5.0}
    finish(hindi, "free_rows", CACHED, RATES[1], 1, **faster)
    assert hindi.rate("qwen", CACHED) == RATES[0], "no other seed has a part in it"
    table = hindi_tokens.table(hindi, hindi.results(2))
    (row,) = [line for line in table.splitlines() if line.startswith("| free_rows")]
    assert "-5.0 ± 7.1 %" in row, "0 and -10"
    assert "1.50 ± 0.71x" in row, "once as fast, once twice"


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_restart_as_told(tied, tmp_path, corpus, dense):
    source, rows = str(corpus / "tokenizer"), str(corpus / "train.parquet")
    main(["tokens", "--source", source, "--input", rows, "--pieces", "20", "--output", str(tmp_path / "extended")])
    chat = Chat.load(str(tmp_path / "extended"))
    model = ModelConfig(str(dense)).load("source", chat)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = tied
    matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    mean = [weight.detach().clone() for weight in matrices]
    token, pieces = max(chat.merged.items(), key=lambda item: len(item[1]))
    hindi_tokens.restart(model, chat, float("inf"), float("-inf"))
    assert torch.equal(matrices[0][token], mean[0][pieces[-1]])
    assert torch.equal(matrices[1][token], mean[1][pieces[-1 if tied else 0]])
    hindi_tokens.restart(model, chat, 0.0, -1.0)
    torch.testing.assert_close(matrices[0][token], mean[0][list(pieces)].mean(0))
    weights = torch.exp(-torch.arange(len(pieces), dtype=torch.float32))
    expected = (weights @ mean[1][list(pieces)]) / weights.sum()
    torch.testing.assert_close(matrices[1][token], mean[1][list(pieces)].mean(0) if tied else expected)


def test_halves_share_no_line():
    learned, counted = hindi_words.halves([f"पंक्ति {i % 70}" for i in range(100)])
    assert len(learned) + len(counted) == 70
    assert not set(learned) & set(counted)
