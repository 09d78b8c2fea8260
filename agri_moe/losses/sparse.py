"""A teacher that is known by some of its tokens only, as a cache keeps it: which tokens, and the divergence from it.

Shape legend: M rows with the teacher's signal, R rows of one block of them, K tokens per row, N draws, V the student's
vocabulary, W the shared prefix of the two vocabularies.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseTeacher(NamedTuple):
    """A teacher's distributions by K tokens each, at temperature 1.

    Two kinds. The most probable tokens, with the mass of all others in `tail_M`: what is compared are these tokens and
    the rest as one bucket, so that no mass is lost or invented. Or tokens drawn from the teacher, by their share of the
    draws, with no tail: an unbiased estimate of the whole distribution (Anshumann et al. 2025, "Sparse Logit Sampling:
    Accelerating Knowledge Distillation in LLMs", section 3).
    """

    ids_MK: Tensor  # int64 in [0, W), distinct within a row but for those at probability 0, which fill up samples
    probs_MK: Tensor  # float32
    tail_M: Tensor | None  # float32, 0 where the K tokens are all there are; None for samples
    entropy_M: Tensor  # float32, nats: of the teacher over its whole vocabulary
    vocabulary: int  # the teacher's

    def rows(self, span: slice) -> "SparseTeacher":
        """Some of the rows."""
        tail = None if self.tail_M is None else self.tail_M[span]
        return SparseTeacher(self.ids_MK[span], self.probs_MK[span], tail, self.entropy_M[span], self.vocabulary)

    def check(self, rows: int) -> None:
        """Refuse what does not fit `rows` rows of a student.

        Raises:
            ValueError: If there are more rows than that, or the fields differ in theirs.
        """
        shapes = {name: tuple(t.shape) for name, t in self._asdict().items() if isinstance(t, Tensor)}
        if self.ids_MK.ndim != 2 or self.probs_MK.shape != self.ids_MK.shape:
            raise ValueError(f"sparse teacher: {shapes} are not ids and probabilities [M, K]")
        if any(shape[0] != len(self.ids_MK) for shape in shapes.values()) or len(self.ids_MK) > rows:
            raise ValueError(f"sparse teacher: {shapes} for {rows} student rows")


def sparse_kl(
    log_p_RV: Tensor, teacher: SparseTeacher, out_RW: Tensor, spare_RW: Tensor, *, differentiate: bool
) -> Tensor:
    """KL from the teacher's known tokens and its tail to the student, and its gradient in the student's logits.

    With q the student over the shared prefix, p the teacher's probabilities of the tokens in S and t its tail:

        KL = sum_S p log(p / q) + t log(t / q_tail),     q_tail = sum of q outside S
        gradient = q - p on S,  q - t q / q_tail outside

    that is q less the teacher, whose tail is spread as the student's own. From samples there is no tail, p estimates
    the whole distribution, and KL = -H - sum_S p log q with H the teacher's stored entropy: unbiased, and so below 0
    now and then.

    Args:
        log_p_RV: [R, V] the student's log-probabilities over its whole vocabulary, float32 or float64; only read.
        teacher: Of these R rows.
        out_RW: Takes the gradient, if wanted.
        spare_RW: To work in.
        differentiate: Whether the gradient is wanted.

    Returns:
        [R] in nats.
    """
    ids_RK, width = teacher.ids_MK, min(log_p_RV.shape[1], teacher.vocabulary)
    p_RK = teacher.probs_MK.to(log_p_RV.dtype)
    log_q_RW = log_p_RV[:, :width]
    if width < log_p_RV.shape[1]:
        log_q_RW = log_q_RW - log_q_RW.logsumexp(-1, keepdim=True)
    kl_R = -(p_RK * log_q_RW.gather(1, ids_RK)).sum(-1)
    if differentiate:
        torch.exp(log_q_RW, out=out_RW).scatter_add_(1, ids_RK, -p_RK)
    if teacher.tail_M is None:
        return kl_R - teacher.entropy_M

    tail_R = teacher.tail_M.to(log_p_RV.dtype)
    # From 1 - sum q a small tail would come out as rounding, or below 0.
    log_q_rest_RW = spare_RW.copy_(log_q_RW).scatter_(1, ids_RK, -torch.inf)
    # Where nothing is outside S, this is -inf: masked before it is multiplied, or 0 times it would be NaN.
    log_q_tail_R = log_q_rest_RW.logsumexp(-1).where(tail_R > 0, 0.0)
    if differentiate:
        # Divided in the logarithm: q_tail may be too small for its inverse.
        spread_RW = log_q_rest_RW.sub_(log_q_tail_R[:, None]).exp_().mul_(tail_R[:, None])
        out_RW.sub_(spread_RW)
    return kl_R - tail_R * log_q_tail_R + torch.xlogy(p_RK, p_RK).sum(-1) + torch.xlogy(tail_R, tail_R)


def most_probable(log_p_RW: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable tokens of each row, and what is left.

    Args:
        log_p_RW: [R, W] normalised log-probabilities, float32.
        k: At most W.

    Returns:
        ids_RK int64 and their log-probabilities [R, K], the most probable first; and the logarithm of the others' mass
        [R], -inf where there is none. It is summed over the others: 1 less the mass of the k would be rounding.
    """
    top = log_p_RW.topk(k)
    rest_RW = log_p_RW.scatter(1, top.indices, -torch.inf)
    return top.indices, top.values, rest_RW.logsumexp(-1)


def sampled_counts(log_p_RW: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens drawn from each row's own distribution, with replacement.

    Args:
        log_p_RW: [R, W] normalised log-probabilities, float32.
        draws: How many for each row.
        generator: On the device of the rows.

    Returns:
        ids_RK int64, distinct within a row, and how often each was drawn [R, K], int64, which adds up to `draws`; rows
        with fewer distinct tokens than others are filled up with token 0, drawn 0 times. K is at most `draws`.
    """
    drawn_RN = torch.multinomial(log_p_RW.exp(), draws, replacement=True, generator=generator).sort(-1).values
    first_RN = torch.ones_like(drawn_RN, dtype=torch.bool)
    first_RN[:, 1:] = drawn_RN[:, 1:] != drawn_RN[:, :-1]
    place_RN = first_RN.cumsum(-1) - 1
    counts_RN = torch.zeros_like(drawn_RN).scatter_add_(1, place_RN, torch.ones_like(drawn_RN))
    ids_RN = torch.zeros_like(drawn_RN).scatter_(1, place_RN, drawn_RN)
    return ids_RN, counts_RN


def entropy(log_p_RW: Tensor) -> Tensor:
    """Entropy of each row [R] in nats; tokens of probability 0 count as 0."""
    return torch.special.entr(log_p_RW.exp()).sum(-1)
