"""The pure parts of benchmarks/: what a cell changes, how results are summed up, the cut of a tokenizer."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny import SENTENCES, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.data.chat import DEFAULT_FORMAT, Chat

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablation
import ablation_table as table
import small_vocabulary as small

ROWS = [{"scenario": text, "thought": "भूरे धब्बे", "advisory": text} for text in SENTENCES[:2]]


def results(**cells: list[float]) -> dict[str, dict[int, dict[str, float]]]:
    return {cell: {seed: {"kl": value} for seed, value in enumerate(values)} for cell, values in cells.items()}


def test_a_cell_changes_the_base_term_by_term():
    assert ablation.objective("ce+kl") == ablation.BASE
    assert ablation.objective("reverse")["kl"] == {**ablation.BASE["kl"], "divergence": "reverse"}
    assert ablation.objective("+cka") == {**ablation.BASE, "cka": {"weight": 0.1}}
    assert len({json.dumps(ablation.objective(cell), sort_keys=True) for cell in ablation.CELLS}) == len(ablation.CELLS)


def test_a_finished_result_is_not_made_again(tmp_path):
    made = []

    def work():
        made.append(1)
        return {"kl": 0.5}

    first = ablation.remember(tmp_path, "cell", {"steps": 1}, work)
    assert ablation.remember(tmp_path, "cell", {"steps": 1}, work) == first
    assert len(made) == 1
    ablation.remember(tmp_path, "cell", {"steps": 2}, work)
    assert len(made) == 2

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablation.remember(tmp_path, "cell", {"steps": 3}, interrupted)
    assert len(list(tmp_path.iterdir())) == 2


def test_plateau_needs_a_fall_by_the_margin():
    assert not ablation.on_plateau([3.0], 1)
    assert not ablation.on_plateau([3.0, 2.0, 1.9], 2)
    assert ablation.on_plateau([3.0, 2.0, 2.1, 2.0 - ablation.MARGIN / 2], 2)
    assert not ablation.on_plateau([3.0, 2.0, 2.1, 2.0 - 2 * ablation.MARGIN], 2)


def test_spread_and_paired_difference_by_hand():
    found = results(**{"ce+kl": [1.0, 2.0, 4.0], "all": [0.5, 1.0, 3.0], "none": [3.0]})
    assert table.spread(found, "ce+kl", "kl") == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    assert table.paired(found, "all", "kl") == pytest.approx((-2.5 / 3, math.sqrt(1 / 12)))
    lone = table.paired(found, "none", "kl")
    assert lone is not None
    assert lone.mean == 2.0
    assert math.isnan(lone.deviation)
    assert table.paired(found, "all", "agreement") is None


def test_tables_and_plot_of_what_is_there(tmp_path):
    found = results(**{"teacher": [0.0], "start": [2.0, 2.1], "ce+kl": [1.0, 1.2], "all": [0.5]})
    text = table.tables(found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["ce+kl", "2", "1.1000 ± 0.1414"] in rows
    assert ["all", "1", "-0.5000"] in rows
    assert "agree" not in rows[0], "a measure that nobody has takes no column"
    table.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


# ---------------------------------------------------------------------- the small vocabulary


def test_pieces_are_followed_to_the_letters():
    merges = {"abc": ("ab", "c"), "ab": ("a", "b"), "xy": ("x", "y")}
    assert small.pieces(["abc", "z"], merges) == {"abc", "ab", "a", "b", "c", "z"}


@pytest.fixture
def cut(tmp_path):
    """A whole tokenizer, and what the rows need of it."""
    whole = write_tokenizer(tmp_path / "whole", vocab_size=420)
    kept = small.write_small_tokenizer(whole, tmp_path / "small", ROWS, DEFAULT_FORMAT)
    return Chat.load(str(whole)), Chat.load(str(tmp_path / "small")), kept


def test_rows_keep_their_tokens_under_new_ids(cut):
    whole, little, kept = cut
    assert len(little.tokenizer) == kept.kept < kept.whole == len(whole.tokenizer)
    seen: dict[int, int] = {}
    for row in ROWS:
        for old, new in zip(whole.encode(row).input_ids, little.encode(row).input_ids, strict=True):
            assert seen.setdefault(old, new) == new
            assert whole.tokenizer.convert_ids_to_tokens(old) == little.tokenizer.convert_ids_to_tokens(new)
    assert len(seen) == len(set(seen.values())) == kept.occurring, "one to one"
    assert set(kept.unseen) == set(little.tokenizer.get_vocab()) - set(
        little.tokenizer.convert_ids_to_tokens(list(seen.values()))
    )
    text = "ਹੋਰ ✓ text that stands in no row"
    assert little.tokenizer.decode(little.encode_text(text)) == text, "all bytes are kept"
    assert small.read_cut(Path(little.tokenizer.name_or_path)) == kept


def test_a_tokenizer_of_another_kind_is_refused():
    model = {"type": "Unigram", "merges": [], "vocab": {}}
    with pytest.raises(ValueError, match="cannot be cut down"):
        small.cut_tokenizer({"model": model, "added_tokens": []}, set())


def test_a_widened_model_is_the_same_function(cut, tmp_path):
    whole, little, kept = cut
    torch.manual_seed(0)
    shape = ablation.qwen3(64, 1, 32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, vocab_size=len(little.tokenizer)))
    model.save_pretrained(tmp_path / "narrow")
    little.save(tmp_path / "narrow")
    small.widen(tmp_path / "narrow", tmp_path / "wide", whole, 512, kept.unseen)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").eval()
    old, new = (torch.tensor([chat.encode(ROWS[0]).input_ids]) for chat in (whole, little))
    with torch.inference_mode():
        logits, expected = wide(old).logits, model.eval()(new).logits
    assert logits.shape[-1] == 512
    shared = {whole.tokenizer.convert_tokens_to_ids(t): i for t, i in little.tokenizer.get_vocab().items()}
    torch.testing.assert_close(logits[..., list(shared)], expected[..., list(shared.values())])
    others = [i for i in range(512) if i not in shared]
    mean = expected[..., little.tokenizer.convert_tokens_to_ids(kept.unseen)].mean(-1, keepdim=True)
    torch.testing.assert_close(logits[..., others], mean.expand(-1, -1, len(others)))
