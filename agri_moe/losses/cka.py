"""Linear CKA between sets of features of the same samples.

Shape legend: N samples, D and E widths, X and Y layers of two models.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Below this share of a Gram matrix's energy, what centring leaves is rounding. Measured in float32 on 4 to
# 512 samples: at most 1e-15 where all but one are equal, 7e-7 where one is a thousand times the others.
NEGLIGIBLE_ENERGY = 1e-11


class MinibatchHSIC(NamedTuple):
    """Hilbert-Schmidt independence criteria of one sample: between all pairs, and of each with itself."""

    cross_XY: Tensor
    self_X: Tensor
    self_Y: Tensor


def linear_cka(x_ND: Tensor, y_NE: Tensor, *, debiased: bool = True) -> Tensor:
    """Linear centred kernel alignment of two sets of features of the same N samples; differentiable.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with linear kernels (Kornblith et al. 2019, eq. 1).
    Debiased takes the unbiased HSIC of Song et al. 2012 (eq. 3 of Nguyen, Raghu & Kornblith 2021), whose
    expectation is 0 for independent features however few the samples; it may be slightly negative.

    Args:
        x_ND: [N, D] finite features, any floating dtype and scale.
        y_NE: [N, E] features of the same samples.
        debiased: the unbiased estimator, which needs at least 4 samples; the plain one needs 2.

    Returns:
        A scalar in float32 (float64 where either input is). With too few samples, or where one input is
        constant over the samples (for the debiased estimator: constant but for one of them), CKA is 0/0; it
        is *defined* as 0 with a zero gradient. Never NaN for finite inputs. Autocast is off inside.
    """
    return cka_matrix([x_ND], [y_NE], debiased=debiased)[0, 0]


def cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor], *, debiased: bool = True) -> Tensor:
    """`linear_cka` of every x with every y, [len(xs), len(ys)]; each Gram matrix is computed once.

    All features are of the same N samples, their widths may differ. Pass one list twice for the matrix of a
    model with itself. Raises ValueError where there is nothing to compare or the samples do not match.
    """
    with torch.autocast(_device_type(xs, ys), enabled=False):
        features_X = [_unit(x) for x in _centred(xs)]
        features_Y = features_X if ys is xs else [_unit(y) for y in _centred(ys)]
        return cka_from_hsic(_hsic(features_X, features_Y, debiased))


def expert_similarity(outputs_ESD: Tensor) -> Tensor:
    """Mean off-diagonal debiased linear CKA between the outputs of E experts for the same S tokens, a scalar.

    1 where all experts span the same function (as copies do, whose gradient is exactly 0: the maximum is flat), 0 for
    unrelated ones or a single one. An expert that gives a constant counts as unrelated to all others.
    """
    experts = len(outputs_ESD)
    matrix_EE = cka_matrix(outputs := list(outputs_ESD.unbind()), outputs)
    off_diagonal = matrix_EE.sum() - matrix_EE.diagonal().sum()
    return off_diagonal / max(experts * (experts - 1), 1)


def cka_from_hsic(hsic: MinibatchHSIC) -> Tensor:
    """[X, Y] CKA: cross / sqrt(self self), defined as 0 (with zero gradient) where a self term is 0."""
    defined_X, defined_Y = hsic.self_X > 0, hsic.self_Y > 0
    # Where undefined, the root is taken of 1: masking its result alone would let through a NaN gradient.
    norm_X = hsic.self_X.where(defined_X, 1.0).sqrt()
    norm_Y = hsic.self_Y.where(defined_Y, 1.0).sqrt()
    cka_XY = hsic.cross_XY / norm_X[:, None] / norm_Y[None, :]
    return cka_XY.where(defined_X[:, None] & defined_Y[None, :], 0.0)


def minibatch_hsic(xs: Sequence[Tensor], ys: Sequence[Tensor], *, debiased: bool = True) -> MinibatchHSIC:
    """Linear HSIC of one minibatch, in the units of the features, to be averaged over minibatches.

    Debiased: HSIC_1 of Nguyen, Raghu & Kornblith 2021, eq. 3; plain: tr(KHLH) / (N - 1)^2. All zeros with
    fewer samples than the estimator needs (4 and 2). Arguments as in `cka_matrix`.
    """
    with torch.autocast(_device_type(xs, ys), enabled=False):
        features_X = _centred(xs)
        return _hsic(features_X, features_X if ys is xs else _centred(ys), debiased)


def _device_type(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> str:
    if not xs or not ys:
        raise ValueError("CKA needs at least one set of features on either side")
    if any(f.ndim != 2 or len(f) != len(xs[0]) for f in (*xs, *ys)):
        shapes = [[tuple(f.shape) for f in side] for side in (xs, ys)]
        raise ValueError(f"CKA needs [N, D] features of the same N samples, got {shapes[0]} and {shapes[1]}")
    return xs[0].device.type


def _centred(features: Sequence[Tensor]) -> list[Tensor]:
    """Subtract the mean over samples, in float32 at least; what is only the mean's rounding becomes zero."""
    centred = []
    for x_ND in features:
        x_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
        residue_ND = x_ND - x_ND.mean(0, keepdim=True) if len(x_ND) else x_ND
        floor = 32 * torch.finfo(x_ND.dtype).eps * torch.linalg.vector_norm(x_ND.detach())
        constant = torch.linalg.vector_norm(residue_ND.detach()) <= floor
        centred.append(residue_ND.masked_fill(constant, 0.0))
    return centred


