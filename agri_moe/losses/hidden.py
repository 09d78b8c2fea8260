"""Distance between hidden states of two models, token by token.

Shape legend: S tokens, E width of the other model.
"""

from typing import Literal

import torch
from torch import Tensor


def hidden_distance(x_SE: Tensor, y_SE: Tensor, distance: Literal["mse", "cosine"]) -> Tensor:
    """Distance of x from y for each token, [S], in float32 (float64 where either is); the gradient goes to x alone.

    - `mse`: mean over the width of (x - y)^2, over the mean square of y (Romero et al. 2015, eq. 3, but for that
      divisor). Residual streams grow a hundredfold with depth, and a few tokens carry massive activations: without it
      the last layers and those tokens would be all that counts, and the weight of the term would depend on the
      teacher. It is the token's own, so that the term stays a sum over tokens. Where y is zero, nothing is divided.
    - `cosine`: 1 - cos(x, y), as in DistilBERT (Sanh et al. 2019); 0, with zero gradient, where either vector is zero.

    Args:
        x_SE: [S, E] the student's, already projected to the other's width.
        y_SE: [S, E] the other model's.
        distance: Which one.

    Raises:
        ValueError: Shapes that differ.
    """
    if x_SE.shape != y_SE.shape or x_SE.ndim != 2:
        raise ValueError(f"hidden states {tuple(x_SE.shape)} and {tuple(y_SE.shape)} are not of one shape [S, E]")
    with torch.autocast(x_SE.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (x_SE.dtype, y_SE.dtype) else torch.float32
        x_SE, y_SE = x_SE.to(dtype), y_SE.detach().to(dtype)
        if distance == "mse":
            power_S = y_SE.square().mean(-1)
            return (x_SE - y_SE).square().mean(-1) / power_S.where(power_S > 0, 1.0)
        defined_S1 = ((x_SE.detach() != 0).any(-1) & (y_SE != 0).any(-1))[:, None]
        # Where undefined, the cosine is taken of ones: masking its result alone would let through a NaN gradient.
        x_SE, y_SE = x_SE.where(defined_S1, 1.0), y_SE.where(defined_S1, 1.0)
        cosine_S = (_unit(x_SE) * _unit(y_SE)).sum(-1)
        return (1.0 - cosine_S) * defined_S1[:, 0]


def _unit(x_SE: Tensor) -> Tensor:
    # By the largest entry first: squares of massive activations, or of tiny ones, leave float32's range.
    x_SE = x_SE / x_SE.detach().abs().amax(-1, keepdim=True)
    return x_SE / torch.linalg.vector_norm(x_SE, dim=-1, keepdim=True)
