"""A student whose vocabulary has merges of the teacher's pieces, seen over those pieces.

The teacher predicts one piece after the other, the student may write several at once. What both can be asked, where
the text before is the same:

    which piece follows         teacher: P(b);   student: Q(b) = sum of Q(u) over all its tokens u that begin with b
    whether the token x that really follows, of pieces b_1 ... b_k with k > 1, does
                                teacher: P(b_1) P(b_2 | b_1) ...;   student: sum of Q(u) over all u that begin with x's

The first is a divergence over the pieces, the second one over two outcomes. Either is an ordinary divergence of grouped
tokens: the logarithm of a group's probability takes the place of a logit, and its gradient is shared out among the
group's tokens as their probabilities are. Without merges the first is the divergence over one vocabulary, and there is
no second.

Shape legend: R rows of one block, M rows with the teacher's signal, V the student's vocabulary, W the teacher's pieces,
which have the same ids in both, N merged tokens, which have the ids W to W + N - 1, G pieces that some of them begin
with.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# 1 - Q and 1 - P are kept above the rounding of a float32 sum of probabilities.
_SURE = 2.0**-23
# The logarithm of a probability whose inverse float64 still holds.
_NEVER = -700.0


class Merged(NamedTuple):
    """The student's merged tokens, and for each row with the teacher's signal the token that really follows.

    Tokens that begin with the pieces of one token stand together once all are ordered by their pieces: that is what
    `rank_N`, `begin_M` and `end_M` say. A row whose next token is no merged one has `begin_M == end_M`.
    """

    first_G: Tensor  # int64 in [0, W), distinct
    group_N: Tensor  # int64 in [0, G): which of these a token begins with
    rank_N: Tensor  # int64: its place in the order of their pieces
    next_first_M: Tensor  # int64 in [0, W): first piece of the token that follows
    begin_M: Tensor  # int64: ranks, from here ...
    end_M: Tensor  # ... to before here, of the tokens that begin with that token's pieces
    rest_M: (
        Tensor  # float32, nats: teacher's log-probability of its pieces after the first; beside a sparse teacher all
    )
    width: int  # W

    def rows(self, span: slice) -> "Merged":
        """Some of the rows."""
        return self._replace(**{name: getattr(self, name)[span] for name in _BY_ROW})

    def check(self, rows: int, vocabulary: int) -> None:
        """Refuse what does not fit `rows` rows with the teacher's signal and a student's vocabulary.

        Raises:
            ValueError: Naming the shapes.
        """
        shapes = {name: tuple(t.shape) for name, t in self._asdict().items() if isinstance(t, Tensor)}
        if self.width + len(self.group_N) > vocabulary or self.rank_N.shape != self.group_N.shape:
            raise ValueError(f"merged tokens: {shapes} after {self.width} pieces for a vocabulary of {vocabulary}")
        if any(shapes[name] != (rows,) for name in _BY_ROW):
            raise ValueError(f"merged tokens: {shapes} for {rows} rows with a teacher")


_BY_ROW = ("next_first_M", "begin_M", "end_M", "rest_M")


class Grouped(NamedTuple):
    """A block of the student's log-probabilities, grouped.

    Probabilities are told over those of a row's most probable grouped token, in float64: nothing underflows that
    matters, and the columns are few.
    """

    log_q_RW: Tensor  # over the teacher's pieces, normalised
    follows_R2: Tensor  # float64: log-probabilities that what really follows does, and that it does not
    top_R1: Tensor  # log-probability of the most probable
    own_RG: Tensor  # probabilities of the first pieces by themselves
    merged_RN: Tensor  # of the merged tokens
    sums_RG: Tensor  # of the groups
    within_RN: Tensor  # of the merged tokens that begin with what really follows; of others 0


def group(log_p_RV: Tensor, merged: Merged, out_RW: Tensor) -> Grouped:
    """The student's log-probabilities over pieces, and over whether the next token follows.

    Args:
        log_p_RV: Normalised, float32 or float64; only read.
        merged: Of these R rows.
        out_RW: Takes `log_q_RW`.
    """
    width, count = merged.width, len(merged.group_N)
    own_RG = log_p_RV[:, merged.first_G].double()
    merged_RN = log_p_RV[:, width : width + count].double()
    top_R1 = torch.maximum(own_RG.amax(1, keepdim=True), merged_RN.amax(1, keepdim=True))
    own_RG, merged_RN = (own_RG - top_R1).exp_(), (merged_RN - top_R1).exp_()
    sums_RG = _add_by_group(own_RG, merged_RN, merged.group_N)
    out_RW.copy_(log_p_RV[:, :width])
    out_RW[:, merged.first_G] = (sums_RG.log() + top_R1).to(out_RW.dtype)
    if width + count < log_p_RV.shape[1]:  # rows that fill the matrix up
        out_RW.sub_(out_RW.logsumexp(-1, keepdim=True))
    within = (merged.rank_N >= merged.begin_M[:, None]) & (merged.rank_N < merged.end_M[:, None])
    within_RN = merged_RN * within
    follows_R = within_RN.sum(1).log().add_(top_R1[:, 0]).clamp_(min=_NEVER)  # the sum is 0 where nothing is asked
    return Grouped(out_RW, _two(follows_R), top_R1, own_RG, merged_RN, sums_RG, within_RN)


def _add_by_group(own_RG: Tensor, merged_RN: Tensor, group_N: Tensor) -> Tensor:
    """To each group's own probability that of its merged tokens."""
    if own_RG.device.type == "cpu":
        return own_RG.index_add(1, group_N, merged_RN)
    # Which is not deterministic on an accelerator; a product is.
    return own_RG + merged_RN @ functional.one_hot(group_N, own_RG.shape[1]).double()


