"""The maths of the objective: tensors in, sums or scalars out. No configuration, no module, no logging.

Shape legend, used as suffixes of names throughout:

    N tokens (rows)     M the first M of those rows, which also carry the teacher's signal (M <= N)
    D width of the student's hidden states (the teacher's may differ)      V vocabulary
    W shared prefix of the two vocabularies, min(V_student, V_teacher)     R rows of one block (`_Chunk`)
    E experts (in `routing`), K experts per token, L layers                X, Y layers of two models (in CKA)

Token losses are returned as *sums*: the caller divides once, by the tokens of the whole optimizer step, so
that neither accumulation nor sharding can change the gradient. CKA and the balance loss are statistics of a
sample and come as they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows whose logits are held at a time. The three constants were measured with the shapes of
# benchmarks/loss_step.py on one thread of an AMD EPYC (Zen 4): 256 rows save 2% of the time.
CHUNK_SIZE = 128
# On CPU the passes over the logits go by blocks of this many rows; 1 to 32 are alike, 128 costs 2%.
CPU_BLOCK_ROWS = 4
# On CPU the logits' product goes by tiles of the vocabulary; 512 to 2048 are alike, untiled costs 8%.
CPU_VOCABULARY_TILE = 1024


# --------------------------------------------------------------------------------------------------------
# Cross-entropy and KL straight from hidden states
# --------------------------------------------------------------------------------------------------------


class LogitLoss(NamedTuple):
    """What `fused_ce_kl` returns: one scalar to differentiate and the two sums to log."""

    loss: Tensor  # scalar with gradient: ce_scale * ce_sum + kl_scale * kl_sum
    ce_sum: Tensor  # detached scalar, nats: sum over the N rows of the cross-entropy
    kl_sum: Tensor  # detached scalar, nats: sum over the first M rows of T^2 * KL(teacher_T || student_T)


def fused_ce_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher_hidden_MD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    *,
    ce_scale: float | Tensor,
    kl_scale: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> LogitLoss:
    """Cross-entropy and forward KL of a language-model head, without ever holding [N, V] logits.

    Rows are taken `chunk_size` at a time and the gradient is computed in the forward pass, while the chunk's
    logits are at hand. Cross-entropy is `torch.nn.functional.cross_entropy`'s (label smoothing included) on
    all N rows and the student's whole vocabulary. KL is the real divergence, the teacher's entropy in it, so
    0 where the two agree: KL(softmax(t / T) || softmax(s / T)) times T^2 (Hinton et al. 2015, section 2: the
    gradient then keeps its size whatever T), on the first M rows, with both sides renormalised over the
    shared prefix of the vocabularies.

    Args:
        hidden_ND: [N, D] student hidden states after the final norm, any floating dtype.
        head_VD: [V, D] student head weights, a whole tensor (not a DTensor shard).
        targets_N: [N] int64 next-token ids in [0, V). There is no ignore index: pass supervised rows only.
        teacher_hidden_MD: [M, D_t] teacher hidden states of the *first* M rows, or None for M = 0.
        teacher_head_VD: [V_t, D_t] teacher head weights; both or neither. The teacher gets no gradient.
        ce_scale: factor of the cross-entropy sum, a float or a 0-d tensor; a constant to autograd.
        kl_scale: factor of the KL sum, likewise. A *float* 0 skips the work that only a gradient needs;
            both sums are reported all the same.
        temperature: T > 0, a float or a 0-d tensor (never read back to the host).
        label_smoothing: in [0, 1].
        chunk_size: rows at a time. Memory above inputs and gradients is about 4 * chunk_size * (V + W) bytes.

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
        ValueError: shapes that do not fit, only half a teacher, or more teacher rows than student rows.
    """
    teacher_hidden_MD, teacher_head_VD = _check_rows(
        hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD, chunk_size
    )
    rows = _Rows(hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD)
    settings = _Settings(
        ce_scale=_constant(ce_scale),
        kl_scale=_constant(kl_scale),
        temperature=_constant(temperature),
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
        operand_dtype=rows.operand_dtype,
        differentiate=torch.is_grad_enabled(),
    )
    return LogitLoss(*_FusedCrossEntropyKL.apply(settings, *rows))


class TokenStatistics(NamedTuple):
    """What `token_statistics` returns, one number per row; the last three are empty without a teacher."""

    nll_N: Tensor  # nats, float32: negative log-likelihood over the student's whole vocabulary
    kl_M: Tensor  # nats, float32: KL(teacher || student) at temperature 1 over the shared prefix
    agree_M: Tensor  # bool: the two name the same token of the shared prefix first
    teacher_entropy_M: Tensor  # nats, float32: the teacher's entropy over the shared prefix


@torch.no_grad()
def token_statistics(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher_hidden_MD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> TokenStatistics:
    """Per-token numbers for validation, chunked and without gradient; arguments as in `fused_ce_kl`."""
    teacher_hidden_MD, teacher_head_VD = _check_rows(
        hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD, chunk_size
    )
    rows = _Rows(hidden_ND, head_VD, targets_N, teacher_hidden_MD, teacher_head_VD)
    n, m, dtype = len(hidden_ND), len(teacher_hidden_MD), rows.result_dtype
    nll_N = hidden_ND.new_empty(n, dtype=dtype)
    kl_M, entropy_M = hidden_ND.new_empty(m, dtype=dtype), hidden_ND.new_empty(m, dtype=dtype)
    agree_M = hidden_ND.new_empty(m, dtype=torch.bool)
    operands = rows.cast(rows.operand_dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for chunk in _chunks(operands, chunk_size, dtype):
            for span, student_RV, teacher_RW in chunk.blocks():
                log_p_RV = student_RV.log_softmax(-1)
                nll_N[span] = -log_p_RV.gather(1, targets_N[span, None]).squeeze(1)
                if teacher_RW is not None:
                    width = teacher_RW.shape[1]
                    # As it is over one vocabulary: normalising twice would make the KL of equals 1e-8, not 0.
                    log_qs_RW = log_p_RV if width == len(head_VD) else log_p_RV[:, :width].log_softmax(-1)
                    log_qt_RW = teacher_RW.log_softmax(-1)
                    qt_RW = log_qt_RW.exp()
                    kl_M[span] = (qt_RW * (log_qt_RW - log_qs_RW)).sum(-1)
                    entropy_M[span] = -(qt_RW * log_qt_RW).sum(-1)
                    agree_M[span] = log_qs_RW.argmax(-1) == log_qt_RW.argmax(-1)
    return TokenStatistics(nll_N.float(), kl_M.float(), agree_M, entropy_M.float())


def _check_rows(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher_hidden_MD: Tensor | None,
    teacher_head_VD: Tensor | None,
    chunk_size: int,
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

    def cast(self, dtype: torch.dtype) -> "_Rows":
        """Detached operands in `dtype`, uncopied where they are so already, the teacher's head cut to W."""
        width = min(len(self.head_VD), len(self.teacher_head_VD)) if len(self.teacher_hidden_MD) else 0
        return _Rows(
            self.hidden_ND.detach().to(dtype),
            self.head_VD.detach().to(dtype),
            self.targets_N,
            self.teacher_hidden_MD.to(dtype),
            self.teacher_head_VD[:width].to(dtype),
        )


