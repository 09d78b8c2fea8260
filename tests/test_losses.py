"""fused_ce_kl and token_statistics against torch's dense losses in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from agri_moe.losses import LogitLoss, fused_ce_kl, token_statistics

pytestmark = pytest.mark.usefixtures("small_blocks")

DIVERGENCES = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


class Case:
    """Random student and teacher; float64 unless asked otherwise."""

    def __init__(self, n=11, m=7, d=5, v=23, teacher_d=6, teacher_v=23, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = randn(n, d).requires_grad_()
        self.head = randn(v, d).requires_grad_()
        self.targets = torch.randint(v, (n,), generator=generator)
        self.teacher_hidden = randn(m, teacher_d)
        self.teacher_head = randn(teacher_v, teacher_d)

    @property
    def tensors(self):
        return self.hidden, self.head, self.targets, self.teacher_hidden, self.teacher_head

    def fused(self, **options) -> LogitLoss:
        return fused_ce_kl(*self.tensors, **options)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.hidden, self.head))


def dense(
    case: Case,
    ce_scale,
    kl_scale=0.0,
    temperature=1.0,
    label_smoothing=0.0,
    divergence="forward",
    beta=0.5,
    with_entropy=False,
) -> LogitLoss:
    """The same by torch's own losses on full logits, in float64."""
    logits = case.hidden.double() @ case.head.double().T
    ce_N = F.cross_entropy(logits, case.targets, reduction="none", label_smoothing=label_smoothing)
    m, width = len(case.teacher_hidden), min(len(case.head), len(case.teacher_head))
    teacher = (case.teacher_hidden.double() @ case.teacher_head.double().T)[:, :width] / temperature
    student = logits[:m, :width] / temperature
    qs, qt = student.softmax(-1), teacher.softmax(-1)

    def kl(p, q):
        return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()

    mixture = beta * qt + (1 - beta) * qs
    values = {
        "forward": lambda: F.kl_div(student.log_softmax(-1), qt, reduction="sum"),
        "reverse": lambda: kl(qs, qt),
        "jsd": lambda: beta * kl(qt, mixture) + (1 - beta) * kl(qs, mixture),
    }
    kl_sum = values[divergence]() * temperature**2
    entropy = torch.distributions.Categorical(logits=teacher * temperature).entropy().sum() if m else torch.zeros(())
    loss = (ce_scale * ce_N).sum() + kl_scale * kl_sum
    return LogitLoss(loss, ce_N.sum().detach(), kl_sum.detach(), entropy.detach() if with_entropy else None)


def values_of(loss: LogitLoss) -> tuple[Tensor, ...]:
    return tuple(value.double() for value in loss if value is not None)


def assert_matches_dense(case: Case, chunk_size=128, **options) -> None:
    ours, reference = case.fused(chunk_size=chunk_size, **options), dense(case, **options)
    torch.testing.assert_close(values_of(ours), values_of(reference))
    torch.testing.assert_close(case.gradients(ours.loss), case.gradients(reference.loss))


# ------------------------------------------------------------------------------------------ fused_ce_kl


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 11, 64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_fused_equals_dense_reference(chunk_size, temperature, label_smoothing):
    options = {
        "ce_scale": 0.3,
        "kl_scale": 1.7,
        "temperature": temperature,
        "label_smoothing": label_smoothing,
    }
    assert_matches_dense(Case(), chunk_size, **options)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("teacher_v", [17, 23, 31])
def test_kl_renormalises_over_the_shared_prefix(teacher_v, temperature):
    options = {"ce_scale": 1.0, "kl_scale": 2.0, "temperature": temperature, "label_smoothing": 0.05}
    assert_matches_dense(Case(teacher_v=teacher_v), 4, **options)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_v", [17, 23, 31])
