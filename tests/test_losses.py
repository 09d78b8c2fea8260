"""losses against independent references: torch's dense losses in float64, transformers, published CKA."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from agri_moe.losses import (
    LogitLoss,
    balance_loss,
    cka_matrix,
    fused_ce_kl,
    linear_cka,
    minibatch_hsic,
    routing,
    token_statistics,
)

DATA = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


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


def dense(case: Case, ce_scale, kl_scale=0.0, temperature=1.0, label_smoothing=0.0) -> LogitLoss:
    """The same by torch's own losses on full logits, in float64."""
    logits = case.hidden.double() @ case.head.double().T
    ce_sum = F.cross_entropy(logits, case.targets, reduction="sum", label_smoothing=label_smoothing)
    m, width = len(case.teacher_hidden), min(len(case.head), len(case.teacher_head))
    teacher = (case.teacher_hidden.double() @ case.teacher_head.double().T)[:, :width] / temperature
    student = logits[:m, :width] / temperature
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    kl_sum = kl.sum() * temperature**2
    return LogitLoss(ce_scale * ce_sum + kl_scale * kl_sum, ce_sum.detach(), kl_sum.detach())


def assert_matches_dense(case: Case, chunk_size=128, **options) -> None:
    ours, reference = case.fused(chunk_size=chunk_size, **options), dense(case, **options)
    torch.testing.assert_close(tuple(ours), tuple(reference))
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
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_fused_equals_dense_on_any_shape(n, taught, v, teacher_v, chunk_size, temperature, label_smoothing, seed):
    case = Case(n=n, m=int(n * taught), v=v, teacher_v=teacher_v, seed=seed)
    options = {"temperature": temperature, "label_smoothing": label_smoothing}
    assert_matches_dense(case, chunk_size, ce_scale=0.7, kl_scale=1.3, **options)


def test_gradcheck():
    case = Case(n=5, m=3, d=3, v=7, teacher_v=6)

    def loss(hidden, head):
        options = {
            "ce_scale": 0.5,
            "kl_scale": 0.8,
            "temperature": 1.5,
            "label_smoothing": 0.1,
            "chunk_size": 2,
        }
        return fused_ce_kl(hidden, head, *case.tensors[2:], **options).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.head))


def test_scales_and_temperature_may_be_tensors():
    case = Case()
    floats = {"ce_scale": 0.3, "kl_scale": 1.7, "temperature": 2.0}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in floats.items()}
    ours, reference = case.fused(**tensors), dense(case, **floats)
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
    options = {"ce_scale": 1.0, "kl_scale": 1.0}
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


def test_float32_stays_close_to_float64():
    case = Case(n=40, m=30, d=64, v=3000, teacher_d=96, teacher_v=3000, dtype=torch.float32)
    ours = case.fused(ce_scale=0.1, kl_scale=0.1, temperature=2.0, chunk_size=16)
    reference = dense(case, ce_scale=0.1, kl_scale=0.1, temperature=2.0)
    assert all(value.dtype == torch.float32 for value in ours)
    torch.testing.assert_close(tuple(v.double() for v in ours), tuple(reference), rtol=2e-6, atol=0)
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
    torch.testing.assert_close(tuple(v.double() for v in ours), tuple(reference), rtol=1e-5, atol=0)
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
    torch.testing.assert_close(tuple(v.double() for v in ours), tuple(reference), rtol=1e-5, atol=0)
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


# -------------------------------------------------------------------------------------------------- CKA


def published_example() -> tuple[Tensor, Tensor]:
    np.random.seed(1337)
    x = np.random.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(np.random.randn(100, 10) + x)