class _Chunk(NamedTuple):
    """The logits of some rows: views of buffers that the next chunk overwrites."""

    start: int
    student: Tensor  # [rows, V]
    teacher: Tensor  # [taught, W]: the first `taught` of those rows, over the shared prefix

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield (rows of the call, student [R, V], teacher [R, W] or None), the taught rows first.

        On an accelerator a block is as large as it can be: few and large kernels. On CPU it is a few rows, so
        that it stays in the cache from one pass over the vocabulary to the next.
        """
        step = CPU_BLOCK_ROWS if self.student.device.type == "cpu" else max(1, len(self.student))
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
    """Everything of a `fused_ce_kl` call that is not one of its rows."""

    ce_scale: float | Tensor
    kl_scale: float | Tensor
    temperature: float | Tensor
    label_smoothing: float
    chunk_size: int
    operand_dtype: torch.dtype
    differentiate: bool  # whether autograd records this call

    @property
    def with_ce(self) -> bool:
        """Whether the gradient has a cross-entropy part; a tensor is never asked, as the host would wait."""
        return isinstance(self.ce_scale, Tensor) or self.ce_scale != 0.0

    @property
    def with_kl(self) -> bool:
        """Whether the gradient has a KL part."""
        return isinstance(self.kl_scale, Tensor) or self.kl_scale != 0.0


def _constant(scale: float | Tensor) -> float | Tensor:
    return scale.detach() if isinstance(scale, Tensor) else float(scale)


class _Scratch:
    """Buffers for the passes over a block, made once a call: fresh pages cost more than the pass itself."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(like):
            self._buffers[name] = buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        return buffer[: len(like)]


