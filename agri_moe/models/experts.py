"""The experts' products in the type that autocast asks for, and how often a token meets a parameter."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from agri_moe.models.shared_core import CORE

AUTOCAST = "autocast_grouped_mm"


def follow_autocast(hf: PreTrainedModel) -> None:
    """Let a model's experts, where they run by grouped products, run in autocast's type; in place.

    Autocast does not know `grouped_mm`, and transformers gives it the type of the weights: under bf16-mixed the
    experts, most of a sparse model, would run in float32, several times slower.

    Args:
        hf: Any model; without experts nothing changes.
    """
    if hf.config._experts_implementation == "grouped_mm":
        hf.config._experts_implementation = AUTOCAST


class _InType:
    """Experts whose weights are read in another type."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def _forward(experts: Any, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """[N, D] in the type that a linear layer would answer in."""
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        experts, hidden_ND = _InType(experts, dtype), hidden_ND.to(dtype)
    return grouped_mm_experts_forward(experts, hidden_ND, experts_NK, weights_NK)


ALL_EXPERTS_FUNCTIONS.register(AUTOCAST, _forward)


def visits(name: str, top_k: int, num_experts: int) -> float:
    """How often, on average, one token is multiplied with a parameter.

    Args:
        name: The parameter's Hugging Face name.
        top_k: Experts that a token visits; 0 for a dense model.
        num_experts: Experts per layer.
    """
    if ".experts." not in name:
        return 1.0
    return float(top_k) if f".{CORE}." in name else top_k / num_experts