def naive_unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, letter by letter."""
    n, k, l = len(x), x @ x.T, y @ y.T  # noqa: E741
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(n, dtype=x.dtype)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return ((k @ l).trace() + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize(("debiased", "published"), [(False, 0.55761), (True, 0.51346)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cka_published_oracle(debiased, published, dtype):
    x, y = (t.to(dtype) for t in published_example())
    wide = torch.cat([x, torch.zeros(100, 100, dtype=dtype)], 1)  # 100 <= 110 features: the Gram side
    for features in (x, wide):
        cka = linear_cka(features, y, debiased=debiased)
        assert cka.dtype == dtype
        assert cka.item() == pytest.approx(published, abs=6e-6)


@pytest.mark.skipif(not (DATA / "cka").is_dir(), reason=f"no CKA fixture under {DATA} (set AGRI_MOE_DATA)")
def test_cka_google_fixture():
    arrays = np.load(DATA / "cka" / "cka_fixture.npz")
    expected = json.loads((DATA / "cka" / "expected.json").read_text())["computed"]
    x, y = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["Y"])
    assert linear_cka(x, y, debiased=False).item() == pytest.approx(expected["linear_cka_features"], abs=1e-12)
    assert linear_cka(x, y).item() == pytest.approx(expected["debiased_linear_cka"], abs=1e-12)


@pytest.mark.parametrize(("n", "d", "e"), [(9, 4, 3), (9, 20, 3), (4, 8, 8), (30, 30, 5)])
def test_hsic_equals_its_definition_and_cka_its_gradient(n, d, e):
    torch.manual_seed(n)
    x = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    y = (torch.randn(n, e, dtype=torch.float64) + 5).requires_grad_()  # a mean, which HSIC must not see
    hsic = minibatch_hsic([x], [y])
    torch.testing.assert_close(hsic.cross_XY[0, 0], naive_unbiased_hsic(x, y))
    torch.testing.assert_close(hsic.self_X[0], naive_unbiased_hsic(x, x))
    for debiased in (True, False):
        assert torch.autograd.gradcheck(lambda x, y: linear_cka(x, y, debiased=debiased), (x, y))  # noqa: B023


def test_cka_sides_agree_and_ignore_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(50, 12), torch.randn(50, 7)
    y = y + x[:, :7]
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    padded = torch.cat([x, torch.zeros(50, 60)], 1)  # more features than samples: the other side
    for debiased in (True, False):
        reference = linear_cka(x, y, debiased=debiased)
        for changed in (x @ rotation, 1e-12 * x, 1e9 * x, x + 3.0, padded):
            torch.testing.assert_close(linear_cka(changed, y, debiased=debiased), reference, rtol=1e-4, atol=1e-5)
        assert linear_cka(x, x, debiased=debiased).item() == pytest.approx(1.0, abs=1e-5)


def test_cka_survives_a_massive_activation():
    # One token a thousand times the others: the sums of the textbook formula leave float32 nothing.
    torch.manual_seed(0)
    x, y = torch.randn(64, 96, dtype=torch.float64), torch.randn(64, 80, dtype=torch.float64)
    y[:, :80] += x[:, :80]
    x[3], y[3] = x[3] * 1e3, y[3] * 1e3
    exact = naive_unbiased_hsic(x, y) / (naive_unbiased_hsic(x, x) * naive_unbiased_hsic(y, y)).sqrt()
    torch.testing.assert_close(linear_cka(x.float(), y.float()), exact.float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 16])
@pytest.mark.parametrize("debiased", [True, False])
def test_cka_is_never_nan(dtype, width, n, debiased):
    torch.manual_seed(n)
    random = torch.randn(n, width, dtype=dtype)
    outlier = torch.full_like(random, 0.3)
    outlier[:1] += random[:1]
    for degenerate in (torch.zeros_like(random), torch.full_like(random, 3.3e4), outlier):
        x, y = degenerate.clone().requires_grad_(), random.clone().requires_grad_()
        cka = linear_cka(x, y, debiased=debiased)
        gradients = torch.autograd.grad(cka, (x, y))
        assert cka.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        if degenerate is not outlier or debiased or n < 2:
            assert cka == 0
            assert not any(gradient.any() for gradient in gradients)


def test_cka_ignores_autocast():
    torch.manual_seed(0)
    x, y = torch.randn(40, 64), torch.randn(40, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = linear_cka(x, y)
    assert torch.equal(under, linear_cka(x, y))


def test_cka_matrix_equals_its_entries():
    torch.manual_seed(0)
    base = torch.randn(30, 8)
    xs, ys = ([base @ torch.randn(8, d) + torch.randn(30, d) for d in widths] for widths in ((4, 40, 8), (6, 9)))
    for debiased in (True, False):
        entries = torch.stack([torch.stack([linear_cka(x, y, debiased=debiased) for y in ys]) for x in xs])
        torch.testing.assert_close(cka_matrix(xs, ys, debiased=debiased), entries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cka_matrix(xs, xs), cka_matrix(xs, list(xs)))
    with pytest.raises(ValueError, match="same N samples"):
        cka_matrix(xs, [ys[0][:-1]])
    with pytest.raises(ValueError, match="at least one"):
        cka_matrix([], ys)


def test_cka_matrix_equals_torch_cka():
    torch_cka = pytest.importorskip("torch_cka")
    torch.manual_seed(0)
    layers = ["0", "2"]
    models = [
        torch.nn.Sequential(torch.nn.Linear(6, w), torch.nn.Tanh(), torch.nn.Linear(w, 5)).double() for w in (7, 40)
    ]
    inputs = torch.randn(32, 6, dtype=torch.float64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs), batch_size=32)
    torch.set_default_dtype(torch.float64)  # its vector of ones takes the default dtype
    try:
        theirs = torch_cka.CKA(*models, "first", "second", layers, layers)
        theirs.compare(loader, loader)
        expected = theirs.export()["CKA"]
    finally:
        torch.set_default_dtype(torch.float32)
    features = [[model[:1](inputs).detach(), model(inputs).detach()] for model in models]
    torch.testing.assert_close(cka_matrix(*features), expected)


# ---------------------------------------------------------------------------------------------- routing


def naive_routing(layers: list[Tensor], top_k: int, valid: Tensor) -> dict[str, Tensor]:
    """One token at a time."""
    load, probability = (torch.zeros(len(layers), layers[0].shape[1]) for _ in range(2))
    entropy, z, tokens = torch.zeros(len(layers)), 0.0, int(valid.sum())
    for i, logits in enumerate(layers):
        for token in torch.nonzero(valid).flatten().tolist():
            p = logits[token].float().softmax(0)
            for expert in p.argsort(descending=True)[:top_k]:
                load[i, expert] += 1
            probability[i] += p / tokens
            entropy[i] -= sum(q * q.log() for q in p)
            z = z + torch.log(logits[token].float().exp().sum()) ** 2 / len(layers)
    return {"load_LE": load, "probability_LE": probability, "entropy_L": entropy, "z_sum": z}


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_equals_a_loop_over_tokens(top_k, dtype):
    torch.manual_seed(0)
    layers = [torch.randn(12, 5).to(dtype) for _ in range(3)]
    valid = torch.rand(12) > 0.4
    for logits in layers:
        logits[~valid] = float("nan")  # padding never counts, whatever is in it
    ours = routing(layers, top_k, valid)
    for name, value in naive_routing(layers, top_k, valid).items():
        torch.testing.assert_close(getattr(ours, name), value)
    assert ours.tokens == valid.sum()
    assert torch.equal(ours.load_LE.sum(-1), (ours.tokens * top_k).expand(3))


def test_padding_gets_no_gradient():
    logits = torch.randn(6, 4, requires_grad=True)
    valid = torch.tensor([True, False, True, True, False, True])
    ours = routing([logits], 2, valid)
    (balance_loss(ours).sum() + ours.z_sum).backward()
    assert logits.grad[~valid].abs().sum() == 0
    assert (logits.grad[valid].abs().sum(-1) > 0).all()
    assert not ours.load_LE.requires_grad
    assert not ours.entropy_L.requires_grad


@pytest.mark.parametrize("top_k", [1, 2])
def test_transformers_balance_loss_is_k_times_ours(top_k):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(0)
    logits = torch.randn(20, 6, requires_grad=True)
    valid = torch.arange(20) % 5 != 0
    ours = balance_loss(routing([logits], top_k, valid))
    theirs = load_balancing_loss_func((logits,), 6, top_k, attention_mask=valid[None])
    torch.testing.assert_close(top_k * ours[0], theirs)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (top_k * ours[0], theirs)]
    torch.testing.assert_close(*gradients)


def test_layers_collapsed_on_disjoint_experts_score_as_collapsed():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    first, second = torch.zeros(10, 2), torch.zeros(10, 2)
    first[:, 0], second[:, 1] = 50.0, 50.0
    ours = balance_loss(routing([first, second], 1, torch.ones(10, dtype=torch.bool)))
    torch.testing.assert_close(ours, torch.tensor([2.0, 2.0]))  # E when collapsed
    assert load_balancing_loss_func((first, second), 2, 1) == pytest.approx(1.0)  # pooled, it looks balanced


def test_balance_loss_is_one_at_balance():
    logits = 3.0 * torch.eye(4).repeat(5, 1)
    torch.testing.assert_close(balance_loss(routing([logits], 1, torch.ones(20).bool())), torch.ones(1))


def test_z_loss_by_hand():
    # logsumexp(0, 0) = log 2; logsumexp(log 3, 0) = log 4 = 2 log 2. Sum of squares 5 log^2 2, halved by a
    # second layer whose logits (-log 2 twice) have logsumexp 0.
    log2 = torch.tensor(2.0).log()
    first = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]])
    second = -log2.expand(2, 2)
    ours = routing([first, second], 1, torch.ones(2).bool())
    torch.testing.assert_close(ours.z_sum, 2.5 * log2**2)


def test_no_valid_token_is_a_zero_with_a_graph():
    logits = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    ours = routing(logits, 2, torch.zeros(4, dtype=torch.bool))
    loss = balance_loss(ours).sum() + ours.z_sum
    assert loss == ours.tokens == ours.entropy_L.sum() == 0
    loss.backward()
    assert all(layer.grad is not None and not layer.grad.any() for layer in logits)


def test_routing_refuses_what_does_not_fit():
    valid = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="no router logits"):
        routing([], 1, valid)
    with pytest.raises(ValueError, match="not \\[N, E\\]"):
        routing([torch.zeros(4, 3), torch.zeros(4, 2)], 1, valid)
    with pytest.raises(ValueError, match="not \\[N, E\\]"):
        routing([torch.zeros(5, 3)], 1, valid)
    with pytest.raises(ValueError, match="top_k 4"):
        routing([torch.zeros(4, 3)], 4, valid)