def test_every_divergence_equals_its_dense_reference(divergence, beta, temperature, teacher_v):
    options = {"divergence": divergence, "beta": beta, "temperature": temperature, "with_entropy": True}
    assert_matches_dense(Case(teacher_v=teacher_v), 4, ce_scale=0.3, kl_scale=1.7, label_smoothing=0.1, **options)
    assert_matches_dense(Case(m=0), 4, ce_scale=0.3, kl_scale=1.7, **options)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_every_divergence_vanishes_for_equals_with_its_gradient(divergence, beta):
    case = Case(teacher_d=5, dtype=torch.float32)
    case.teacher_hidden, case.teacher_head = case.hidden[:7].detach(), case.head.detach()
    for temperature in (1.0, 2.0):
        ours = case.fused(ce_scale=0.0, kl_scale=1.0, temperature=temperature, divergence=divergence, beta=beta)
        assert abs(ours.kl_sum) < 1e-6  # jsd: how log(beta) and log(1 - beta) are rounded
        assert all(gradient.abs().max() < 1e-6 for gradient in case.gradients(ours.loss))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_a_small_jensen_shannon_divergence_is_not_lost_in_rounding(beta):
    case = Case(n=8, m=8, v=50_000, teacher_d=5, teacher_v=50_000, dtype=torch.float32)
    case.teacher_hidden, case.teacher_head = (
        case.hidden.detach() + 1e-3 * case.teacher_hidden[:, :5],
        case.head.detach(),
    )
    options = {"ce_scale": 0.0, "kl_scale": 1.0, "divergence": "jsd", "beta": beta}
    ours, expected = case.fused(**options).kl_sum, dense(case, **options).kl_sum
    assert expected < 2e-5
    torch.testing.assert_close(ours.double(), expected, rtol=0.05, atol=0)


def single(logits: list[float]) -> tuple[Tensor, Tensor]:
    """Hidden states and head [V, 1] of one row that has these logits."""
    return torch.ones(1, 1, requires_grad=True), torch.tensor(logits)[:, None].requires_grad_()


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_extreme_disagreement_by_hand(scale, beta):
    # Student and teacher are each certain, and of different tokens. The limits are then exact: both KLs are the gap
    # between the two logits, 2 * scale, and jsd is the entropy of a coin that falls on the teacher with beta.
    targets, (hidden, head), (_, teacher_head) = (
        torch.tensor([0]),
        single([scale, -scale, -scale]),
        single([-scale, scale, -scale]),
    )
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    expected = {
        "forward": (2 * scale, [1.0, -1.0, 0.0]),  # q_s - q_t
        "reverse": (2 * scale, [0.0, 0.0, 0.0]),  # the student sees nothing but its own certainty
        "jsd": (entropy, [0.0, 0.0, 0.0]),
    }
    for divergence, (value, gradient) in expected.items():
        options = {"divergence": divergence, "beta": beta, "with_entropy": True}
        ours = fused_ce_kl(hidden, head, targets, hidden, teacher_head, ce_scale=0.0, kl_scale=1.0, **options)
        assert ours.kl_sum.item() == pytest.approx(value, rel=1e-5)
        assert ours.entropy_sum == 0
        torch.testing.assert_close(torch.autograd.grad(ours.loss, head)[0][:, 0], torch.tensor(gradient))


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_logits_equal_a_float64_reference(divergence, beta, temperature):
    torch.manual_seed(0)
    student, teacher = (1e4 * (2 * torch.rand(6, 9) - 1) for _ in range(2))
    student[0, :2] = torch.tensor([1e4, -1e4])
    teacher[0, :2], teacher[1], teacher[2] = torch.tensor([-1e4, 1e4]), student[1], -student[2]
    teacher[3:] = student[3:] + torch.randn(3, 9)
    head = torch.eye(9)
    student.requires_grad_()
    options = {"temperature": temperature, "divergence": divergence, "beta": beta, "with_entropy": True}
    ours = fused_ce_kl(student, head, torch.arange(6), teacher, head, ce_scale=1.0, kl_scale=1.0, **options)

    s, t = (logits.double().div(temperature).log_softmax(-1) for logits in (student, teacher))
    m = torch.stack([t + math.log(beta), s + math.log(1 - beta)]).logsumexp(0)
    forward, reverse = (t.exp() * (t - s)).sum(), (s.exp() * (s - t)).sum()
    jsd = beta * (t.exp() * (t - m)).sum() + (1 - beta) * (s.exp() * (s - m)).sum()
    kl = temperature**2 * {"forward": forward, "reverse": reverse, "jsd": jsd}[divergence]
    loss = F.cross_entropy(student.double(), torch.arange(6), reduction="sum") + kl
    torch.testing.assert_close(ours.kl_sum.double(), kl.detach(), rtol=1e-5, atol=2e-3)  # a logit's rounding is 1e-3
    gradients = [torch.autograd.grad(value, student)[0] for value in (ours.loss, loss)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=5e-3)
    assert ours.entropy_sum.isfinite()


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_divergences_equal_torch_distributions(divergence, beta):
    case = Case()
    q_s = torch.distributions.Categorical(logits=(case.hidden @ case.head.T)[:7] / 2)
    q_t = torch.distributions.Categorical(logits=case.teacher_hidden @ case.teacher_head.T / 2)
    m = torch.distributions.Categorical(probs=beta * q_t.probs + (1 - beta) * q_s.probs)
    divergence_of = torch.distributions.kl_divergence
    expected = {
        "forward": divergence_of(q_t, q_s),
        "reverse": divergence_of(q_s, q_t),
        "jsd": beta * divergence_of(q_t, m) + (1 - beta) * divergence_of(q_s, m),
    }[divergence]
    ours = case.fused(ce_scale=0.0, kl_scale=1.0, temperature=2.0, divergence=divergence, beta=beta, chunk_size=3)
    torch.testing.assert_close(ours.kl_sum, 4 * expected.sum().detach())
    torch.testing.assert_close(case.gradients(ours.loss), case.gradients(4 * expected.sum()))