def _block(
    student_RV: Tensor,
    targets_R: Tensor,
    teacher_RW: Tensor | None,
    settings: _Settings,
    scratch: _Scratch,
    differentiate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return CE [R] and T^2 KL [R] of one block; where asked, its logits become their own gradient.

    With z the student's logits, p = softmax(z), y one-hot and e the label smoothing:

        CE = -(1 - e) log p[y] - e / V sum_v log p[v]        dCE / dz = p - (1 - e) y - e / V

    The passes are in place or into `scratch`; the teacher's logits are overwritten too.
    """
    smoothing, share = settings.label_smoothing, settings.label_smoothing / student_RV.shape[1]
    log_p_RV = torch.log_softmax(student_RV, -1, out=scratch("log_p", student_RV))
    ce_R = log_p_RV.gather(1, targets_R[:, None]).squeeze(1) * (smoothing - 1.0)
    if smoothing:
        ce_R -= log_p_RV.sum(-1) * share
    kl_R = None
    if teacher_RW is not None:
        kl_R = _kl(student_RV, log_p_RV, teacher_RW, settings, scratch, differentiate and settings.with_kl)
    if not differentiate:
        return ce_R, kl_R

    if settings.with_ce:
        torch.exp(log_p_RV, out=student_RV)
        if smoothing:
            student_RV.sub_(share)
        target_R1 = targets_R[:, None]  # not scatter_add_, which is not deterministic on CUDA
        student_RV.scatter_(1, target_R1, student_RV.gather(1, target_R1) - (1.0 - smoothing))
        student_RV.mul_(settings.ce_scale)
    else:
        student_RV.zero_()
    if teacher_RW is not None and settings.with_kl:
        student_RV[:, : teacher_RW.shape[1]].add_(teacher_RW)
    return ce_R, kl_R


def _kl(
    student_RV: Tensor,
    log_p_RV: Tensor,
    teacher_RW: Tensor,
    settings: _Settings,
    scratch: _Scratch,
    differentiate: bool,
) -> Tensor:
    """Return T^2 KL [R]; where asked, kl_scale times its gradient takes the place of the teacher's logits.

    With q_s and q_t the softmax of student and teacher over the shared prefix at temperature T:

        T^2 KL = T^2 sum_w q_t (log q_t - log q_s)        d(T^2 KL) / dz = T (q_s - q_t)
    """
    temperature, width = settings.temperature, teacher_RW.shape[1]
    plain = not isinstance(temperature, Tensor) and temperature == 1.0
    if not plain:
        teacher_RW.div_(temperature)
    log_qt_RW = torch.log_softmax(teacher_RW, -1, out=scratch("log_qt", teacher_RW))
    if plain and width == student_RV.shape[1]:
        log_qs_RW = log_p_RV
    else:
        torch.div(student_RV[:, :width], temperature, out=teacher_RW)
        log_qs_RW = torch.log_softmax(teacher_RW, -1, out=scratch("log_qs", teacher_RW))
    difference_RW = torch.sub(log_qt_RW, log_qs_RW, out=teacher_RW)
    qt_RW = log_qt_RW.exp_()
    kl_R = difference_RW.mul_(qt_RW).sum(-1) * (temperature * temperature)
    if differentiate:
        torch.exp(log_qs_RW, out=teacher_RW).sub_(qt_RW).mul_(settings.kl_scale * temperature)
    return kl_R


class _Sums(NamedTuple):
    ce_sum: Tensor
    kl_sum: Tensor
    grad_hidden_ND: Tensor | None
    grad_head_VD: Tensor | None


def _sums_and_gradients(rows: _Rows, settings: _Settings, needs: tuple[bool, bool]) -> _Sums:
    """Go through the chunks once: the two sums, and the gradient of the scaled loss where `needs` says so."""
    dtype, scratch = rows.result_dtype, _Scratch()
    operands = rows.cast(settings.operand_dtype)
    n, m = len(rows.hidden_ND), len(rows.teacher_hidden_MD)
    ce_N, kl_M = rows.hidden_ND.new_empty(n, dtype=dtype), rows.hidden_ND.new_empty(m, dtype=dtype)
    grad_hidden_ND = torch.zeros_like(rows.hidden_ND, dtype=dtype) if needs[0] else None
    grad_head_VD: Tensor | None = None
    for chunk in _chunks(operands, settings.chunk_size, dtype):
        for span, student_RV, teacher_RW in chunk.blocks():
            ce_N[span], kl_R = _block(
                student_RV, rows.targets_N[span], teacher_RW, settings, scratch, differentiate=any(needs)
            )
            if kl_R is not None:
                kl_M[span] = kl_R
        # Without a cross-entropy part, rows that carry no KL have no gradient.
        count = len(chunk.student) if settings.with_ce else len(chunk.teacher) * settings.with_kl
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
    return _Sums(ce_N.sum(), kl_M.sum(), grad_hidden_ND, grad_head_VD)


class _FusedCrossEntropyKL(torch.autograd.Function):
    """`fused_ce_kl` for autograd: the gradient is there before backward asks for it."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = _Rows(*tensors)
        ctx.needs = tuple(settings.differentiate and need for need in ctx.needs_input_grad[1:3])
        with torch.autocast(rows.hidden_ND.device.type, enabled=False):
            sums = _sums_and_gradients(rows, settings, ctx.needs)
        # The inputs serve only a second backward over a retained graph. What the first one hands out is not
        # kept, so that autograd may take the head's gradient for .grad as it is, without a copy.
        ctx.save_for_backward(*tensors)
        ctx.settings, ctx.gradients = settings, (sums.grad_hidden_ND, sums.grad_head_VD)
        ctx.dtypes = rows.hidden_ND.dtype, rows.head_VD.dtype
        loss = torch.zeros_like(sums.ce_sum)
        if settings.with_ce:
            loss += settings.ce_scale * sums.ce_sum
        if settings.with_kl:
            loss += settings.kl_scale * sums.kl_sum
        ctx.mark_non_differentiable(sums.ce_sum, sums.kl_sum)
        return loss, sums.ce_sum, sums.kl_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            rows = _Rows(*ctx.saved_tensors)  # raises torch's own error where the graph was not retained
            with torch.autocast(upstream.device.type, enabled=False):
                gradients = _sums_and_gradients(rows, ctx.settings, ctx.needs)[2:]
        # On CPU reading the factor is free and may spare a pass over the head's gradient; on CUDA it waits.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        cast = [g if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, *cast, None, None, None


# --------------------------------------------------------------------------------------------------------
# CKA
# --------------------------------------------------------------------------------------------------------

# Below this share of a Gram matrix's energy, what centring leaves is rounding. Measured in float32 on 4 to
# 512 samples: at most 1e-15 where all but one are equal, 7e-7 where one is a thousand times the others.
NEGLIGIBLE_ENERGY = 1e-11


class MinibatchHSIC(NamedTuple):
    """Hilbert-Schmidt independence criteria of one sample: between all pairs, and of each with itself."""

    cross_XY: Tensor
    self_X: Tensor
    self_Y: Tensor


def linear_cka(x_ND: Tensor, y_NE: Tensor, *, debiased: bool = True) -> Tensor:
    """Linear centred kernel alignment of two sets of features of the same N samples; differentiable.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with linear kernels (Kornblith et al. 2019, eq. 1).
    Debiased takes the unbiased HSIC of Song et al. 2012 (eq. 3 of Nguyen, Raghu & Kornblith 2021), whose
    expectation is 0 for independent features however few the samples; it may be slightly negative.

    Args:
        x_ND: [N, D] finite features, any floating dtype and scale.
        y_NE: [N, E] features of the same samples.
        debiased: the unbiased estimator, which needs at least 4 samples; the plain one needs 2.

    Returns:
        A scalar in float32 (float64 where either input is). With too few samples, or where one input is
        constant over the samples (for the debiased estimator: constant but for one of them), CKA is 0/0; it
        is *defined* as 0 with a zero gradient. Never NaN for finite inputs. Autocast is off inside.
    """
    return cka_matrix([x_ND], [y_NE], debiased=debiased)[0, 0]


def cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor], *, debiased: bool = True) -> Tensor:
    """`linear_cka` of every x with every y, [len(xs), len(ys)]; each Gram matrix is computed once.

    All features are of the same N samples, their widths may differ. Pass one list twice for the matrix of a
    model with itself. Raises ValueError where there is nothing to compare or the samples do not match.
    """
    with torch.autocast(_device_type(xs, ys), enabled=False):
        features_X = [_unit(x) for x in _centred(xs)]
        features_Y = features_X if ys is xs else [_unit(y) for y in _centred(ys)]
        return cka_from_hsic(_hsic(features_X, features_Y, debiased))


