"""A teacher by some of its tokens: against torch's dense losses in float64, and by hand at its limits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agri_moe.losses import SparseTeacher, fused_ce_kl, token_statistics
from tests.test_losses import Case

pytestmark = pytest.mark.usefixtures("small_blocks")


def teacher_probs(case: Case) -> Tensor:
    return (case.teacher_hidden @ case.teacher_head.T).double().softmax(-1)


def topk(probs_MV: Tensor, k: int) -> SparseTeacher:
    top = probs_MV.topk(k)
    tail_M = probs_MV.scatter(1, top.indices, 0.0).sum(-1)
    entropy_M = torch.distributions.Categorical(probs=probs_MV).entropy()
    return SparseTeacher(top.indices, top.values, tail_M, entropy_M, probs_MV.shape[1])


def sampled(probs_MV: Tensor, draws: int, seed: int = 0) -> SparseTeacher:
    """As a cache keeps it: distinct tokens with their share of the draws, filled up with tokens at 0."""
    drawn = torch.multinomial(probs_MV, draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    counts_MV = torch.zeros_like(probs_MV).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=probs_MV.dtype))
    kept = int((counts_MV > 0).sum(-1).max())
    top = counts_MV.topk(kept)
    ids = top.indices.where(top.values > 0, 0)
    entropy_M = torch.distributions.Categorical(probs=probs_MV).entropy()
    return SparseTeacher(ids, top.values / draws, None, entropy_M, probs_MV.shape[1])


def fused(case: Case, teacher: SparseTeacher, **options):
    return fused_ce_kl(case.hidden, case.head, case.targets, None, None, teacher, **options)


def reference(case: Case, teacher: SparseTeacher, ce_scale: float, kl_scale: float) -> Tensor:
    """Buckets, made and compared with torch's own kl_div."""
    logits = case.hidden.double() @ case.head.double().T
    ce = F.cross_entropy(logits, case.targets, reduction="sum")
    m, width = len(teacher.ids_MK), min(len(case.head), teacher.vocabulary)
    q_MW = logits[:m, :width].softmax(-1)
    kl = logits.new_zeros(())
    for row in range(m):
        ids, p, q = teacher.ids_MK[row], teacher.probs_MK[row].double(), q_MW[row]
        if teacher.tail_M is None:
            kl = kl - teacher.entropy_M[row] - (p * q[ids].log()).sum()
            continue
        outside = torch.ones(width, dtype=torch.bool)
        outside[ids] = False
        buckets_q, buckets_p = q[ids], p
        if outside.any():
            buckets_q = torch.cat([buckets_q, q[outside].sum()[None]])
            buckets_p = torch.cat([p, teacher.tail_M[row, None].double()])
        kl = kl + F.kl_div(buckets_q.log(), buckets_p, reduction="sum")
    return ce_scale * ce + kl_scale * kl


@pytest.mark.parametrize("k", [1, 3, 16, 17])
@pytest.mark.parametrize(("v", "teacher_v"), [(23, 23), (23, 17), (17, 17)])
@pytest.mark.parametrize("chunk_size", [3, 128])
def test_value_and_gradient_equal_buckets_made_by_hand(k, v, teacher_v, chunk_size):
    case = Case(v=v, teacher_v=teacher_v)
    teacher = topk(teacher_probs(case), k)
    ours, expected = fused(case, teacher, ce_scale=0.5, kl_scale=2.0, chunk_size=chunk_size), None
    expected = reference(case, teacher, 0.5, 2.0)
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(case.gradients(ours.loss), case.gradients(expected))


@pytest.mark.parametrize("chunk_size", [3, 128])
def test_samples_equal_their_cross_entropy_less_the_entropy(chunk_size):
    case = Case()
    teacher = sampled(teacher_probs(case), draws=50)
    assert (teacher.probs_MK == 0).any(), "rows of unequal length are filled up"
    ours, expected = fused(case, teacher, ce_scale=0.5, kl_scale=2.0, chunk_size=chunk_size), None
    expected = reference(case, teacher, 0.5, 2.0)
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(case.gradients(ours.loss), case.gradients(expected))