def spread(grad_RW: Tensor, merged: Merged, grouped: Grouped) -> Tensor:
    """From the gradient in `log_q_RW`'s logits to that in the student's.

    Args:
        grad_RW: Becomes the gradient of the first W of the student's logits, in place.
        merged: Of these R rows.
        grouped: What `group` returned.

    Returns:
        [R, N], the gradient of the merged tokens' logits.
    """
    factor_RG = grad_RW[:, merged.first_G] / grouped.sums_RG
    grad_RW[:, merged.first_G] = (factor_RG * grouped.own_RG).to(grad_RW.dtype)
    return factor_RG.index_select(1, merged.group_N).mul_(grouped.merged_RN)


def spread_follows(grad_R: Tensor, grouped: Grouped) -> tuple[Tensor, Tensor]:
    """Likewise from the gradient in the first of `follows_R2`'s two logits, that of the second being its opposite.

    Args:
        grad_R: 0 where nothing is asked.
        grouped: What `group` returned.

    Returns:
        [R], what is to be multiplied with the student's probabilities, for every token; and [R, N], what comes on top
        for the merged tokens.
    """
    inside_R, outside_R = (grad_R * (-grouped.follows_R2[:, i]).exp() for i in (0, 1))
    factor_R1 = (inside_R + outside_R)[:, None] * grouped.top_R1.exp()
    return -outside_R, grouped.within_RN * factor_R1


def teacher_follows(log_p_RW: Tensor | None, merged: Merged) -> Tensor:
    """The teacher's log-probabilities that what really follows does, and that it does not, [R, 2] in float64.

    Args:
        log_p_RW: Its logits or log-probabilities over the pieces; None where `rest_M` is about all pieces.
        merged: Of these R rows.
    """
    log_p_R = merged.rest_M.double()
    if log_p_RW is not None:
        first_R = log_p_RW.gather(1, merged.next_first_M[:, None]).squeeze(1)
        log_p_R = log_p_R + (first_R - log_p_RW.logsumexp(-1)).double()
    return _two(log_p_R)


def _two(log_p_R: Tensor) -> Tensor:
    """log p and log(1 - p)."""
    log_p_R = log_p_R.clamp(max=-_SURE)
    return torch.stack([log_p_R, torch.log(-torch.expm1(log_p_R))], 1)