def cka_from_hsic(hsic: MinibatchHSIC) -> Tensor:
    """[X, Y] CKA: cross / sqrt(self self), defined as 0 (with zero gradient) where a self term is 0."""
    defined_X, defined_Y = hsic.self_X > 0, hsic.self_Y > 0
    # Where undefined, the root is taken of 1: masking its result alone would let through a NaN gradient.
    norm_X = hsic.self_X.where(defined_X, 1.0).sqrt()
    norm_Y = hsic.self_Y.where(defined_Y, 1.0).sqrt()
    cka_XY = hsic.cross_XY / norm_X[:, None] / norm_Y[None, :]
    return cka_XY.where(defined_X[:, None] & defined_Y[None, :], 0.0)


def minibatch_hsic(xs: Sequence[Tensor], ys: Sequence[Tensor], *, debiased: bool = True) -> MinibatchHSIC:
    """Linear HSIC of one minibatch, in the units of the features, to be averaged over minibatches.

    Debiased: HSIC_1 of Nguyen, Raghu & Kornblith 2021, eq. 3; plain: tr(KHLH) / (N - 1)^2. All zeros with
    fewer samples than the estimator needs (4 and 2). Arguments as in `cka_matrix`.
    """
    with torch.autocast(_device_type(xs, ys), enabled=False):
        features_X = _centred(xs)
        return _hsic(features_X, features_X if ys is xs else _centred(ys), debiased)


