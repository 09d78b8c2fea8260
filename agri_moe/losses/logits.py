"""Cross-entropy and divergence straight from hidden states, in chunks, with the gradient taken in the forward pass.

Shape legend, used as suffixes of names throughout:

    N tokens (rows)     M the first M of those rows, which also carry the teacher's signal (M <= N)
    D width of the student's hidden states (the teacher's may differ)      V vocabulary
    W shared prefix of the two vocabularies, min(V_student, V_teacher); the teacher's pieces, where the student has
      merges of them      R rows of one block (`_Chunk`)
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agri_moe.losses.divergences import (
    DIVERGENCES,
    Compared,
    Comparison,
    Divergence,
    Scratch,
    Taught,
    compare,
    teacher_entropy,
)
from agri_moe.losses.merged import Merged, group, teacher_follows
from agri_moe.losses.sparse import SparseTeacher, sparse_kl

# Rows whose logits are held at a time. The three constants were measured with the shapes of
# benchmarks/loss_step.py on one thread of an AMD EPYC (Zen 4): 256 rows save 2% of the time.
CHUNK_SIZE = 128
# On CPU the passes over the logits go by blocks of rows with about this many of the student's, 6 rows of Qwen3's; 1 to
# 32 rows are alike there, 128 cost 2%. Blocks of a few thousand logits cost three times as much as the passes do.
CPU_BLOCK_LOGITS = 2**20
# On CPU the logits' product goes by tiles of the vocabulary; 512 to 2048 are alike, untiled costs 8%.
CPU_VOCABULARY_TILE = 1024


class LogitLoss(NamedTuple):
    """What `fused_ce_kl` returns: one scalar to differentiate and the sums to log."""

    loss: Tensor  # scalar with gradient: ce_scale * ce_sum (or sum of ce_scale_n ce_n) + kl_scale * kl_sum
    ce_sum: Tensor  # detached scalar, nats: sum over the N rows of the cross-entropy
    kl_sum: Tensor  # detached scalar, nats: sum over the first M rows of T^2 times the divergence
    entropy_sum: Tensor | None = None  # detached scalar, nats: sum over those rows of the teacher's entropy, if asked


def fused_ce_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher_hidden_MD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    merged: Merged | None = None,
    *,
    ce_scale: float | Tensor,
    kl_scale: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    with_entropy: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> LogitLoss:
    """Cross-entropy and divergence of a language-model head, without ever holding [N, V] logits.

    Rows are taken `chunk_size` at a time and the gradient is computed in the forward pass, while the chunk's
    logits are at hand. Cross-entropy is `torch.nn.functional.cross_entropy`'s (label smoothing included) on
    all N rows and the student's whole vocabulary. The divergence D is taken on the first M rows, between
    q_t = softmax(t / T) and q_s = softmax(s / T), both over the shared prefix of the vocabularies, times T^2
    (Hinton et al. 2015, section 2: the gradient then keeps its size whatever T). It is 0 where they agree:

        forward   KL(q_t || q_s)                            Hinton et al. 2015
        reverse   KL(q_s || q_t)                            Gu et al. 2024 (MiniLLM), eq. 1, token by token
        jsd       b KL(q_t || m) + (1 - b) KL(q_s || m)     with m = b q_t + (1 - b) q_s and b = beta,
                                                            Agarwal et al. 2024 (GKD), section 2

    A student that writes several of the teacher's pieces at once is compared over pieces, and at its merged tokens
    over whether what really follows does as well (`losses/merged.py`): the divergence is the sum of the two.

    Args:
        hidden_ND: [N, D] student hidden states after the final norm, any floating dtype.
        head_VD: [V, D] student head weights, a whole tensor (not a DTensor shard).
        targets_N: [N] int64 next-token ids in [0, V). There is no ignore index: pass supervised rows only.
        teacher_hidden_MD: [M, D_t] teacher hidden states of the *first* M rows, or None for M = 0.
        teacher_head_VD: [V_t, D_t] teacher head weights; both or neither. The teacher gets no gradient.
        sparse_teacher: in place of these two, some tokens of the teacher's distributions of the first M rows; then the
            divergence is `sparse_kl`'s, forward and at temperature 1.
        merged: the student's tokens that join several of the teacher's; None where the two have one vocabulary.
        ce_scale: factor of the cross-entropy sum, a float, a 0-d tensor, or [N], one for each row; a constant to
            autograd.
        kl_scale: factor of the divergence's sum, a float or a 0-d tensor. A *float* 0 skips the work that only a
            gradient needs; both sums are reported all the same.
        temperature: T > 0, a float or a 0-d tensor (never read back to the host).
        label_smoothing: in [0, 1].
        divergence: which one, see above.
        beta: of `jsd`, in (0, 1).
        with_entropy: report the teacher's entropy too, at temperature 1 over the shared prefix.
        chunk_size: rows at a time. Memory above inputs and gradients is about 4 * chunk_size * (V + W) bytes; on an
            accelerator, where a block is a whole chunk, its passes take 4 * chunk_size * (V + 2 W) more.

    Returns:
        A `LogitLoss` in float32 (float64 where hidden_ND or head_VD is). With N = 0, or nothing that needs a
        gradient, the loss still hangs on both inputs and its gradient is zero.

    Numerics: log-softmax in float32 on float32 logits, with autocast off (bf16 logits inflate a small KL by
    40 to 100%). On CUDA, bf16 operands (and float32 ones under bf16 autocast, cast once) are multiplied with
    float32 accumulation and output; everything else is multiplied in float32, fp16 too, where the gradient of
    an unscaled logit would vanish. The head's gradient is accumulated in float32 over the chunks, and
    gradients are returned in the dtypes of the inputs. A second backward over a retained graph computes the
    gradient again.

    Raises:
        ValueError: shapes that do not fit, only half a teacher or two, more teacher rows than student rows, an
            unknown divergence, beta outside (0, 1), or a sparse teacher with another divergence or temperature.
    """
    if divergence not in DIVERGENCES or not 0 < beta < 1:
        raise ValueError(f"divergence {divergence!r} is not one of {', '.join(DIVERGENCES)} with beta in (0, 1)")
    if isinstance(ce_scale, Tensor) and ce_scale.ndim and ce_scale.shape != hidden_ND.shape[:1]:
        raise ValueError(f"ce_scale {tuple(ce_scale.shape)} is neither a number nor one for each row")
    if sparse_teacher is not None:
        if (
            teacher_hidden_MD is not None
            or divergence != "forward"
            or isinstance(temperature, Tensor)
            or temperature != 1
        ):
            raise ValueError("a sparse teacher stands alone, with the forward divergence at temperature 1")
        sparse_teacher.check(len(hidden_ND))
        # To all that follows, one of width 0: its logits are a buffer that `sparse_kl` leaves the gradient in.
        teacher_hidden_MD = hidden_ND.new_empty(len(sparse_teacher.ids_MK), 0)
        teacher_head_VD = head_VD.new_empty(sparse_teacher.vocabulary, 0)
    teacher_hidden_MD, teacher_head_VD = _check_rows(
        hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD, chunk_size, merged
    )
    rows = _Rows(hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD)
    settings = _Settings(
        sparse_teacher=sparse_teacher,
        merged=merged,
        ce_scale=_constant(ce_scale),
        comparison=Comparison(divergence, beta, _constant(temperature), _constant(kl_scale)),
        label_smoothing=label_smoothing,
        with_entropy=with_entropy,
        chunk_size=chunk_size,
        operand_dtype=rows.operand_dtype,
        differentiate=torch.is_grad_enabled(),
    )
    loss, ce_sum, kl_sum, entropy_sum = _FusedCrossEntropyKL.apply(settings, *rows)
    return LogitLoss(loss, ce_sum, kl_sum, entropy_sum if with_entropy else None)


class TokenStatistics(NamedTuple):
    """What `token_statistics` returns, one number per row; the last three are empty without a teacher."""

    nll_N: Tensor  # nats, float32: negative log-likelihood over the student's whole vocabulary
    kl_M: (
        Tensor  # nats, float32: KL(teacher || student) at temperature 1 over the shared prefix, with `merged`'s second
    )
    agree_M: Tensor  # bool: the two name the same token of the shared prefix first
    teacher_entropy_M: Tensor  # nats, float32: the teacher's entropy over the shared prefix


@torch.no_grad()
def token_statistics(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher_hidden_MD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    merged: Merged | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> TokenStatistics:
    """Per-token numbers for validation, chunked and without gradient; arguments as in `fused_ce_kl`.

    The first token of a sparse teacher is its most probable one.
    """
    if sparse_teacher is not None:
        return _sparse_statistics(hidden_ND, head_VD, targets_N, sparse_teacher, merged, chunk_size)
    teacher_hidden_MD, teacher_head_VD = _check_rows(
        hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD, chunk_size, merged
    )
    rows = _Rows(hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD)
    n, m, dtype = len(hidden_ND), len(teacher_hidden_MD), rows.result_dtype
    nll_N = hidden_ND.new_empty(n, dtype=dtype)
    kl_M, entropy_M = hidden_ND.new_empty(m, dtype=dtype), hidden_ND.new_empty(m, dtype=dtype)
    agree_M = hidden_ND.new_empty(m, dtype=torch.bool)
    operands = rows.cast(rows.operand_dtype, merged)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for chunk in _chunks(operands, chunk_size, dtype):
            for span, student_RV, teacher_RW in chunk.blocks():
                log_p_RV = student_RV.log_softmax(-1)
                nll_N[span] = -log_p_RV.gather(1, targets_N[span, None]).squeeze(1)
                if teacher_RW is not None:
                    log_qs_RW, follows_R = _shared(log_p_RV, teacher_RW, None if merged is None else merged.rows(span))
                    log_qt_RW = teacher_RW.log_softmax(-1)
                    qt_RW = log_qt_RW.exp()
                    kl_M[span] = (qt_RW * (log_qt_RW - log_qs_RW)).sum(-1) + follows_R
                    entropy_M[span] = -(qt_RW * log_qt_RW).sum(-1)
                    agree_M[span] = log_qs_RW.argmax(-1) == log_qt_RW.argmax(-1)
    return TokenStatistics(nll_N.float(), kl_M.float(), agree_M, entropy_M.float())


@torch.no_grad()
def log_probabilities(hidden_ND: Tensor, head_WD: Tensor, *, chunk_size: int = CHUNK_SIZE) -> Iterator[Tensor]:
    """Log-probabilities of a head, [R, W] for `chunk_size` rows at a time; dtypes and numerics as in `fused_ce_kl`.

    Args:
        hidden_ND: [N, D] hidden states after the final norm.
        head_WD: [W, D] head weights, or its first W rows.
        chunk_size: Rows at a time; memory is about 8 * chunk_size * W bytes.
    """
    nobody = _Rows(hidden_ND, head_WD, hidden_ND, hidden_ND[:0], head_WD)
    for chunk in _chunks(nobody.cast(nobody.operand_dtype), chunk_size, nobody.result_dtype):
        yield chunk.student.log_softmax(-1)


def _shared(log_p_RV: Tensor, teacher_RW: Tensor | None, merged: Merged | None) -> tuple[Tensor, Tensor | float]:
    """The student over what it shares with the teacher [R, W], and KL about what really follows, 0 without merges."""
    if merged is None:
        assert teacher_RW is not None, "it says how much is shared"
        width = teacher_RW.shape[1]
        # As it is over one vocabulary: normalising twice would make the KL of equals 1e-8, not 0.
        return log_p_RV if width == log_p_RV.shape[1] else log_p_RV[:, :width].log_softmax(-1), 0.0
    grouped = group(log_p_RV, merged, log_p_RV.new_empty(len(log_p_RV), merged.width))
    log_t_R2 = teacher_follows(teacher_RW, merged)
    kl_R = (log_t_R2.exp() * (log_t_R2 - grouped.follows_R2)).sum(-1).where(merged.begin_M < merged.end_M, 0.0)
    return grouped.log_q_RW, kl_R.to(log_p_RV.dtype)


def _sparse_statistics(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    sparse: SparseTeacher,
    merged: Merged | None,
    chunk_size: int,
) -> TokenStatistics:
    sparse.check(len(hidden_ND))
    teacher = _check_rows(hidden_ND, head_VD, targets_N, None, None, chunk_size)
    rows = _Rows(hidden_ND, head_VD, targets_N, *teacher)
    m, dtype = len(sparse.ids_MK), rows.result_dtype
    if merged is not None:
        merged.check(m, len(head_VD))
    width = min(len(head_VD), sparse.vocabulary)
    nll_N = hidden_ND.new_empty(len(hidden_ND), dtype=dtype)
    kl_M, agree_M = hidden_ND.new_empty(m, dtype=dtype), hidden_ND.new_empty(m, dtype=torch.bool)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for chunk in _chunks(rows.cast(rows.operand_dtype), chunk_size, dtype):
            for span, student_RV, _ in chunk.blocks():
                log_p_RV = student_RV.log_softmax(-1)
                nll_N[span] = -log_p_RV.gather(1, targets_N[span, None]).squeeze(1)
                taught = slice(span.start, min(span.stop, m))
                if (count := taught.stop - taught.start) > 0:
                    some, spare_RW = sparse.rows(taught), torch.empty_like(log_p_RV[:count, :width])
                    shared_RV = log_p_RV[:count]
                    follows_R: Tensor | float = 0.0
                    if merged is not None:
                        shared_RV, follows_R = _shared(shared_RV, None, merged.rows(taught))
                    kl_M[taught] = sparse_kl(shared_RV, some, spare_RW, spare_RW, differentiate=False) + follows_R
                    agree_M[taught] = shared_RV[:, :width].argmax(-1) == some.ids_MK[:, 0]
    return TokenStatistics(nll_N.float(), kl_M.float(), agree_M, sparse.entropy_M.float())


def _check_rows(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher_hidden_MD: Tensor | None,
    teacher_head_VD: Tensor | None,
    chunk_size: int,
    merged: Merged | None = None,
) -> tuple[Tensor, Tensor]:
    """Refuse shapes that do not fit; return a detached teacher, one of no rows where there is none."""
    student, head = tuple(hidden_ND.shape), tuple(head_VD.shape)
    if len(student) != 2 or len(head) != 2 or student[1] != head[1]:
        raise ValueError(f"hidden states {student} and head {head} are not [N, D] and [V, D]")
    if targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"targets {tuple(targets_N.shape)} do not match {student[0]} rows of hidden states")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if teacher_hidden_MD is None and teacher_head_VD is None:
        return hidden_ND.new_empty(0, student[1]), head_VD.detach()
    if teacher_hidden_MD is None or teacher_head_VD is None:
        raise ValueError("a teacher needs both its hidden states and its head, or neither")
    teacher, head = tuple(teacher_hidden_MD.shape), tuple(teacher_head_VD.shape)
    if len(teacher) != 2 or len(head) != 2 or teacher[1] != head[1]:
        raise ValueError(f"teacher hidden states {teacher} and head {head} are not [M, D] and [V, D]")
    if teacher[0] > student[0]:
        raise ValueError(f"{teacher[0]} teacher rows for {student[0]} student rows")
    if merged is not None:
        merged.check(teacher[0], len(head_VD))
        if merged.width > len(teacher_head_VD):
            raise ValueError(f"a teacher's head of {len(teacher_head_VD)} rows for {merged.width} pieces")
    return teacher_hidden_MD.detach(), teacher_head_VD.detach()


class _Rows(NamedTuple):
    """The tensors of one call, checked: a teacher without rows stands for no teacher."""

    hidden_ND: Tensor
    head_VD: Tensor
    targets_N: Tensor
    teacher_hidden_MD: Tensor
    teacher_head_VD: Tensor

    @property
    def result_dtype(self) -> torch.dtype:
        """Of logits, losses and accumulated gradients."""
        return torch.float64 if torch.float64 in (self.hidden_ND.dtype, self.head_VD.dtype) else torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of the matrix products: see 'Numerics' in `fused_ce_kl`. Ask under the caller's own autocast."""
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        half = autocast or torch.bfloat16 in (self.hidden_ND.dtype, self.head_VD.dtype)
        if self.hidden_ND.is_cuda and half and self.result_dtype == torch.float32:
            return torch.bfloat16
        return self.result_dtype

    def cast(self, dtype: torch.dtype, merged: Merged | None = None) -> "_Rows":
        """Detached operands in `dtype`, uncopied where they are so already, the teacher's head cut to W."""
        shared = min(len(self.head_VD), len(self.teacher_head_VD)) if merged is None else merged.width
        width = shared if len(self.teacher_hidden_MD) else 0
        return _Rows(
            self.hidden_ND.detach().to(dtype),
            self.head_VD.detach().to(dtype),
            self.targets_N,
            self.teacher_hidden_MD.to(dtype),
            self.teacher_head_VD[:width].to(dtype),
        )


