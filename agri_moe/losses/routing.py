"""What routers did with a micro-batch, and the loss that keeps their load even.

Shape legend: N tokens, E experts, K experts per token, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What the routers of all layers did with the valid tokens of a micro-batch."""

    load_LE: Tensor  # detached float32: assignments that each expert worked on; tokens * K in all, if none was dropped
    wanted_LE: Tensor  # detached float32: assignments as the logits alone would make them; tokens * K in all
    probability_LE: Tensor  # with gradient: mean router probability P_e; zeros where no token is valid
    entropy_L: Tensor  # detached, nats: sum over tokens of the router's entropy
    z_sum: Tensor  # scalar with gradient: sum over tokens, mean over layers, of logsumexp(logits)^2
    tokens: Tensor  # 0-d float32: valid tokens


def routing(router_logits: Sequence[Tensor], top_k: int, valid_N: Tensor, load_LE: Tensor | None = None) -> Routing:
    """Summarise the router logits of one forward pass, in float32 and without waiting for the device.

    Args:
        router_logits: one [N, E] tensor per layer, any floating dtype, the same E in all of them: over the routers'
            temperature, without noise and without what else goes into the choice only.
        top_k: experts per token K; the K most probable ones (transformers' choice: by the float32 softmax).
        valid_N: [N] bool; tokens where it is False (padding) count in nothing, whatever their logits.
        load_LE: what the experts really worked on, where something else than the logits had a say in it.

    Returns:
        A `Routing`. `z_sum` is ST-MoE's router z-loss (Zoph et al. 2022, eq. 5) before its division by the
        tokens, averaged over layers. Counts are exact up to 2^24 assignments per expert.

    Raises:
        ValueError: no layers, layers of unequal shape, top_k outside 1..E, or a mask that does not fit.
    """
    if not router_logits:
        raise ValueError("no router logits: is the model an MoE, and were its router logits asked for?")
    shapes = {tuple(logits.shape) for logits in router_logits}
    if len(shapes) != 1 or router_logits[0].ndim != 2 or valid_N.shape != router_logits[0].shape[:1]:
        raise ValueError(f"router logits {sorted(shapes)} and mask {tuple(valid_N.shape)} are not [N, E] and [N]")
    if not 1 <= top_k <= router_logits[0].shape[1]:
        raise ValueError(f"top_k {top_k} is not between 1 and {router_logits[0].shape[1]} experts")
    valid_N1 = valid_N.bool()[:, None]
    with torch.autocast(valid_N.device.type, enabled=False):
        # Filled, not multiplied: a NaN in padding times zero is still NaN.
        logits_LNE = torch.stack([logits.float() for logits in router_logits]).masked_fill(~valid_N1, 0.0)
        weight_N1 = valid_N1.float()
        tokens = weight_N1.sum()
        log_p_LNE = logits_LNE.log_softmax(-1)
        p_LNE = log_p_LNE.exp()
        chosen_LNK = logits_LNE.detach().softmax(-1).topk(top_k, dim=-1).indices
        wanted_LNE = torch.zeros_like(p_LNE, requires_grad=False).scatter_(2, chosen_LNK, 1.0)
        wanted_LE = (wanted_LNE * weight_N1).sum(1)
        return Routing(
            load_LE=wanted_LE if load_LE is None else load_LE,
            wanted_LE=wanted_LE,
            probability_LE=(p_LNE * weight_N1).sum(1) / tokens.clamp(min=1.0),
            entropy_L=-(p_LNE * log_p_LNE * weight_N1).detach().sum((1, 2)),
            z_sum=(logits_LNE.logsumexp(-1).square() * weight_N1.T).sum(1).mean(),
            tokens=tokens,
        )


def balance_loss(routing: Routing) -> Tensor:
    """Switch Transformer's load-balancing loss of each layer, [L] (Fedus et al. 2021, eq. 4 to 6).

    E sum_e f_e P_e, with f_e the share of the layer's N K assignments that the logits give expert e and P_e its mean
    router probability: 1 at balance, up to E when collapsed (it is no lower bound: f and P may disagree).
    transformers' `load_balancing_loss_func` is K times this, and pools the layers, so that two layers
    collapsed on different experts look balanced; here each layer answers for itself. 0, with a graph, where
    no token is valid.

    Where noise, a bias or a capacity changes who works, f is still what the router asks for (as in DeepSeek-V3,
    arXiv:2412.19437, eq. 18): of a load that others keep even it could learn nothing.
    """
    share_LE = routing.wanted_LE / routing.wanted_LE.sum(-1, keepdim=True).clamp(min=1.0)
    return routing.wanted_LE.shape[-1] * (share_LE * routing.probability_LE).sum(-1)


def max_violation(load_LE: Tensor) -> Tensor:
    """How far the busiest expert is above the mean load, over the mean: MaxVio of Wang et al. 2024 (arXiv:2408.15664).

    Args:
        load_LE: Assignments per expert.

    Returns:
        The mean over layers, 0-d: 0 at balance, E / K - 1 when collapsed; 0 where there is no load.
    """
    mean_L = load_LE.mean(-1)
    return ((load_LE.amax(-1) - mean_L) / mean_L.where(mean_L > 0, 1.0)).mean()
