"""The maths of the objective: tensors in, sums or scalars out. No configuration, no module, no logging.

Token losses are returned as *sums*: the caller divides once, by the tokens of the whole optimizer step, so that neither
accumulation nor sharding can change the gradient. CKA and the balance loss are statistics of a sample and come as they
are.
"""

from agri_moe.losses.cka import MinibatchHSIC, cka_from_hsic, cka_matrix, linear_cka, minibatch_hsic
from agri_moe.losses.logits import CHUNK_SIZE, LogitLoss, TokenStatistics, fused_ce_kl, token_statistics
from agri_moe.losses.routing import Routing, balance_loss, routing

__all__ = [
    "CHUNK_SIZE",
    "LogitLoss",
    "MinibatchHSIC",
    "Routing",
    "TokenStatistics",
    "balance_loss",
    "cka_from_hsic",
    "cka_matrix",
    "fused_ce_kl",
    "linear_cka",
    "minibatch_hsic",
    "routing",
    "token_statistics",
]