def cpu_block_rows(vocabulary: int) -> int:
    """Rows that the passes over the logits take at a time on CPU; an accelerator takes a chunk: few, large kernels."""
    return max(1, CPU_BLOCK_LOGITS // vocabulary)


class _Chunk(NamedTuple):
    """The logits of some rows: views of buffers that the next chunk overwrites."""

    start: int
    student: Tensor  # [rows, V]
    teacher: Tensor  # [taught, W]: the first `taught` of those rows, over the shared prefix

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield (rows of the call, student [R, V], teacher [R, W] or None), the taught rows first."""
        rows, vocabulary = self.student.shape
        step = max(1, rows) if self.student.device.type != "cpu" else cpu_block_rows(vocabulary)
        taught = len(self.teacher)
        for first, end in ((0, taught), (taught, len(self.student))):
            for i in range(first, end, step):
                j = min(i + step, end)
                yield (
                    slice(self.start + i, self.start + j),
                    self.student[i:j],
                    self.teacher[i:j] if end == taught else None,
                )


def _chunks(operands: _Rows, chunk_size: int, dtype: torch.dtype) -> Iterator[_Chunk]:
    """Logits in `dtype` of student and teacher, chunk by chunk, in two buffers."""
    n, m = len(operands.hidden_ND), len(operands.teacher_hidden_MD)
    new_empty = operands.hidden_ND.new_empty
    student_buffer = new_empty(min(chunk_size, n), len(operands.head_VD), dtype=dtype)
    teacher_buffer = new_empty(min(chunk_size, m), len(operands.teacher_head_VD), dtype=dtype)
    for start in range(0, n, chunk_size):
        hidden = operands.hidden_ND[start : start + chunk_size]
        taught = operands.teacher_hidden_MD[start : start + chunk_size]
        chunk = _Chunk(start, student_buffer[: len(hidden)], teacher_buffer[: len(taught)])
        _logits(hidden, operands.head_VD, chunk.student)
        if len(taught):
            _logits(taught, operands.teacher_head_VD, chunk.teacher)
        yield chunk


def _logits(hidden_RD: Tensor, head_VD: Tensor, out_RV: Tensor) -> None:
    """out = hidden @ head.T."""
    if out_RV.device.type != "cpu":
        _product(hidden_RD, head_VD.T, out_RV)
        return
    # By tiles of the vocabulary: MKL repacks the head's transpose, and a tile of it stays in the cache.
    for v in range(0, len(head_VD), CPU_VOCABULARY_TILE):
        tile = slice(v, v + CPU_VOCABULARY_TILE)
        torch.mm(hidden_RD, head_VD[tile].T, out=out_RV[:, tile])


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, with bf16 operands accumulated and written in float32 (CUDA only)."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, likewise."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


class _Settings(NamedTuple):
    """Everything of a `fused_ce_kl` call that autograd need not know of."""

    sparse_teacher: SparseTeacher | None
    merged: Merged | None
    ce_scale: float | Tensor
    comparison: Comparison
    label_smoothing: float
    with_entropy: bool
    chunk_size: int
    operand_dtype: torch.dtype
    differentiate: bool  # whether autograd records this call

    @property
    def with_ce(self) -> bool:
        """Whether the gradient has a cross-entropy part; a tensor is never asked, as the host would wait."""
        return isinstance(self.ce_scale, Tensor) or self.ce_scale != 0.0

    def taught(self, rows: slice, logits_RW: Tensor) -> Taught:
        """What the teacher says of some rows."""
        sparse = None if self.sparse_teacher is None else self.sparse_teacher.rows(rows)
        return Taught(logits_RW, sparse, None if self.merged is None else self.merged.rows(rows))

    def ce_scale_of(self, rows: slice) -> float | Tensor:
        """Factor of the cross-entropies of some rows, to be multiplied with [R, V]."""
        by_row = isinstance(self.ce_scale, Tensor) and self.ce_scale.ndim > 0
        return self.ce_scale[rows, None] if by_row else self.ce_scale  # type: ignore[index]


def _constant(scale: float | Tensor) -> float | Tensor:
    return scale.detach() if isinstance(scale, Tensor) else float(scale)


class _Block(NamedTuple):
    """Per row of a block, in nats."""

    ce_R: Tensor
    kl_R: Tensor | None  # T^2 times the divergence
    entropy_R: Tensor | None  # the teacher's


def _block(
    student_RV: Tensor,
    targets_R: Tensor,
    teacher: Taught | None,
    settings: _Settings,
    ce_scale: float | Tensor,
    scratch: Scratch,
    differentiate: bool,
) -> _Block:
    """Losses of one block; where asked, its logits become their own gradient.

    With z the student's logits, p = softmax(z), y one-hot and e the label smoothing:

        CE = -(1 - e) log p[y] - e / V sum_v log p[v]        dCE / dz = p - (1 - e) y - e / V

    The passes are in place or into `scratch`; the teacher's logits are overwritten too.
    """
    smoothing, share = settings.label_smoothing, settings.label_smoothing / student_RV.shape[1]
    log_p_RV = torch.log_softmax(student_RV, -1, out=scratch("log_p", student_RV))
    ce_R = log_p_RV.gather(1, targets_R[:, None]).squeeze(1) * (smoothing - 1.0)
    if smoothing:
        ce_R -= log_p_RV.sum(-1) * share
    kl: Compared | None = None
    entropy_R = None
    taught = differentiate and settings.comparison.learns
    if teacher is not None:
        if teacher.sparse is not None:
            entropy_R = teacher.sparse.entropy_M
        elif settings.with_entropy:
            entropy_R = teacher_entropy(teacher.logits_RW, scratch)
        kl = compare(student_RV, log_p_RV, teacher, settings.comparison, scratch, taught)
    if not differentiate:
        return _Block(ce_R, kl and kl.kl_R, entropy_R)

    if settings.with_ce:
        torch.exp(log_p_RV, out=student_RV)
        if smoothing:
            student_RV.sub_(share)
        target_R1 = targets_R[:, None]  # not scatter_add_, which is not deterministic on CUDA
        student_RV.scatter_(1, target_R1, student_RV.gather(1, target_R1) - (1.0 - smoothing))
        student_RV.mul_(ce_scale)
    else:
        student_RV.zero_()
    if kl is not None and taught:
        kl.add_gradient(student_RV, log_p_RV)
    return _Block(ce_R, kl and kl.kl_R, entropy_R)


class _Sums(NamedTuple):
    loss: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    entropy_sum: Tensor
    grad_hidden_ND: Tensor | None
    grad_head_VD: Tensor | None


def _sums_and_gradients(rows: _Rows, settings: _Settings, needs: tuple[bool, bool]) -> _Sums:
    """Go through the chunks once: the sums, and the gradient of the scaled loss where `needs` says so."""
    dtype, scratch = rows.result_dtype, Scratch()
    operands = rows.cast(settings.operand_dtype, settings.merged)
    n, m = len(rows.hidden_ND), len(rows.teacher_hidden_MD)
    ce_N, kl_M = rows.hidden_ND.new_empty(n, dtype=dtype), rows.hidden_ND.new_empty(m, dtype=dtype)
    entropy_sum = rows.hidden_ND.new_zeros((), dtype=dtype)
    grad_hidden_ND = torch.zeros_like(rows.hidden_ND, dtype=dtype) if needs[0] else None
    grad_head_VD: Tensor | None = None
    for chunk in _chunks(operands, settings.chunk_size, dtype):
        for span, student_RV, teacher_RW in chunk.blocks():
            teacher = None if teacher_RW is None else settings.taught(span, teacher_RW)
            scale = settings.ce_scale_of(span)
            block = _block(student_RV, rows.targets_N[span], teacher, settings, scale, scratch, any(needs))
            ce_N[span] = block.ce_R
            if block.kl_R is not None:
                kl_M[span] = block.kl_R
            if block.entropy_R is not None:
                entropy_sum += block.entropy_R.sum()
        # Without a cross-entropy part, rows that carry no KL have no gradient.
        count = len(chunk.student) if settings.with_ce else len(chunk.teacher) * settings.comparison.learns
        if not any(needs) or not count:
            continue
        gradient = chunk.student[:count].to(settings.operand_dtype)
        span = slice(chunk.start, chunk.start + count)
        if grad_hidden_ND is not None:
            _product(gradient, operands.head_VD, grad_hidden_ND[span])
        if needs[1] and grad_head_VD is None:
            grad_head_VD = torch.empty_like(rows.head_VD, dtype=dtype)
            _product(gradient.T, operands.hidden_ND[span], grad_head_VD)
        elif grad_head_VD is not None:
            _add_product(gradient.T, operands.hidden_ND[span], grad_head_VD)
    if needs[1] and grad_head_VD is None:
        grad_head_VD = torch.zeros_like(rows.head_VD, dtype=dtype)
    ce_sum, kl_sum = ce_N.sum(), kl_M.sum()
    loss = torch.zeros_like(ce_sum)
    if settings.with_ce:
        by_row = isinstance(settings.ce_scale, Tensor) and settings.ce_scale.ndim > 0
        loss += (settings.ce_scale * ce_N).sum() if by_row else settings.ce_scale * ce_sum
    if settings.comparison.learns:
        loss += settings.comparison.scale * kl_sum
    return _Sums(loss, ce_sum, kl_sum, entropy_sum, grad_hidden_ND, grad_head_VD)


class _FusedCrossEntropyKL(torch.autograd.Function):
    """`fused_ce_kl` for autograd: the gradient is there before backward asks for it."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = _Rows(*tensors)
        ctx.needs = tuple(settings.differentiate and need for need in ctx.needs_input_grad[1:3])
        with torch.autocast(rows.hidden_ND.device.type, enabled=False):
            sums = _sums_and_gradients(rows, settings, ctx.needs)
        # The inputs serve only a second backward over a retained graph. What the first one hands out is not
        # kept, so that autograd may take the head's gradient for .grad as it is, without a copy.
        ctx.save_for_backward(*tensors)
        ctx.settings, ctx.gradients = settings, (sums.grad_hidden_ND, sums.grad_head_VD)
        ctx.dtypes = rows.hidden_ND.dtype, rows.head_VD.dtype
        ctx.mark_non_differentiable(sums.ce_sum, sums.kl_sum, sums.entropy_sum)
        return sums.loss, sums.ce_sum, sums.kl_sum, sums.entropy_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            rows = _Rows(*ctx.saved_tensors)  # raises torch's own error where the graph was not retained
            with torch.autocast(upstream.device.type, enabled=False):
                gradients = _sums_and_gradients(rows, ctx.settings, ctx.needs)[4:]
        # On CPU reading the factor is free and may spare a pass over the head's gradient; on CUDA it waits.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        cast = [g if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, *cast, None, None, None
