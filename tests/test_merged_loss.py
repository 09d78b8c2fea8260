"""A student with merges of the teacher's pieces, against an enumeration of its tokens in float64."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from agri_moe.losses import Merged, SparseTeacher, fused_ce_kl, token_statistics

pytestmark = pytest.mark.usefixtures("small_blocks")

PIECES = 9
MERGED = [(1, 2), (4, 1), (1, 2, 3), (1, 5), (1, 2, 3, 3), (4, 1, 1), (7, 8)]
UNUSED = 3  # rows that fill the matrix up
ROWS = 11


def places():
    """rank_N, first_G, group_N by hand: sorted lists."""
    order = sorted(MERGED)
    firsts = sorted({pieces[0] for pieces in MERGED})
    rank = torch.tensor([order.index(pieces) for pieces in MERGED])
    return rank, torch.tensor(firsts), torch.tensor([firsts.index(pieces[0]) for pieces in MERGED])


def spelled(token):
    return (token,) if token < PIECES else MERGED[token - PIECES]


def merged_of(targets, rest):
    order = sorted(MERGED)
    begin, end = [], []
    for token in targets.tolist():
        pieces = spelled(token)
        hits = [i for i, other in enumerate(order) if len(pieces) > 1 and other[: len(pieces)] == pieces]
        begin.append(min(hits, default=0))
        end.append(max(hits, default=-1) + 1)
    rank, first, group = places()
    first_of = torch.tensor([spelled(t)[0] for t in targets.tolist()])
    return Merged(first, group, rank, first_of, torch.tensor(begin), torch.tensor(end), rest, PIECES)


def divergence(log_t, log_s, kind, beta=0.3):
    t, s = log_t.exp(), log_s.exp()
    if kind == "forward":
        return (t * (log_t - log_s)).sum()
    if kind == "reverse":
        return (s * (log_s - log_t)).sum()
    log_m = (beta * t + (1 - beta) * s).log()
    return beta * (t * (log_t - log_m)).sum() + (1 - beta) * (s * (log_s - log_m)).sum()


def enumerated(student_V, teacher_W, token, rest, kind="forward", temperature=1.0, parts="both"):
    """The divergence at one row, token by token."""
    q = student_V.log_softmax(0).exp()
    tokens = [*range(PIECES), *range(PIECES, PIECES + len(MERGED))]
    by_piece = torch.stack([sum(q[u] for u in tokens if spelled(u)[0] == b) for b in range(PIECES)])
    tempered = [(x / temperature).log_softmax(0) for x in (teacher_W, by_piece.log())]
    total = divergence(*tempered, kind)
    pieces = spelled(token)
    if len(pieces) > 1 and parts == "both":
        p = (teacher_W.log_softmax(0)[pieces[0]] + rest).exp()
        inside = sum(q[u] for u in tokens if spelled(u)[: len(pieces)] == pieces)
        both = [torch.stack([x, 1 - x]).log() / temperature for x in (p, inside)]
        total = total + divergence(*(x.log_softmax(0) for x in both), kind)
    return temperature**2 * total


@pytest.fixture
def toy():
    generator = torch.Generator().manual_seed(0)
    size = PIECES + len(MERGED) + UNUSED

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, head, teacher, teacher_head = draw(ROWS, 6), draw(size, 6), draw(ROWS - 2, 5), draw(PIECES + 4, 5)
    targets = torch.tensor([9, 3, 11, 13, 10, 12, 14, 15, 1, 0, 9])
    rest = -draw(ROWS - 2).abs() * torch.tensor([t >= PIECES for t in targets[: ROWS - 2].tolist()])
    return student, head, targets, teacher, teacher_head, rest


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce", [0.0, 0.7])
def test_value_and_gradient_are_those_of_the_enumeration(toy, kind, temperature, ce):
    student, head, targets, teacher, teacher_head, rest = toy
    for x in (student, head):
        x.requires_grad_(True)
    options = {"temperature": temperature, "divergence": kind, "beta": 0.3, "label_smoothing": 0.1}
    merged = merged_of(targets[: len(teacher)], rest)
    found = fused_ce_kl(
        student, head, targets, teacher, teacher_head, merged=merged, ce_scale=ce, kl_scale=1.3, **options
    )
    got = torch.autograd.grad(found.loss, (student, head))
    logits, theirs = student @ head.T, (teacher @ teacher_head.T)[:, :PIECES]
    rows = [enumerated(logits[i], theirs[i], int(targets[i]), rest[i], kind, temperature) for i in range(len(teacher))]
    expected = ce * F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) + 1.3 * sum(rows)
    torch.testing.assert_close(found.kl_sum, sum(rows).detach())
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (student, head)))


def test_gradcheck(toy):
    student, head, targets, teacher, teacher_head, rest = toy
    merged = merged_of(targets[: len(teacher)], rest)

    def loss(student, head):
        return fused_ce_kl(
            student, head, targets, teacher, teacher_head, merged=merged, ce_scale=0.5, kl_scale=1.0
        ).loss

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(True), head.requires_grad_(True)))


def test_what_validation_measures_is_the_same_divergence(toy):
    student, head, targets, teacher, teacher_head, rest = toy
    merged = merged_of(targets[: len(teacher)], rest)
    read = token_statistics(student, head, targets, teacher, teacher_head, merged=merged)
    logits, theirs = student @ head.T, (teacher @ teacher_head.T)[:, :PIECES]
    rows = torch.stack([enumerated(logits[i], theirs[i], int(targets[i]), rest[i]) for i in range(len(teacher))])
    torch.testing.assert_close(read.kl_M.double(), rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read.nll_N.double(), F.cross_entropy(logits, targets, reduction="none"))
    by_piece = torch.stack(
        [
            sum(row.exp()[u] for u in range(PIECES + len(MERGED)) if spelled(u)[0] == b)
            for row in logits[: len(teacher)]
            for b in range(PIECES)
        ]
    ).view(len(teacher), PIECES)
    assert torch.equal(read.agree_M, by_piece.argmax(1) == theirs.argmax(1))


def test_a_student_made_from_the_teacher_is_at_zero():
    """A teacher over pieces, and a student that writes a token with the probability of its pieces one by one."""
    generator = torch.Generator().manual_seed(1)
    after = torch.randn(PIECES, PIECES, generator=generator, dtype=torch.float64).log_softmax(1)  # a bigram model
    for last in range(PIECES):
        whole = {
            pieces: after[last, pieces[0]]
            + sum((after[a, b] for a, b in pairwise(pieces)), torch.zeros((), dtype=torch.float64))
            for pieces in [(b,) for b in range(PIECES)] + MERGED
        }
        # A token is written where none that goes on from it is.
        log_q = torch.full((PIECES + len(MERGED),), -math.inf, dtype=torch.float64)
        for u in range(PIECES + len(MERGED)):
            own = spelled(u)
            longer = [
                p
                for p in MERGED
                if len(p) > len(own)
                and p[: len(own)] == own
                and not any(len(own) < len(m) < len(p) and p[: len(m)] == m for m in MERGED)
            ]
            left = whole[own].exp() - sum(whole[p].exp() for p in longer)
            log_q[u] = left.log()
        for token in range(PIECES + len(MERGED)):
            pieces = spelled(token)
            rest = (whole[pieces] - after[last, pieces[0]])[None]
            targets = torch.tensor([token])
            found = fused_ce_kl(
                *(log_q[None].float(), torch.eye(len(log_q)), targets),
                *(after[last][None].float(), torch.eye(PIECES)),
                merged=merged_of(targets, rest.float()),
                ce_scale=0.0,
                kl_scale=1.0,
            )
            assert abs(float(found.kl_sum)) < 1e-6


def test_without_a_merged_token_in_reach_it_is_the_ordinary_divergence(toy):
    student, head, _, teacher, teacher_head, _ = toy
    student, teacher, teacher_head = student.float(), teacher.float(), teacher_head.float()[:PIECES]
    head = head.float()[: PIECES + len(MERGED)]
    targets = torch.arange(ROWS) % PIECES
    merged = merged_of(targets[: len(teacher)], torch.zeros(len(teacher)))
    # As far away as a logit can be.
    hidden = torch.cat([student, torch.ones(ROWS, 1)], 1)
    away = torch.cat([head, torch.zeros(len(head), 1)], 1)
    away[PIECES:, -1] = -1e4
    plain = fused_ce_kl(hidden, away[:PIECES].clone(), targets, teacher, teacher_head, ce_scale=0.0, kl_scale=1.0)
    found = fused_ce_kl(hidden, away, targets, teacher, teacher_head, merged=merged, ce_scale=0.0, kl_scale=1.0)
    torch.testing.assert_close(found.kl_sum, plain.kl_sum, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_a_sparse_teacher(toy, tail):
    """Some pieces and the others as one bucket, or samples; the token that follows by its log-probability."""
    student, head, targets, _, _, rest = toy
    count = len(rest)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(PIECES, generator=generator)[:3] for _ in range(count)])
    probs = weights / weights.sum(1, keepdim=True)
    if not tail:
        probs = weights[:, :3] / weights[:, :3].sum(1, keepdim=True)
    entropy = torch.rand(count, generator=generator, dtype=torch.float64)
    sparse = SparseTeacher(ids, probs[:, :3], probs[:, 3] if tail else None, entropy, PIECES)
    log_p = rest - 0.5
    merged = merged_of(targets[:count], log_p)
    for x in (student, head):
        x.requires_grad_(True)
    found = fused_ce_kl(student, head, targets, sparse_teacher=sparse, merged=merged, ce_scale=0.4, kl_scale=0.9)
    q = (student @ head.T).softmax(1)
    rows = []
    for i in range(count):
        tokens = range(PIECES + len(MERGED))
        by_piece = torch.stack([sum(q[i, u] for u in tokens if spelled(u)[0] == b) for b in range(PIECES)])
        by_piece = by_piece / by_piece.sum()
        row = -(probs[i, :3] * by_piece[ids[i]].log()).sum()
        if tail:
            others = [b for b in range(PIECES) if b not in ids[i].tolist()]
            row = row - probs[i, 3] * by_piece[others].sum().log() + torch.xlogy(probs[i], probs[i]).sum()
        else:
            row = row - entropy[i]
        pieces = spelled(int(targets[i]))
        if len(pieces) > 1:
            inside = sum(q[i, u] for u in tokens if spelled(u)[: len(pieces)] == pieces)
            both = [torch.stack([x, 1 - x]).log() for x in (log_p[i].exp(), inside)]
            row = row + divergence(*both, "forward")
        rows.append(row)
    expected = 0.4 * F.cross_entropy(student @ head.T, targets, reduction="sum") + 0.9 * sum(rows)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, (student, head)), torch.autograd.grad(expected, (student, head))
    )
    read = token_statistics(student, head, targets, sparse_teacher=sparse, merged=merged)
    torch.testing.assert_close(read.kl_M.double(), torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_probabilities_far_apart_stay_finite():
    """Merged tokens a hundred nats below everything else, and one that is certain."""
    size = PIECES + len(MERGED)
    logits = torch.zeros(2, size)
    logits[0, PIECES:], logits[1, PIECES] = -200.0, 80.0
    targets, teacher = torch.tensor([PIECES, PIECES]), torch.zeros(2, PIECES)
    teacher[1, 1] = 90.0
    hidden = logits.clone().requires_grad_(True)
    found = fused_ce_kl(
        *(hidden, torch.eye(size), targets, teacher, torch.eye(PIECES)),
        merged=merged_of(targets, torch.tensor([-0.1, 0.0])),
        ce_scale=1.0,
        kl_scale=1.0,
    )
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert torch.isfinite(hidden.grad).all()


def test_shapes_that_do_not_fit_are_refused(toy):
    student, head, targets, teacher, teacher_head, rest = toy
    merged = merged_of(targets[: len(teacher)], rest)
    scales = {"ce_scale": 1.0, "kl_scale": 1.0}
    with pytest.raises(ValueError, match="for 8 rows with a teacher"):
        fused_ce_kl(student, head, targets, teacher[:8], teacher_head, merged=merged, **scales)
    with pytest.raises(ValueError, match="for a vocabulary of 12"):
        fused_ce_kl(student, head[:12], targets % 12, teacher, teacher_head, merged=merged, **scales)
    with pytest.raises(ValueError, match="head of 5 rows for 9 pieces"):
        fused_ce_kl(student, head, targets, teacher, teacher_head[:5], merged=merged, **scales)