def _unit(x_ND: Tensor) -> Tensor:
    """Scale to Frobenius norm 1: CKA does not see it, and squares of squares stay inside float32's range.

    The norm is a constant to autograd; the gradient of a function that ignores scale is the same with it.
    """
    norm = torch.linalg.vector_norm(x_ND.detach())
    return x_ND / norm.where(norm > 0, 1.0)


def _hsic(xs: list[Tensor], ys: list[Tensor], debiased: bool) -> MinibatchHSIC:
    """HSIC of centred features, on the Gram side [N, N] or the feature side [D, E], whichever is smaller."""
    n = len(xs[0])
    dtype = torch.float64 if torch.float64 in {f.dtype for f in (*xs, *ys)} else torch.float32
    if n < (4 if debiased else 2):
        nothing = sum((f.to(dtype).sum() * 0.0 for f in (*xs, *ys)), torch.zeros((), device=xs[0].device))
        return MinibatchHSIC(*(nothing.to(dtype).expand(s) for s in ((len(xs), len(ys)), len(xs), len(ys))))
    # Apple's GPUs have no float64, which the feature side needs.
    gram = n <= max(f.shape[1] for f in (*xs, *ys)) or xs[0].device.type == "mps"
    side = _gram_side if gram else _feature_side
    return MinibatchHSIC(*(part.to(dtype) for part in side(xs, ys, debiased, dtype)))


def _gram_side(xs: list[Tensor], ys: list[Tensor], debiased: bool, dtype: torch.dtype) -> MinibatchHSIC:
    """HSIC as inner products of flattened Gram matrices.

    The unbiased HSIC is the inner product of U-centred matrices (Szekely & Rizzo 2014) over N (N - 3). They
    are formed explicitly: in the usual formula of traces and sums, one row with a massive activation leaves
    nothing of the others in float32.
    """
    n = len(xs[0])
    scale = n * (n - 3) if debiased else (n - 1) ** 2

    def flat(features: list[Tensor]) -> Tensor:
        grams = [x_ND.to(dtype) @ x_ND.to(dtype).T for x_ND in features]
        return torch.stack([(_u_centred(k_NN) if debiased else k_NN).flatten() for k_NN in grams])

    x_XS = flat(xs)
    y_YS = x_XS if ys is xs else flat(ys)
    return MinibatchHSIC(x_XS @ y_YS.T / scale, x_XS.square().sum(-1) / scale, y_YS.square().sum(-1) / scale)


def _u_centred(k_NN: Tensor) -> Tensor:
    """U-centre a Gram matrix, diagonal left out; exactly zero where only rounding would be left."""
    n = len(k_NN)
    off_NN = k_NN - torch.diag(k_NN.diagonal())
    row_N = off_NN.sum(1)
    centred_NN = off_NN - (row_N[:, None] + row_N[None, :]) / (n - 2) + row_N.sum() / ((n - 1) * (n - 2))
    centred_NN = centred_NN - torch.diag(centred_NN.diagonal())
    energy, before = centred_NN.detach().square().sum(), k_NN.detach().square().sum()
    return centred_NN.masked_fill(energy <= NEGLIGIBLE_ENERGY * before, 0.0)


def _feature_side(xs: list[Tensor], ys: list[Tensor], debiased: bool, dtype: torch.dtype) -> MinibatchHSIC:
    """HSIC from [D, E] products, in float64: narrow features make it cheap, and the debiased form cancels.

    With centred features the sums of the Gram matrices vanish, and the unbiased HSIC times N (N - 3) is
    |X^T Y|^2 - N / (N - 2) sum_i |x_i|^2 |y_i|^2 + |X|^2 |Y|^2 / ((N - 1) (N - 2)).
    """
    n = len(xs[0])

    def pair(x_ND: Tensor, y_NE: Tensor) -> tuple[Tensor, Tensor]:
        plain = (x_ND.T @ y_NE).square().sum()
        if not debiased:
            return plain / (n - 1) ** 2, plain
        x_N, y_N = x_ND.square().sum(1), y_NE.square().sum(1)
        value = plain - n / (n - 2) * (x_N * y_N).sum() + x_N.sum() * y_N.sum() / ((n - 1) * (n - 2))
        return value / (n * (n - 3)), plain

    def alone(features: list[Tensor]) -> Tensor:
        pairs = [pair(x_ND, x_ND) for x_ND in features]
        return torch.stack([v.masked_fill(v * n**2 <= NEGLIGIBLE_ENERGY * plain, 0.0) for v, plain in pairs])

    def recentred(features: list[Tensor]) -> list[Tensor]:
        # Float32 centring leaves a mean of 1e-8, to which this form, unlike the Gram side's, is not blind.
        return [x_ND.double() - x_ND.double().mean(0, keepdim=True) for x_ND in features]

    xs64 = recentred(xs)
    ys64 = xs64 if ys is xs else recentred(ys)
    cross_XY = torch.stack([torch.stack([pair(x_ND, y_NE)[0] for y_NE in ys64]) for x_ND in xs64])
    self_X = alone(xs64)
    return MinibatchHSIC(cross_XY, self_X, self_X if ys is xs else alone(ys64))