def _device_type(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> str:
    if not xs or not ys:
        raise ValueError("CKA needs at least one set of features on either side")
    if any(f.ndim != 2 or len(f) != len(xs[0]) for f in (*xs, *ys)):
        shapes = [[tuple(f.shape) for f in side] for side in (xs, ys)]
        raise ValueError(f"CKA needs [N, D] features of the same N samples, got {shapes[0]} and {shapes[1]}")
    return xs[0].device.type


def _centred(features: Sequence[Tensor]) -> list[Tensor]:
    """Subtract the mean over samples, in float32 at least; what is only the mean's rounding becomes zero."""
    centred = []
    for x_ND in features:
        x_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
        residue_ND = x_ND - x_ND.mean(0, keepdim=True) if len(x_ND) else x_ND
        floor = 32 * torch.finfo(x_ND.dtype).eps * torch.linalg.vector_norm(x_ND.detach())
        constant = torch.linalg.vector_norm(residue_ND.detach()) <= floor
        centred.append(residue_ND.masked_fill(constant, 0.0))
    return centred


def _unit(x_ND: Tensor) -> Tensor:
    """Scale to Frobenius norm 1: CKA does not see it, and squares of squares stay inside float32's range.

    The norm is a constant to autograd; the gradient of a function that ignores scale is the same with it.
    """
    norm = torch.linalg.vector_norm(x_ND.detach())
    return x_ND / norm.where(norm > 0, 1.0)


def _hsic(xs: list[Tensor], ys: list[Tensor], debiased: bool) -> MinibatchHSIC:
    """HSIC of centred features, on the Gram side [N, N] or the feature side [D, E], whichever is smaller."""
    n = len(xs[0])
    dtype = torch.float64 if torch.float64 in {f.dtype for f in (*xs, *ys)} else torch.float32
    if n < (4 if debiased else 2):
        nothing = sum((f.to(dtype).sum() * 0.0 for f in (*xs, *ys)), torch.zeros((), device=xs[0].device))
        return MinibatchHSIC(*(nothing.to(dtype).expand(s) for s in ((len(xs), len(ys)), len(xs), len(ys))))
    # Apple's GPUs have no float64, which the feature side needs.
    gram = n <= max(f.shape[1] for f in (*xs, *ys)) or xs[0].device.type == "mps"
    side = _gram_side if gram else _feature_side
    return MinibatchHSIC(*(part.to(dtype) for part in side(xs, ys, debiased, dtype)))


def _gram_side(xs: list[Tensor], ys: list[Tensor], debiased: bool, dtype: torch.dtype) -> MinibatchHSIC:
    """HSIC as inner products of flattened Gram matrices.

    The unbiased HSIC is the inner product of U-centred matrices (Szekely & Rizzo 2014) over N (N - 3). They
    are formed explicitly: in the usual formula of traces and sums, one row with a massive activation leaves
    nothing of the others in float32.
    """
    n = len(xs[0])
    scale = n * (n - 3) if debiased else (n - 1) ** 2

    def flat(features: list[Tensor]) -> Tensor:
        grams = [x_ND.to(dtype) @ x_ND.to(dtype).T for x_ND in features]
        return torch.stack([(_u_centred(k_NN) if debiased else k_NN).flatten() for k_NN in grams])

    x_XS = flat(xs)
    y_YS = x_XS if ys is xs else flat(ys)
    return MinibatchHSIC(x_XS @ y_YS.T / scale, x_XS.square().sum(-1) / scale, y_YS.square().sum(-1) / scale)


def _u_centred(k_NN: Tensor) -> Tensor:
    """U-centre a Gram matrix, diagonal left out; exactly zero where only rounding would be left."""
    n = len(k_NN)
    off_NN = k_NN - torch.diag(k_NN.diagonal())
    row_N = off_NN.sum(1)
    centred_NN = off_NN - (row_N[:, None] + row_N[None, :]) / (n - 2) + row_N.sum() / ((n - 1) * (n - 2))
    centred_NN = centred_NN - torch.diag(centred_NN.diagonal())
    energy, before = centred_NN.detach().square().sum(), k_NN.detach().square().sum()
    return centred_NN.masked_fill(energy <= NEGLIGIBLE_ENERGY * before, 0.0)


def _feature_side(xs: list[Tensor], ys: list[Tensor], debiased: bool, dtype: torch.dtype) -> MinibatchHSIC:
    """HSIC from [D, E] products, in float64: narrow features make it cheap, and the debiased form cancels.

    With centred features the sums of the Gram matrices vanish, and the unbiased HSIC times N (N - 3) is
    |X^T Y|^2 - N / (N - 2) sum_i |x_i|^2 |y_i|^2 + |X|^2 |Y|^2 / ((N - 1) (N - 2)).
    """
    n = len(xs[0])

    def pair(x_ND: Tensor, y_NE: Tensor) -> tuple[Tensor, Tensor]:
        plain = (x_ND.T @ y_NE).square().sum()
        if not debiased:
            return plain / (n - 1) ** 2, plain
        x_N, y_N = x_ND.square().sum(1), y_NE.square().sum(1)
        value = plain - n / (n - 2) * (x_N * y_N).sum() + x_N.sum() * y_N.sum() / ((n - 1) * (n - 2))
        return value / (n * (n - 3)), plain

    def alone(features: list[Tensor]) -> Tensor:
        pairs = [pair(x_ND, x_ND) for x_ND in features]
        return torch.stack([v.masked_fill(v * n**2 <= NEGLIGIBLE_ENERGY * plain, 0.0) for v, plain in pairs])

    def recentred(features: list[Tensor]) -> list[Tensor]:
        # Float32 centring leaves a mean of 1e-8, to which this form, unlike the Gram side's, is not blind.
        return [x_ND.double() - x_ND.double().mean(0, keepdim=True) for x_ND in features]

    xs64 = recentred(xs)
    ys64 = xs64 if ys is xs else recentred(ys)
    cross_XY = torch.stack([torch.stack([pair(x_ND, y_NE)[0] for y_NE in ys64]) for x_ND in xs64])
    self_X = alone(xs64)
    return MinibatchHSIC(cross_XY, self_X, self_X if ys is xs else alone(ys64))


# --------------------------------------------------------------------------------------------------------
# Routing
# --------------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """What the routers of all layers did with the valid tokens of a micro-batch."""

    load_LE: Tensor  # detached float32: assignments per expert; each layer's sum to tokens * K
    probability_LE: Tensor  # with gradient: mean router probability P_e; zeros where no token is valid
    entropy_L: Tensor  # detached, nats: sum over tokens of the router's entropy
    z_sum: Tensor  # scalar with gradient: sum over tokens, mean over layers, of logsumexp(logits)^2
    tokens: Tensor  # 0-d float32: valid tokens


def routing(router_logits: Sequence[Tensor], top_k: int, valid_N: Tensor) -> Routing:
    """Summarise the router logits of one forward pass, in float32 and without waiting for the device.

    Args:
        router_logits: one [N, E] tensor per layer, any floating dtype, the same E in all of them.
        top_k: experts per token K; the K most probable ones (transformers' choice: by the float32 softmax).
        valid_N: [N] bool; tokens where it is False (padding) count in nothing, whatever their logits.

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
        load_LNE = torch.zeros_like(p_LNE, requires_grad=False).scatter_(2, chosen_LNK, 1.0)
        return Routing(
            load_LE=(load_LNE * weight_N1).sum(1),
            probability_LE=(p_LNE * weight_N1).sum(1) / tokens.clamp(min=1.0),
            entropy_L=-(p_LNE * log_p_LNE * weight_N1).detach().sum((1, 2)),
            z_sum=(logits_LNE.logsumexp(-1).square() * weight_N1.T).sum(1).mean(),
            tokens=tokens,
        )


def balance_loss(routing: Routing) -> Tensor:
    """Switch Transformer's load-balancing loss of each layer, [L] (Fedus et al. 2021, eq. 4 to 6).

    E sum_e f_e P_e, with f_e the share of the layer's N K assignments that expert e received and P_e its mean
    router probability: 1 at balance, up to E when collapsed (it is no lower bound: f and P may disagree).
    transformers' `load_balancing_loss_func` is K times this, and pools the layers, so that two layers
    collapsed on different experts look balanced; here each layer answers for itself. 0, with a graph, where
    no token is valid.
    """
    share_LE = routing.load_LE / routing.load_LE.sum(-1, keepdim=True).clamp(min=1.0)
    return routing.load_LE.shape[-1] * (share_LE * routing.probability_LE).sum(-1)