def test_jensen_shannon_lies_between_the_two_divergences():
    """Over beta it tends to forward KL at 0, over 1 - beta to reverse KL at 1 (Agarwal et al. 2024, section 2)."""
    case = Case()

    def value(**options):
        return case.fused(ce_scale=0.0, kl_scale=1.0, **options).kl_sum.item()

    assert value(divergence="jsd", beta=1e-6) / 1e-6 == pytest.approx(value(), rel=1e-3)
    assert value(divergence="jsd", beta=1 - 1e-6) / 1e-6 == pytest.approx(value(divergence="reverse"), rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, torch.tensor(2.0)])
@pytest.mark.parametrize("teacher_v", [17, 23])
def test_entropy_is_the_teachers_at_temperature_one(temperature, teacher_v):
    case = Case(teacher_v=teacher_v)
    logits = case.teacher_hidden @ case.teacher_head.T
    expected = torch.distributions.Categorical(logits=logits[:, : min(23, teacher_v)]).entropy().sum()
    options = {"kl_scale": 0.0, "temperature": temperature, "chunk_size": 3}
    torch.testing.assert_close(case.fused(ce_scale=0.0, with_entropy=True, **options).entropy_sum, expected)
    assert case.fused(ce_scale=0.0, **options).entropy_sum is None
    assert Case(m=0).fused(ce_scale=1.0, with_entropy=True).entropy_sum == 0
    assert fused_ce_kl(*case.tensors[:3], ce_scale=1.0, with_entropy=True).entropy_sum == 0


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_a_factor_for_each_row(chunk_size):
    case = Case()
    factors = torch.rand(len(case.hidden), generator=torch.Generator().manual_seed(1))
    assert_matches_dense(case, chunk_size, ce_scale=factors.double(), kl_scale=0.5, label_smoothing=0.1)
    assert_matches_dense(case, chunk_size, ce_scale=torch.zeros(len(case.hidden)).double())
    with pytest.raises(ValueError, match="neither a number nor one for each row"):
        case.fused(ce_scale=factors[:-1])


