"""The terms of the loss and their settings; a term with weight 0 is not computed.

A weight is a number or a schedule. Which positions a term sees, and what its sum is divided by, stands in
`objective.py`; its maths in `losses/`.
"""

from dataclasses import dataclass, field
from typing import Literal

from agri_moe.layer_map import LayerMap
from agri_moe.losses import Divergence
from agri_moe.schedules import LayerWeights, Temperature, Value

SegmentName = Literal["system", "user", "thought", "assistant"]


def _answer() -> list[SegmentName]:
    return ["thought", "assistant"]


def _advisory() -> list[SegmentName]:
    return ["assistant"]


@dataclass
class CrossEntropy:
    """Next-token cross-entropy on the student's whole vocabulary.

    Args:
        weight: A number or a schedule; 0 is off.
        label_smoothing: Share of the target mass spread evenly over the vocabulary, as in `torch.nn.functional`.
        segments: Segments whose tokens are learned; the other terms choose among these.
        thought_weight: Factor on the tokens of the thought; the term is the weighted mean. A schedule from 0 to 1
            fades the thought in.
    """

    weight: Value = 1.0
    label_smoothing: float = 0.0
    segments: list[SegmentName] = field(default_factory=_answer)
    thought_weight: Value = 1.0


@dataclass
class KL:
    """T^2 times a divergence between teacher and student, both renormalised over the vocabulary that they share.

    Not taken where the next token is a marker or the end of text, which the teacher never learned to place, nor where
    the teacher's view of the row has no such token.

    Args:
        weight: A number or a schedule; 0 is off.
        temperature: Softens both distributions; a number, a schedule, or adaptive.
        divergence: `forward` KL(teacher || student) (Hinton et al. 2015), `reverse` KL(student || teacher) (Gu et al.
            2024), or `jsd`, the generalised Jensen-Shannon divergence (Agarwal et al. 2024).
        beta: Of `jsd`: the teacher's share of the mixture; near 0 it acts like forward KL, near 1 like reverse.
        segments: Segments whose tokens are compared. By default the advisory only: the student's thoughts are its own.
    """

    weight: Value = 0.0
    temperature: Temperature = 1.0
    divergence: Divergence = "forward"
    beta: float = 0.5
    segments: list[SegmentName] = field(default_factory=_advisory)


@dataclass
class CKA:
    """1 - linear CKA between residual streams, mean over the mapped layers (Kornblith et al. 2019).

    Args:
        weight: A number or a schedule; 0 is off.
        sample_tokens: At most so many tokens of the micro-batch are compared; more cost time and memory, fewer make
            the statistic noisy.
        debiased: The unbiased estimator; the plain one is high for few tokens, whatever the features.
        segments: Segments that the sampled tokens predict; by default all that cross-entropy learns.
        layers: Which layers are compared: uniform, last, progressive, or a list of pairs [student, other].
        layer_weights: equal, progressive (first layers first), or balanced by each layer's running loss.
    """

    weight: Value = 0.0
    sample_tokens: int = 512
    debiased: bool = True
    segments: list[SegmentName] | None = None
    layers: LayerMap = "uniform"
    layer_weights: LayerWeights = "equal"


@dataclass
class Hidden:
    """Distance between residual streams, token by token (Romero et al. 2015); widths that differ are projected.

    Args:
        weight: A number or a schedule; 0 is off.
        distance: `mse`, over the mean square of the teacher's token; or `cosine`, 1 - cos.
        sample_tokens: At most so many tokens of the micro-batch are compared.
        segments: Segments that the sampled tokens predict; by default all that cross-entropy learns.
        layers: Which layers are compared: uniform, last, progressive, or a list of pairs [student, other].
        layer_weights: equal, progressive (first layers first), or balanced by each layer's running loss.
    """

    weight: Value = 0.0
    distance: Literal["mse", "cosine"] = "mse"
    sample_tokens: int = 512
    segments: list[SegmentName] | None = None
    layers: LayerMap = "uniform"
    layer_weights: LayerWeights = "equal"


@dataclass
class Attention:
    """KL between attention distributions, per key-value group, at sampled query positions (Wang et al. 2020).

    Args:
        weight: A number or a schedule; 0 is off.
        queries: At most so many query positions of each packed sequence.
        segments: Segments that the queries predict.
        layers: Which layers are compared: uniform, last, progressive, or a list of pairs [student, teacher].
        heads: Which key-value groups: uniform (by relative place), or a list of pairs [student, teacher].
        layer_weights: equal, progressive (first layers first), or balanced by each layer's running loss.
    """

    weight: Value = 0.0
    queries: int = 16
    segments: list[SegmentName] = field(default_factory=_advisory)
    layers: LayerMap = "last"
    heads: Literal["uniform"] | list[tuple[int, int]] = "uniform"
    layer_weights: LayerWeights = "equal"


@dataclass
class Diversity:
    """Mean off-diagonal linear CKA between the experts' outputs, mean over the MoE layers; small for unlike experts.

    Args:
        weight: A number or a schedule; 0 is off.
        sample_tokens: At most so many tokens of the micro-batch go through all experts.
    """

    weight: Value = 0.0
    sample_tokens: int = 32


@dataclass
class Anchor:
    """The same comparisons with the dense model that the student came from, to keep what it knew.

    Args:
        cka: As against the teacher.
        hidden: As against the teacher; the widths agree, so nothing is projected.
    """

    cka: CKA = field(default_factory=CKA)
    hidden: Hidden = field(default_factory=Hidden)


@dataclass
class Balance:
    """Load balance, E sum_e f_e P_e per layer, then the mean over layers; 1 at balance (Fedus et al. 2021, eq. 4).

    Args:
        weight: A number or a schedule; 0 is off. 0.01 is the value of the Switch paper.
    """

    weight: Value = 0.01


@dataclass
class RouterZ:
    """Mean of logsumexp(router logits)^2, keeps router logits small (Zoph et al. 2022, eq. 5).

    Args:
        weight: A number or a schedule; 0 is off. 0.001 is the value of the ST-MoE paper.
    """

    weight: Value = 0.001
