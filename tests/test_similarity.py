"""CKA between checkpoints by torch-cka, against our own; the command's mistakes. A whole call: tests/test_report.py."""

import numpy as np
import pytest
import torch

from agri_moe import similarity
from agri_moe.losses import linear_cka
from agri_moe.metrics import CKAMatrix
from tests.test_cli import refused


def test_torch_cka_agrees_with_our_own_cka():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    xs = [x, x @ torch.randn(6, 20) + 100.0]  # far from the origin, as residual streams are
    ys = [x[:, :3] + torch.randn(64, 3), torch.randn(64, 9), x]
    whole = similarity.torch_cka_matrix(xs, ys, 64, ("x", "y"))
    expected = [[float(linear_cka(a.double(), b.double())) for b in ys] for a in xs]
    assert whole == pytest.approx(np.array(expected), abs=1e-5)
    metric = CKAMatrix(2, 3)
    for start in (0, 20, 40):  # the last four tokens fill no batch
        metric.update([a[start : start + 20] for a in xs], [b[start : start + 20] for b in ys])
    parts = similarity.torch_cka_matrix(xs, ys, 20, ("x", "y"))
    assert parts == pytest.approx(metric.compute().numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="y 0 gives the same for every token"):
        similarity.torch_cka_matrix(xs, [torch.ones(64, 2)], 64, ("x", "y"))


def test_load_by_group_counts_each_token_once_per_expert_chosen():
    segments = [2, 2, 3, 4, 4]
    rows = [similarity.Row([0] * 5, segments, group) for group in ("गेहूँ", "धान", "गेहूँ")]
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 2], [1, 2], [2, 1], [0, 2]])  # the last row is cut
    shares, names = similarity.load_by_group(similarity.Features([], [], [chosen], [3]), rows, experts=3)
    assert names == ["गेहूँ", "धान"]
    assert shares == pytest.approx(np.array([[[4 / 8, 2 / 8, 2 / 8], [0, 3 / 6, 3 / 6]]]))


def test_similarity_mistakes(capsys, no_models, corpus, dense, teacher, tmp_path):
    rows = corpus / "validation.parquet"
    asked = ["similarity", "--source", dense, "--target", teacher, "--output", tmp_path / "out", "--data", rows]
    assert "--batch_size is 3" in refused(capsys, *asked, "--batch_size", 3)
    assert "fewer than --tokens 100,000" in refused(capsys, *asked, "--tokens", 100_000)
    assert "row" in refused(capsys, *asked, "--group_by", "scenario.crop")
    assert "--target: /nowhere" in refused(capsys, *[a if a != teacher else "/nowhere" for a in asked])
