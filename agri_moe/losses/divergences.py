"""How far a block of the student's logits is from the teacher's, with the gradient, in place.

From a teacher that is known by all of its tokens or by some; over one vocabulary, or over the teacher's pieces where
the student has merges of them.

Shape legend: R rows of one block, V the student's vocabulary, W what both have (the shared prefix of their
vocabularies, or the teacher's pieces), N merged tokens.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agri_moe.losses.merged import Merged, group, spread, spread_follows, teacher_follows
from agri_moe.losses.sparse import SparseTeacher, sparse_kl

Divergence = Literal["forward", "reverse", "jsd"]


class Comparison(NamedTuple):
    """What is asked of every block of a call."""

    divergence: Divergence
    beta: float  # of jsd
    temperature: float | Tensor
    scale: float | Tensor  # of the gradient

    @property
    def learns(self) -> bool:
        """Whether the gradient has a part; a tensor is never asked, as the host would wait."""
        return isinstance(self.scale, Tensor) or self.scale != 0.0


class Scratch:
    """Buffers for the passes over a block, made once a call: fresh pages cost more than the pass itself."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """A buffer of that name as large as `like`, with anything in it."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(like):
            self._buffers[name] = buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        return buffer[: len(like)]


class Taught(NamedTuple):
    """What the teacher says of the rows of a block."""

    logits_RW: Tensor  # overwritten; a buffer, where it is known by some tokens only
    sparse: SparseTeacher | None
    merged: Merged | None


class Compared(NamedTuple):
    """The divergence, and `scale` times its gradient in the student's logits."""

    kl_R: Tensor  # T^2 times the divergence
    grad_RW: Tensor | None = None  # in the first W of them
    grad_RN: Tensor | None = None  # in those of the merged tokens, which follow
    factor_R: Tensor | None = None  # in all of them, over their probabilities

    def add_gradient(self, out_RV: Tensor, log_p_RV: Tensor) -> None:
        """Add it; spends the student's log-probabilities."""
        assert self.grad_RW is not None, "it was asked for"
        width = self.grad_RW.shape[1]
        out_RV[:, :width].add_(self.grad_RW)
        if self.grad_RN is not None and self.factor_R is not None:
            out_RV.addcmul_(log_p_RV.exp_(), self.factor_R[:, None])
            out_RV[:, width : width + self.grad_RN.shape[1]].add_(self.grad_RN)


def compare(
    student_RV: Tensor,
    log_p_RV: Tensor,
    teacher: Taught,
    comparison: Comparison,
    scratch: Scratch,
    differentiate: bool,
) -> Compared:
    """Compare a block with what the teacher says of it, over the shared prefix of their vocabularies or over pieces.

    Args:
        student_RV: Logits; spent.
        log_p_RV: Their log-probabilities; only read.
        teacher: Its logits are overwritten.
        comparison: Divergence, temperature and scale.
        scratch: Room.
        differentiate: Whether the gradient is wanted.
    """
    if teacher.merged is not None:
        return _over_pieces(student_RV, log_p_RV, teacher, comparison, scratch, differentiate)
    teacher_RW = teacher.logits_RW
    width = teacher_RW.shape[1]
    if teacher.sparse is not None:
        kl_R = _sparse_kl(log_p_RV, teacher, scratch("log_qt", teacher_RW), comparison, differentiate)
    else:
        whole = log_p_RV if width == student_RV.shape[1] else None
        # All that is still asked of the student's logits is in log_p and log_qs.
        spare_RW = student_RV[:, :width]
        kl_R = _kl(student_RV[:, :width], whole, teacher_RW, spare_RW, comparison, scratch, differentiate)
    return Compared(kl_R, teacher_RW if differentiate else None)


def _over_pieces(
    student_RV: Tensor,
    log_p_RV: Tensor,
    teacher: Taught,
    comparison: Comparison,
    scratch: Scratch,
    differentiate: bool,
) -> Compared:
    """Over the teacher's pieces, and at merged tokens over whether what really follows does."""
    merged, teacher_RW = teacher.merged, teacher.logits_RW
    assert merged is not None, "else there is one vocabulary"
    grouped = group(log_p_RV, merged, scratch("pieces", teacher_RW))
    log_t_R2 = teacher_follows(None if teacher.sparse is not None else teacher_RW, merged)
    if teacher.sparse is not None:
        kl_R = _sparse_kl(grouped.log_q_RW, teacher, scratch("log_qt", teacher_RW), comparison, differentiate)
    else:
        spare_RW = student_RV[:, : merged.width]
        kl_R = _kl(grouped.log_q_RW, grouped.log_q_RW, teacher_RW, spare_RW, comparison, scratch, differentiate)
    asked_R = merged.begin_M < merged.end_M
    follows_R = _kl(
        grouped.follows_R2,
        grouped.follows_R2,
        log_t_R2,
        torch.empty_like(log_t_R2),
        comparison,
        Scratch(),
        differentiate,
    )
    kl_R = kl_R + follows_R.where(asked_R, 0.0).to(kl_R.dtype)
    if not differentiate:
        return Compared(kl_R)
    grad_RN = spread(teacher_RW, merged, grouped)
    factor_R, on_top_RN = spread_follows(log_t_R2[:, 0].where(asked_R, 0.0), grouped)
    return Compared(kl_R, teacher_RW, grad_RN.add_(on_top_RN).to(kl_R.dtype), factor_R.to(kl_R.dtype))


