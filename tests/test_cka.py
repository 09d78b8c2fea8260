"""CKA against its published values, its definition and another implementation."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agri_moe.losses import cka_matrix, linear_cka, minibatch_hsic

DATA = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def published_example() -> tuple[Tensor, Tensor]:
    np.random.seed(1337)
    x = np.random.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(np.random.randn(100, 10) + x)


def naive_unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, letter by letter."""
    n, k, l = len(x), x @ x.T, y @ y.T  # noqa: E741
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(n, dtype=x.dtype)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return ((k @ l).trace() + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize(("debiased", "published"), [(False, 0.55761), (True, 0.51346)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cka_published_oracle(debiased, published, dtype):
    x, y = (t.to(dtype) for t in published_example())
    wide = torch.cat([x, torch.zeros(100, 100, dtype=dtype)], 1)  # 100 <= 110 features: the Gram side
    for features in (x, wide):
        cka = linear_cka(features, y, debiased=debiased)
        assert cka.dtype == dtype
        assert cka.item() == pytest.approx(published, abs=6e-6)


@pytest.mark.skipif(not (DATA / "cka").is_dir(), reason=f"no CKA fixture under {DATA} (set AGRI_MOE_DATA)")
def test_cka_google_fixture():
    arrays = np.load(DATA / "cka" / "cka_fixture.npz")
    expected = json.loads((DATA / "cka" / "expected.json").read_text())["computed"]
    x, y = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["Y"])
    assert linear_cka(x, y, debiased=False).item() == pytest.approx(expected["linear_cka_features"], abs=1e-12)
    assert linear_cka(x, y).item() == pytest.approx(expected["debiased_linear_cka"], abs=1e-12)


@pytest.mark.parametrize(("n", "d", "e"), [(9, 4, 3), (9, 20, 3), (4, 8, 8), (30, 30, 5)])
def test_hsic_equals_its_definition_and_cka_its_gradient(n, d, e):
    torch.manual_seed(n)
    x = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    y = (torch.randn(n, e, dtype=torch.float64) + 5).requires_grad_()  # a mean, which HSIC must not see
    hsic = minibatch_hsic([x], [y])
    torch.testing.assert_close(hsic.cross_XY[0, 0], naive_unbiased_hsic(x, y))
    torch.testing.assert_close(hsic.self_X[0], naive_unbiased_hsic(x, x))
    for debiased in (True, False):
        assert torch.autograd.gradcheck(lambda x, y: linear_cka(x, y, debiased=debiased), (x, y))  # noqa: B023


def test_cka_sides_agree_and_ignore_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(50, 12), torch.randn(50, 7)
    y = y + x[:, :7]
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    padded = torch.cat([x, torch.zeros(50, 60)], 1)  # more features than samples: the other side
    for debiased in (True, False):
        reference = linear_cka(x, y, debiased=debiased)
        for changed in (x @ rotation, 1e-12 * x, 1e9 * x, x + 3.0, padded):
            torch.testing.assert_close(linear_cka(changed, y, debiased=debiased), reference, rtol=1e-4, atol=1e-5)
        assert linear_cka(x, x, debiased=debiased).item() == pytest.approx(1.0, abs=1e-5)


def test_cka_survives_a_massive_activation():
    # One token a thousand times the others: the sums of the textbook formula leave float32 nothing.
    torch.manual_seed(0)
    x, y = torch.randn(64, 96, dtype=torch.float64), torch.randn(64, 80, dtype=torch.float64)
    y[:, :80] += x[:, :80]
    x[3], y[3] = x[3] * 1e3, y[3] * 1e3
    exact = naive_unbiased_hsic(x, y) / (naive_unbiased_hsic(x, x) * naive_unbiased_hsic(y, y)).sqrt()
    torch.testing.assert_close(linear_cka(x.float(), y.float()), exact.float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 16])
@pytest.mark.parametrize("debiased", [True, False])
def test_cka_is_never_nan(dtype, width, n, debiased):
    torch.manual_seed(n)
    random = torch.randn(n, width, dtype=dtype)
    outlier = torch.full_like(random, 0.3)
    outlier[:1] += random[:1]
    for degenerate in (torch.zeros_like(random), torch.full_like(random, 3.3e4), outlier):
        x, y = degenerate.clone().requires_grad_(), random.clone().requires_grad_()
        cka = linear_cka(x, y, debiased=debiased)
        gradients = torch.autograd.grad(cka, (x, y))
        assert cka.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        if degenerate is not outlier or debiased or n < 2:
            assert cka == 0
            assert not any(gradient.any() for gradient in gradients)


def test_cka_ignores_autocast():
    torch.manual_seed(0)
    x, y = torch.randn(40, 64), torch.randn(40, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = linear_cka(x, y)
    assert torch.equal(under, linear_cka(x, y))


def test_cka_matrix_equals_its_entries():
    torch.manual_seed(0)
    base = torch.randn(30, 8)
    xs, ys = ([base @ torch.randn(8, d) + torch.randn(30, d) for d in widths] for widths in ((4, 40, 8), (6, 9)))
    for debiased in (True, False):
        entries = torch.stack([torch.stack([linear_cka(x, y, debiased=debiased) for y in ys]) for x in xs])
        torch.testing.assert_close(cka_matrix(xs, ys, debiased=debiased), entries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cka_matrix(xs, xs), cka_matrix(xs, list(xs)))
    with pytest.raises(ValueError, match="same N samples"):
        cka_matrix(xs, [ys[0][:-1]])
    with pytest.raises(ValueError, match="at least one"):
        cka_matrix([], ys)


def test_cka_matrix_equals_torch_cka():
    torch_cka = pytest.importorskip("torch_cka")
    torch.manual_seed(0)
    layers = ["0", "2"]
    models = [
        torch.nn.Sequential(torch.nn.Linear(6, w), torch.nn.Tanh(), torch.nn.Linear(w, 5)).double() for w in (7, 40)
    ]
    inputs = torch.randn(32, 6, dtype=torch.float64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs), batch_size=32)
    torch.set_default_dtype(torch.float64)  # its vector of ones takes the default dtype
    try:
        theirs = torch_cka.CKA(*models, "first", "second", layers, layers)
        theirs.compare(loader, loader)
        expected = theirs.export()["CKA"]
    finally:
        torch.set_default_dtype(torch.float32)
    features = [[model[:1](inputs).detach(), model(inputs).detach()] for model in models]
    torch.testing.assert_close(cka_matrix(*features), expected)
