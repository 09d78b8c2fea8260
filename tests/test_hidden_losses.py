"""hidden_distance against numpy and torch in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from agri_moe.losses import hidden_distance

DISTANCES = ["mse", "cosine"]


def features(tokens=7, width=5, seed=0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x.requires_grad_(), 3.0 * y


def by_numpy(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """Token by token, letter by letter."""
    a, b = (t.detach().double().numpy() for t in (x, y))
    if distance == "mse":
        return torch.tensor(
            [sum((u - v) ** 2 for u, v in zip(*r, strict=True)) / sum(r[1] ** 2) for r in zip(a, b, strict=True)]
        )
    return torch.tensor([1 - np.dot(u, v) / np.sqrt(np.dot(u, u) * np.dot(v, v)) for u, v in zip(a, b, strict=True)])


@pytest.mark.parametrize("distance", DISTANCES)
@given(tokens=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_values_equal_numpy(distance, tokens, width, seed):
    x, y = features(tokens, width, seed)
    ours = hidden_distance(x, y, distance)
    assert ours.shape == (tokens,)
    torch.testing.assert_close(ours.detach(), by_numpy(x, y, distance))


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_equal_torchs_own(distance):
    x, y = features()
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)  # an error in one token must not hide in the sum
    (ours,) = torch.autograd.grad((weights * hidden_distance(x, y, distance)).sum(), x)
    if distance == "mse":
        reference = F.mse_loss(x, y, reduction="none").mean(-1) / y.square().mean(-1)
    else:
        reference = 1 - F.cosine_similarity(x, y)
    torch.testing.assert_close(ours, torch.autograd.grad((weights * reference).sum(), x)[0])
    assert torch.autograd.gradcheck(lambda x: hidden_distance(x, y, distance), (x,))


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_other_model_is_a_constant(distance):
    x, y = features()
    y.requires_grad_()
    hidden_distance(x, y, distance).sum().backward()
    assert y.grad is None
    assert x.grad.abs().sum() > 0
    assert not hidden_distance(x.detach(), y, distance).requires_grad


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_hundredfold_residual_stream_scores_alike(distance):
    x, y = features()
    reference = hidden_distance(x, y, distance)
    for scale in (1e-3, 1e2):
        torch.testing.assert_close(hidden_distance(scale * x, scale * y, distance), reference)
    torch.testing.assert_close(hidden_distance(100 * x, y, "cosine"), hidden_distance(x, y, "cosine"))


def test_landmarks():
    y = torch.randn(64, 8)
    for distance in DISTANCES:
        torch.testing.assert_close(hidden_distance(y, y, distance), torch.zeros(64))
    torch.testing.assert_close(hidden_distance(torch.zeros_like(y), y, "mse").mean(), torch.tensor(1.0))
    torch.testing.assert_close(hidden_distance(-y, y, "cosine"), torch.full((64,), 2.0))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_bf16_inputs_are_compared_in_float32_whatever_autocast_says(distance, dtypes):
    x, y = features(tokens=40, width=64)
    x, y = x.detach().to(dtypes[0]).requires_grad_(), y.to(dtypes[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = hidden_distance(x, y, distance)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.detach().double(), by_numpy(x, y, distance), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, hidden_distance(x, y, distance))
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    assert gradient.dtype == dtypes[0]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_tokens_give_an_empty_tensor_with_a_graph(distance, dtype):
    x, y = features(tokens=0, dtype=dtype)
    ours = hidden_distance(x, y, distance)
    assert ours.shape == (0,)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ours.sum().backward()
    assert x.grad.shape == x.shape


def test_a_zero_vector_has_no_angle():
    x, y = features()
    with torch.no_grad():
        x[1] = y[2] = x[3] = y[3] = 0.0
    ours = hidden_distance(x, y, "cosine")
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    undefined = torch.tensor([False, True, True, True, False, False, False])
    assert not ours[undefined].any()
    assert not gradient[undefined].any()
    rest_x, rest_y = x.detach()[~undefined].requires_grad_(), y[~undefined]
    rest = hidden_distance(rest_x, rest_y, "cosine")
    torch.testing.assert_close(ours[~undefined], rest)
    torch.testing.assert_close(gradient[~undefined], torch.autograd.grad(rest.sum(), rest_x)[0])


def test_mse_of_a_silent_teacher_is_plain():
    x, y = features()
    ours = hidden_distance(x, torch.zeros_like(y), "mse")
    torch.testing.assert_close(ours, x.square().mean(-1))
    assert torch.autograd.grad(ours.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_angle_survives_any_scale(scale):
    x, y = features(dtype=torch.float32)
    expected = hidden_distance(x, y, "cosine")
    for a, b in ((scale, 1.0), (1.0, scale), (scale, scale)):
        scaled = (a * x).detach().requires_grad_()
        ours = hidden_distance(scaled, b * y, "cosine")
        torch.testing.assert_close(ours, expected)
        assert torch.autograd.grad(ours.sum(), scaled)[0].isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_misfits_are_refused(distance):
    x, y = features()
    for other in (y[:, :-1], y[:-1], y[:1], y[0]):
        with pytest.raises(ValueError, match="not of one shape"):
            hidden_distance(x, other, distance)
    with pytest.raises(ValueError, match="not of one shape"):
        hidden_distance(x[0], y[0], distance)