def _sparse_kl(
    log_q_RV: Tensor, teacher: Taught, spare_RW: Tensor, comparison: Comparison, differentiate: bool
) -> Tensor:
    """From a teacher that is known by some tokens; where asked, `scale` times the gradient is left in its buffer."""
    assert teacher.sparse is not None, "it is one"
    kl_R = sparse_kl(log_q_RV, teacher.sparse, teacher.logits_RW, spare_RW, differentiate=differentiate)
    if differentiate:
        teacher.logits_RW.mul_(comparison.scale)
    return kl_R


def teacher_entropy(logits_RW: Tensor, scratch: Scratch) -> Tensor:
    """Entropy of softmax(logits), [R]."""
    log_q_RW = torch.log_softmax(logits_RW, -1, out=scratch("log_qt", logits_RW))
    q_RW = torch.exp(log_q_RW, out=scratch("log_qs", logits_RW))
    return -q_RW.mul_(log_q_RW).sum(-1)


def _kl(
    student_RW: Tensor,
    log_qs_RW: Tensor | None,
    teacher_RW: Tensor,
    spare_RW: Tensor,
    comparison: Comparison,
    scratch: Scratch,
    differentiate: bool,
) -> Tensor:
    """Return T^2 D [R]; where asked, `scale` times its gradient takes the place of the teacher's logits.

    Each divergence leaves dD / du for the tempered logits u = z / T, so that d(T^2 D) / dz is T times that.

    Args:
        student_RW: Logits over what is compared.
        log_qs_RW: Their log-probabilities at temperature 1, if they are there already.
        teacher_RW: Logits; overwritten.
        spare_RW: To work in; may be the student's logits.
        comparison: Temperature, divergence and scale.
        scratch: More room.
        differentiate: Whether the gradient is wanted.
    """
    temperature = comparison.temperature
    plain = not isinstance(temperature, Tensor) and temperature == 1.0
    if not plain:
        teacher_RW.div_(temperature)
    log_qt_RW = torch.log_softmax(teacher_RW, -1, out=scratch("log_qt", teacher_RW))
    if not plain or log_qs_RW is None:
        torch.div(student_RW, temperature, out=teacher_RW)
        log_qs_RW = torch.log_softmax(teacher_RW, -1, out=scratch("log_qs", teacher_RW))
    divergence = DIVERGENCES[comparison.divergence]
    kl_R = divergence(log_qt_RW, log_qs_RW, teacher_RW, spare_RW, comparison.beta, differentiate)
    if differentiate:
        teacher_RW.mul_(comparison.scale * temperature)
    return kl_R * (temperature * temperature)


# Each takes log q_t (overwritten), log q_s (read only: it may be log_p), a buffer that the gradient is left in, another
# to work in, beta, and whether the gradient is wanted; each returns D [R].


def _forward(
    log_qt_RW: Tensor, log_qs_RW: Tensor, out_RW: Tensor, spare_RW: Tensor, beta: float, differentiate: bool
) -> Tensor:
    """sum q_t (log q_t - log q_s), with gradient q_s - q_t."""
    difference_RW = torch.sub(log_qt_RW, log_qs_RW, out=out_RW)
    qt_RW = log_qt_RW.exp_()
    kl_R = difference_RW.mul_(qt_RW).sum(-1)
    if differentiate:
        torch.exp(log_qs_RW, out=out_RW).sub_(qt_RW)
    return kl_R


def _reverse(
    log_qt_RW: Tensor, log_qs_RW: Tensor, out_RW: Tensor, spare_RW: Tensor, beta: float, differentiate: bool
) -> Tensor:
    """sum q_s (log q_s - log q_t), with gradient q_s (log q_s - log q_t - D)."""
    difference_RW = torch.sub(log_qs_RW, log_qt_RW, out=out_RW)
    qs_RW = torch.exp(log_qs_RW, out=log_qt_RW)
    kl_R = difference_RW.mul_(qs_RW).sum(-1)
    if differentiate:
        out_RW.sub_(qs_RW.mul_(kl_R[:, None]))
    return kl_R


def _jsd(
    log_qt_RW: Tensor, log_qs_RW: Tensor, out_RW: Tensor, spare_RW: Tensor, beta: float, differentiate: bool
) -> Tensor:
    """b KL(q_t || m) + (1 - b) KL(q_s || m), with gradient (1 - b) q_s (log q_s - log m - KL(q_s || m)).

    With r = log q_s - log q_t, log(m / q_t) is log(b + (1 - b) exp(r)) and log(m / q_s) is log(b exp(-r) + 1 - b).
    From log m itself, the rounding of large logarithms would be as large as a small divergence.
    """
    log_b, log_rest = math.log(beta), math.log1p(-beta)
    ratio_RW = torch.sub(log_qs_RW, log_qt_RW, out=out_RW)
    torch.add(ratio_RW, log_rest, out=spare_RW)
    log_m_qt_RW = torch.logaddexp(spare_RW, spare_RW.new_full((), log_b), out=spare_RW)
    teacher_R = log_m_qt_RW.mul_(log_qt_RW.exp_()).sum(-1).neg_()
    ratio_RW.neg_().add_(log_b)
    log_m_qs_RW = torch.logaddexp(ratio_RW, ratio_RW.new_full((), log_rest), out=out_RW)
    qs_RW = torch.exp(log_qs_RW, out=log_qt_RW)
    student_R = log_m_qs_RW.mul_(qs_RW).sum(-1).neg_()
    if differentiate:
        out_RW.add_(qs_RW.mul_(student_R[:, None])).mul_(beta - 1.0)
    return beta * teacher_R + (1.0 - beta) * student_R


DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jsd": _jsd}