def test_unknown_divergences_are_refused():
    with pytest.raises(ValueError, match="forward, reverse, jsd"):
        Case().fused(ce_scale=1.0, divergence="sideways")
    with pytest.raises(ValueError, match="beta"):
        Case().fused(ce_scale=1.0, divergence="jsd", beta=1.0)


def test_every_tile_of_a_larger_vocabulary_counts():
    # More than two tiles of the CPU product, the last of them partial, on either side.
    assert_matches_dense(Case(v=2500, teacher_v=2100), 4, ce_scale=1.0, kl_scale=1.0, temperature=2.0)


@pytest.mark.parametrize("m", [0, 1, 4, 8, 11])
@pytest.mark.parametrize(("ce_scale", "kl_scale"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_any_number_of_taught_rows_and_scales_of_zero(m, ce_scale, kl_scale):
    # A scale of zero skips gradient work; both sums are reported all the same (assert_close compares them).
    assert_matches_dense(Case(m=m), 4, ce_scale=ce_scale, kl_scale=kl_scale, temperature=2.0)


@given(
    n=st.integers(0, 9),
    taught=st.floats(0, 1),
    v=st.integers(2, 12),
    teacher_v=st.integers(1, 12),
    chunk_size=st.integers(1, 10),
    temperature=st.floats(0.25, 8),
    label_smoothing=st.floats(0, 1),
    divergence=st.sampled_from(DIVERGENCES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_fused_equals_dense_on_any_shape(
    n, taught, v, teacher_v, chunk_size, temperature, label_smoothing, divergence, seed
):
    case = Case(n=n, m=int(n * taught), v=v, teacher_v=teacher_v, seed=seed)
    options = {"temperature": temperature, "label_smoothing": label_smoothing}
    options |= {"divergence": divergence[0], "beta": divergence[1]}
    assert_matches_dense(case, chunk_size, ce_scale=0.7, kl_scale=1.3, **options)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("by_row", [False, True])
def test_gradcheck(divergence, beta, by_row):
    case = Case(n=5, m=3, d=3, v=7, teacher_v=6)

    def loss(hidden, head):
        options = {
            "ce_scale": torch.linspace(0, 1, 5) if by_row else 0.5,
            "kl_scale": 0.8,
            "temperature": 1.5,
            "label_smoothing": 0.1,
            "divergence": divergence,
            "beta": beta,
            "chunk_size": 2,
        }
        return fused_ce_kl(hidden, head, *case.tensors[2:], **options).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.head))


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_scales_and_temperature_may_be_tensors(divergence, beta, temperature):
    case = Case()
    floats = {"ce_scale": 0.3, "kl_scale": 1.7, "temperature": temperature}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in floats.items()}
    options = {"divergence": divergence, "beta": beta, "with_entropy": True}
    ours, reference = case.fused(**tensors, **options), dense(case, **floats, **options)
    torch.testing.assert_close(tuple(ours), tuple(reference), check_dtype=False, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case.gradients(ours.loss), case.gradients(reference.loss), rtol=1e-6, atol=1e-6)


def test_kl_and_its_gradient_vanish_when_teacher_equals_student():
    case = Case(teacher_d=5, dtype=torch.float32)
    case.teacher_hidden, case.teacher_head = case.hidden[:7].detach(), case.head.detach()
    ours = case.fused(ce_scale=0.0, kl_scale=1.0, temperature=2.0, chunk_size=3)
    assert ours.kl_sum == 0
    assert all(not gradient.any() for gradient in case.gradients(ours.loss))


def test_temperature_squared_keeps_the_size_of_the_gradient():
    # As T grows, T^2 KL tends to half the variance of (teacher - student) logits: finite, not zero.
    case = Case()
    m, logits = 7, case.hidden @ case.head.T
    gap = case.teacher_hidden @ case.teacher_head.T - logits[:m]
    limit = 0.5 * gap.var(-1, correction=0).sum().detach()
    ours = case.fused(ce_scale=0.0, kl_scale=1.0, temperature=1e4)
    torch.testing.assert_close(ours.kl_sum, limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0])
