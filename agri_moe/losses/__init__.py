"""The maths of the objective: tensors in, sums or scalars out. No configuration, no module, no logging.

Token losses are returned as *sums*: the caller divides once, by the tokens of the whole optimizer step, so that neither
accumulation nor sharding can change the gradient. CKA and the balance loss are statistics of a sample and come as they
are.
"""

from agri_moe.losses.attention import align_attention, attention_distance, attention_mass, uniform_head_map
from agri_moe.losses.cka import MinibatchHSIC, cka_from_hsic, cka_matrix, expert_similarity, linear_cka, minibatch_hsic
from agri_moe.losses.divergences import Divergence
from agri_moe.losses.hidden import hidden_distance
from agri_moe.losses.logits import (
    CHUNK_SIZE,
    LogitLoss,
    TokenStatistics,
    fused_ce_kl,
    log_probabilities,
    token_statistics,
)
from agri_moe.losses.merged import Merged
from agri_moe.losses.routing import Routing, balance_loss, max_violation, routing
from agri_moe.losses.sparse import SparseTeacher, entropy, most_probable, sampled_counts

__all__ = [
    "CHUNK_SIZE",
    "Divergence",
    "LogitLoss",
    "Merged",
    "MinibatchHSIC",
    "Routing",
    "SparseTeacher",
    "TokenStatistics",
    "align_attention",
    "attention_distance",
    "attention_mass",
    "balance_loss",
    "cka_from_hsic",
    "cka_matrix",
    "entropy",
    "expert_similarity",
    "fused_ce_kl",
    "hidden_distance",
    "linear_cka",
    "log_probabilities",
    "max_violation",
    "minibatch_hsic",
    "most_probable",
    "routing",
    "sampled_counts",
    "token_statistics",
    "uniform_head_map",
]