def test_all_tokens_are_the_dense_divergence():
    case = Case()
    ours = fused(case, topk(teacher_probs(case), 23), ce_scale=0.5, kl_scale=2.0)
    dense = case.fused(ce_scale=0.5, kl_scale=2.0)
    for a, b in zip(ours[:3], dense[:3], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(case.gradients(ours.loss), case.gradients(dense.loss))


def test_samples_are_unbiased_in_value_and_gradient():
    """The mean over many draws comes within four standard errors of the dense divergence."""
    case = Case(n=3, m=3)
    dense = case.fused(ce_scale=0.0, kl_scale=1.0)
    gradient = case.gradients(dense.loss)[0].flatten()
    values, gradients = [], []
    for seed in range(200):
        loss = fused(case, sampled(teacher_probs(case), draws=20, seed=seed), ce_scale=0.0, kl_scale=1.0)
        values.append(loss.kl_sum)
        gradients.append(case.gradients(loss.loss)[0].flatten())
    for drawn, expected in ((torch.stack(values)[:, None], dense.kl_sum[None]), (torch.stack(gradients), gradient)):
        error = drawn.std(0) / math.sqrt(len(drawn))
        assert ((drawn.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


def test_leaving_the_tail_out_overstates_the_divergence():
    """What others do: the known tokens alone, as they are or renormalised."""
    case = Case()
    probs = teacher_probs(case)
    full = case.fused(ce_scale=0.0, kl_scale=1.0).kl_sum
    bucket = fused(case, topk(probs, 3), ce_scale=0.0, kl_scale=1.0).kl_sum
    top = topk(probs, 3)
    renormalised = top._replace(
        probs_MK=top.probs_MK / top.probs_MK.sum(-1, keepdim=True), tail_M=torch.zeros_like(top.tail_M)
    )
    assert 0 < bucket < full, "fewer buckets tell less (data processing inequality)"
    assert fused(case, renormalised, ce_scale=0.0, kl_scale=1.0).kl_sum > full


@pytest.mark.parametrize("k", [1, 5, 22])
def test_an_equal_teacher_gives_zero_and_no_gradient(k):
    case = Case(n=7, m=7)
    probs = (case.hidden @ case.head.T).detach().softmax(-1)
    loss = fused(case, topk(probs, k), ce_scale=0.0, kl_scale=1.0)
    assert loss.kl_sum.abs() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in case.gradients(loss.loss))


@pytest.mark.parametrize("tail", [0.0, 1e-30, 1e-7, 0.5, 1.0 - 1e-7])
def test_any_tail_is_finite(tail):
    """The student may have no mass at all where the teacher has some, and the other way round."""
    logits = torch.tensor([[80.0, 70.0, -80.0, -90.0]]).requires_grad_()
    for ids in ([0, 1], [2, 3]):
        share = torch.tensor([[0.75, 0.25]]) * (1 - tail)
        teacher = SparseTeacher(torch.tensor([ids]), share, torch.tensor([tail]), torch.tensor([1.0]), 4)
        loss = fused_ce_kl(logits, torch.eye(4), torch.tensor([0]), None, None, teacher, ce_scale=0.0, kl_scale=1.0)
        (gradient,) = torch.autograd.grad(loss.loss, logits)
        assert torch.isfinite(loss.loss)
        assert torch.isfinite(gradient).all()
        assert gradient.sum().abs() < 1e-5, "both sides add up to 1"


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_gradcheck(kind):
    case = Case(n=5, m=3)
    teacher = topk(teacher_probs(case), 4) if kind == "topk" else sampled(teacher_probs(case), 9)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return fused_ce_kl(
            hidden, head, case.targets, None, None, teacher, ce_scale=0.7, kl_scale=1.3, chunk_size=2
        ).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.head))


def test_statistics():
    case = Case()
    probs = teacher_probs(case)
    for teacher in (topk(probs, 23), topk(probs, 5)):
        seen = token_statistics(case.hidden, case.head, case.targets, None, None, teacher, chunk_size=4)
        dense = token_statistics(*case.tensors)
        torch.testing.assert_close(seen.nll_N, dense.nll_N)
        assert seen.agree_M.tolist() == dense.agree_M.tolist()
        torch.testing.assert_close(seen.teacher_entropy_M, dense.teacher_entropy_M)
        expected = fused(case, teacher, ce_scale=0.0, kl_scale=1.0).kl_sum
        assert seen.kl_M.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(seen.kl_M) == 7


def test_misfits_are_refused():
    case = Case()
    teacher = topk(teacher_probs(case), 3)
    for options in ({"divergence": "reverse"}, {"temperature": 2.0}, {"temperature": torch.tensor(1.0)}):
        with pytest.raises(ValueError, match="forward divergence at temperature 1"):
            fused(case, teacher, ce_scale=1.0, kl_scale=1.0, **options)
    with pytest.raises(ValueError, match="ids and probabilities"):
        fused(case, teacher._replace(probs_MK=teacher.probs_MK[:, 1:]), ce_scale=1.0)
    with pytest.raises(ValueError, match="student rows"):
        fused(case, teacher._replace(tail_M=teacher.tail_M[1:]), ce_scale=1.0)