def test_upstream_gradient_and_second_backward(upstream):
    case = Case()
    options = {
        "ce_scale": torch.linspace(0, 1, 11).double(),
        "kl_scale": 1.0,
        "divergence": "jsd",
        "with_entropy": True,
    }
    expected = case.gradients(dense(case, **options).loss * upstream)
    loss = case.fused(**options, chunk_size=4).loss
    for _ in range(2):
        gradients = torch.autograd.grad(loss * upstream, (case.hidden, case.head), retain_graph=True)
        torch.testing.assert_close(gradients, expected)
    case.gradients(loss)
    with pytest.raises(RuntimeError, match="second time"):
        case.gradients(loss)


@pytest.mark.parametrize(("hidden", "head"), [(True, False), (False, True), (False, False)])
def test_gradient_only_where_it_is_required(hidden, head):
    case = Case()
    reference = dict(zip(("hidden", "head"), case.gradients(dense(case, ce_scale=1.0, kl_scale=1.0).loss), strict=True))
    case.hidden.requires_grad_(hidden)
    case.head.requires_grad_(head)
    case.teacher_head.requires_grad_()
    loss = case.fused(ce_scale=1.0, kl_scale=1.0, chunk_size=4).loss
    assert loss.requires_grad == (hidden or head)
    if loss.requires_grad:
        loss.backward()
    for name, wanted in (("hidden", hidden), ("head", head)):
        gradient = getattr(case, name).grad
        assert (gradient is not None) == wanted
        if wanted:
            torch.testing.assert_close(gradient, reference[name])
    assert case.teacher_head.grad is None


def test_without_grad_mode_nothing_is_differentiated():
    case = Case()
    with torch.no_grad():
        ours = case.fused(ce_scale=1.0, kl_scale=1.0)
    assert not ours.loss.requires_grad
    torch.testing.assert_close(ours.loss, dense(case, ce_scale=1.0, kl_scale=1.0).loss.detach())


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_rows_give_a_zero_loss_with_a_graph(with_teacher):
    case = Case(n=0, m=0)
    teacher = case.tensors[3:] if with_teacher else ()
    ours = fused_ce_kl(*case.tensors[:3], *teacher, ce_scale=1.0, kl_scale=1.0)
    assert ours.loss == ours.ce_sum == ours.kl_sum == 0
    ours.loss.backward()
    assert case.hidden.grad.shape == case.hidden.shape
    assert case.head.grad.shape == case.head.shape
    assert not case.head.grad.any()


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_float32_stays_close_to_float64(divergence, beta):
    case = Case(n=40, m=30, d=64, v=3000, teacher_d=96, teacher_v=3000, dtype=torch.float32)
    options = {"ce_scale": 0.1, "kl_scale": 0.1, "temperature": 2.0, "divergence": divergence, "beta": beta}
    ours, reference = case.fused(chunk_size=16, with_entropy=True, **options), dense(case, with_entropy=True, **options)
    assert all(value.dtype == torch.float32 for value in ours)
    torch.testing.assert_close(values_of(ours), values_of(reference), rtol=2e-6, atol=0)
    torch.testing.assert_close(case.gradients(ours.loss), case.gradients(reference.loss), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_bf16_inputs_under_autocast(head_dtype):
    # On CPU the operands are upcast: values as exact as float32's, gradients rounded once to bf16 (2^-8).
    case = Case(n=24, m=16, d=32, v=500, teacher_d=48, teacher_v=480, dtype=torch.bfloat16)
    case.head = case.head.detach().to(head_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = case.fused(ce_scale=0.1, kl_scale=0.1, temperature=2.0, chunk_size=10)
        loss = ours.loss * 3.0
    gradients = case.gradients(loss)
    reference = dense(case, ce_scale=0.1, kl_scale=0.1, temperature=2.0)
    torch.testing.assert_close(values_of(ours), values_of(reference), rtol=1e-5, atol=0)
    assert [g.dtype for g in gradients] == [torch.bfloat16, head_dtype]
    for gradient, expected in zip(gradients, case.gradients(reference.loss * 3.0), strict=True):
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=2**-7, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 products with float32 output need a CUDA device")
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_bf16_products_on_cuda(head_dtype):
    case = Case(n=24, m=16, d=32, v=504, teacher_d=48, teacher_v=480, dtype=torch.bfloat16)
    for name in ("hidden", "head", "targets", "teacher_hidden", "teacher_head"):
        setattr(case, name, getattr(case, name).detach().cuda())
    case.hidden, case.head = case.hidden.requires_grad_(), case.head.to(head_dtype).requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = case.fused(ce_scale=0.1, kl_scale=0.1, temperature=2.0, chunk_size=10)
    reference = dense(case, ce_scale=0.1, kl_scale=0.1, temperature=2.0)
    # The operands are exact in bf16, so the logits are float32's; their gradient is rounded to bf16.
    torch.testing.assert_close(values_of(ours), values_of(reference), rtol=1e-5, atol=0)
    for gradient, expected in zip(case.gradients(ours.loss), case.gradients(reference.loss), strict=True):
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=2**-6, atol=1e-3)


def test_misfits_are_refused():
    case = Case()
    hidden, head, targets, teacher_hidden, teacher_head = case.tensors
    with pytest.raises(ValueError, match="both its hidden states and its head"):
        fused_ce_kl(hidden, head, targets, teacher_hidden, ce_scale=1.0)
    with pytest.raises(ValueError, match="12 teacher rows for 11"):
        fused_ce_kl(hidden, head, targets, torch.zeros(12, 6), teacher_head, ce_scale=1.0)
    with pytest.raises(ValueError, match="targets"):
        fused_ce_kl(hidden, head, targets[:-1], ce_scale=1.0)
    with pytest.raises(ValueError, match="not \\[N, D\\] and \\[V, D\\]"):
        fused_ce_kl(hidden[:, :-1], head, targets, ce_scale=1.0)
    with pytest.raises(ValueError, match="not \\[M, D\\] and \\[V, D\\]"):
        fused_ce_kl(hidden, head, targets, teacher_hidden, teacher_head[:, :-1], ce_scale=1.0)
    with pytest.raises(ValueError, match="chunk_size"):
        fused_ce_kl(hidden, head, targets, ce_scale=1.0, chunk_size=0)


# ------------------------------------------------------------------------------------- token_statistics


@pytest.mark.parametrize("teacher_v", [17, 23, 31])
@pytest.mark.parametrize("chunk_size", [3, 128])
def test_token_statistics(teacher_v, chunk_size):
    case = Case(teacher_v=teacher_v)
    ours = token_statistics(*case.tensors, chunk_size=chunk_size)
    logits, width = case.hidden @ case.head.T, min(23, teacher_v)
    student = torch.distributions.Categorical(logits=logits[:7, :width])
    teacher = torch.distributions.Categorical(logits=(case.teacher_hidden @ case.teacher_head.T)[:, :width])
    expected = {
        "nll_N": F.cross_entropy(logits, case.targets, reduction="none"),
        "kl_M": torch.distributions.kl_divergence(teacher, student),
        "teacher_entropy_M": teacher.entropy(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(ours, name), value.detach().float())
    assert torch.equal(ours.agree_M, student.probs.argmax(-1) == teacher.probs.argmax(-1))


def test_token_statistics_without_teacher_or_rows():
    case = Case()
    alone = token_statistics(*case.tensors[:3])
    assert [len(field) for field in alone] == [11, 0, 0, 0]
    assert [len(field) for field in token_statistics(*Case(n=0, m=0).tensors)] == [0, 0, 0, 0]
