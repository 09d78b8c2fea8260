"""metrics.py against numbers worked by hand; merging two ranks must equal seeing everything on one."""

import math
import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from agri_moe.losses import linear_cka, routing, token_statistics
from agri_moe.metrics import (
    CKAMatrix,
    GroupRouting,
    RoutingStatistics,
    SegmentLoss,
    TeacherAgreement,
    TermMean,
    balance_score,
    balanced_perplexity,
    mutual_information,
)

SEGMENTS = {"thought": 3, "assistant": 4}


def merged(metric: Metric, updates: list[tuple]) -> Metric:
    """Two ranks that saw every other update, reduced as torchmetrics' own synchronisation reduces them."""
    ranks = [deepcopy(metric) for _ in range(2)]
    for i, update in enumerate(updates):
        ranks[i % 2].update(*update)
    ranks[0].merge_state(ranks[1])
    return ranks[0]


def assert_ranks_agree(metric: Metric, updates: list[tuple]) -> None:
    alone = deepcopy(metric)
    for update in updates:
        alone.update(*update)
    torch.testing.assert_close(merged(metric, updates).compute(), alone.compute())
    for state in alone._defaults:
        assert getattr(alone, state).dtype == torch.float64


def routed(logits: Tensor, top_k: int = 1, valid: Tensor | None = None):
    """[L, N, E] logits -> Routing."""
    mask = torch.ones(logits.shape[1], dtype=torch.bool) if valid is None else valid
    return routing(list(logits), top_k, mask)


# ------------------------------------------------------------------------------------------ SegmentLoss


def test_segment_loss_by_hand():
    metric = SegmentLoss(SEGMENTS)
    metric.update(torch.tensor([9.0, 1.0, 3.0, 2.0]), torch.tensor([2, 3, 3, 4]))
    metric.update(torch.tensor([float("nan"), 4.0]), torch.tensor([0, 4]))  # padding never counts
    result = {name: value.item() for name, value in metric.compute().items()}
    losses = {"loss": 2.5, "loss_thought": 2.0, "loss_assistant": 3.0}
    perplexities = {name.replace("loss", "perplexity"): math.exp(loss) for name, loss in losses.items()}
    assert result == pytest.approx(losses | perplexities)


def test_bits_per_byte_by_hand():
    """A marker has no bytes, and its loss counts; other segments' bytes do not."""
    metric = SegmentLoss(SEGMENTS)
    metric.update(torch.tensor([9.0, 1.0, 3.0, 2.0]), torch.tensor([2, 3, 3, 4]), torch.tensor([7, 3, 0, 5]))
    result = metric.compute()
    assert result["bits_per_byte"].item() == pytest.approx(6 / math.log(2) / 8)
    assert result["bits_per_byte_thought"].item() == pytest.approx(4 / math.log(2) / 3)
    assert result["bits_per_byte_assistant"].item() == pytest.approx(2 / math.log(2) / 5)


def test_segment_loss_leaves_out_what_it_did_not_see():
    metric = SegmentLoss(SEGMENTS)
    metric.update(torch.tensor([1.0]), torch.tensor([4]))
    assert set(metric.compute()) == {"loss", "perplexity", "loss_assistant", "perplexity_assistant"}
    metric.reset()
    metric.update(torch.empty(0), torch.empty(0, dtype=torch.long))
    assert metric.compute() == {}


def test_segment_loss_across_ranks():
    torch.manual_seed(0)
    updates = [(torch.rand(n), torch.randint(5, (n,))) for n in (5, 1, 8)]
    assert_ranks_agree(SegmentLoss(SEGMENTS), updates)


@pytest.mark.parametrize("segments", [{}, {"pad": 0, "assistant": 4}])
def test_segment_loss_refuses_padding(segments):
    with pytest.raises(ValueError, match="padding"):
        SegmentLoss(segments)


def test_states_stay_exact_in_a_bf16_module():
    module = torch.nn.ModuleDict({"loss": SegmentLoss(SEGMENTS)})
    module = module.to(torch.bfloat16).half().to("cpu", torch.bfloat16)
    for _ in range(300):  # bf16 would stop counting at 256
        module["loss"](torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([4]))
    assert module["loss"].tokens.tolist() == [0, 300]


# ------------------------------------------------------------------------------------- TeacherAgreement


def test_agreement_by_hand_and_from_token_statistics():
    metric = TeacherAgreement()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    metric.update(torch.tensor([0.0, 1.0]), torch.tensor([True, True]))
    assert {k: v.item() for k, v in metric.compute().items()} == {"kl": 1.0, "agreement": 0.75}
    metric.reset()
    hidden, head = torch.randn(4, 3), torch.randn(9, 3)
    itself = token_statistics(hidden, head, torch.zeros(4, dtype=torch.long), hidden, head)
    metric.update(itself.kl_M, itself.agree_M)
    assert {k: v.item() for k, v in metric.compute().items()} == {"kl": 0.0, "agreement": 1.0}


def test_agreement_with_nothing_seen_and_across_ranks():
    metric = TeacherAgreement()
    metric.update(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert metric.compute() == {}
    torch.manual_seed(0)
    assert_ranks_agree(TeacherAgreement(), [(torch.rand(n), torch.rand(n) > 0.5) for n in (3, 7, 2)])


# ------------------------------------------------------------------------------------ RoutingStatistics


def test_routing_statistics_by_hand():
    # Layer 0 sends its four tokens to four experts, layer 1 all of them to expert 0.
    logits = torch.stack([50.0 * torch.eye(4), 50.0 * torch.eye(4)[:1].expand(4, 4)])
    metric = RoutingStatistics(2, 4)
    metric.update(routed(logits))
    result = metric.compute()
    torch.testing.assert_close(result["load"], torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]))
    torch.testing.assert_close(result["balance"], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(result["dead"], torch.tensor([0.0, 0.75]))
    torch.testing.assert_close(result["entropy"], torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(result["normalized_entropy"], torch.zeros(2), atol=1e-6, rtol=0)


def test_results_of_one_layer_keep_their_shape():
    metric = RoutingStatistics(1, 4)
    metric.update(routed(torch.zeros(1, 5, 4)))
    for copy in (metric, deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        shapes = {name: tuple(value.shape) for name, value in copy.compute().items()}
        assert shapes.pop("load") == (1, 4)
        assert set(shapes.values()) == {(1,)}
    cka = CKAMatrix(1, 1)
    cka.update([torch.randn(9, 3)], [torch.randn(9, 3)])
    assert cka.compute().shape == (1, 1)


def test_router_entropy_of_an_undecided_router():
    metric = RoutingStatistics(1, 4)
    metric.update(routed(torch.zeros(1, 5, 4), top_k=2))
    torch.testing.assert_close(metric.compute()["entropy"], torch.tensor([math.log(4)]))
    torch.testing.assert_close(metric.compute()["normalized_entropy"], torch.ones(1))


def test_padding_never_counts_in_routing_statistics():
    torch.manual_seed(0)
    logits, valid = torch.randn(2, 9, 4), torch.arange(9) < 6
    padded, cut = RoutingStatistics(2, 4), RoutingStatistics(2, 4)
    padded.update(routed(logits, 2, valid))
    cut.update(routed(logits[:, :6], 2))
    torch.testing.assert_close(padded.compute(), cut.compute())


def test_routing_statistics_with_nothing_seen_one_expert_and_across_ranks():
    metric = RoutingStatistics(2, 4)
    metric.update(routed(torch.randn(2, 3, 4), 1, torch.zeros(3, dtype=torch.bool)))
    assert metric.compute() == {}
    single = RoutingStatistics(1, 1)
    single.update(routed(torch.randn(1, 3, 1)))
    assert {name: value.item() for name, value in single.compute().items()} == {
        "load": 1.0,
        "entropy": 0.0,
        "normalized_entropy": 1.0,
        "balance": 1.0,
        "dead": 0.0,
    }
    torch.manual_seed(0)
    assert_ranks_agree(RoutingStatistics(2, 4), [(routed(torch.randn(2, n, 4), 2),) for n in (3, 8, 1)])


def test_balance_score():
    load = torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(balance_score(load), torch.tensor([1.0, 0.0, 0.5, 0.0]))
    torch.testing.assert_close(balance_score(load[:3] / 20), balance_score(load[:3]))


def test_balanced_perplexity():
    assert balanced_perplexity(2.0, 1.0).item() == pytest.approx(math.exp(2))
    assert balanced_perplexity(2.0, 0.5, beta=3.0).item() == pytest.approx(math.exp(2) * math.exp(1.5))
    per_layer = balanced_perplexity(torch.tensor(1.0), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(per_layer, torch.tensor([1.0, 2.0]).exp())


# ----------------------------------------------------------------------------------------- GroupRouting


def test_mutual_information_by_hand():
    counts = torch.tensor(
        [
            [[4.0, 0], [0, 4]],  # the expert tells the group: log 2
            [[3, 1], [3, 1]],  # it tells nothing
            [[2, 0], [1, 1]],  # H(1/2, 1/2) + H(3/4, 1/4) - H(1/2, 1/4, 1/4) = 3/2 log 2 - 3/4 log 3
            [[5, 2], [0, 0]],  # there is one group only
            [[0, 0], [0, 0]],
        ]
    )
    expected = [math.log(2), 0, 1.5 * math.log(2) - 0.75 * math.log(3), 0, 0]
    assert mutual_information(counts).tolist() == pytest.approx(expected, abs=1e-6)
    assert mutual_information(1000 * counts).tolist() == pytest.approx(expected, abs=1e-6)


def test_group_routing_by_hand():
    metric = GroupRouting(["धान", "चना", "none"], torch.tensor([1, 0, 1]), num_layers=1, num_experts=3)
    assert metric.compute() == {}
    # Rows 0, 0, 2 are of the second group and row 1 of the first; -1 is padding, whatever stands there.
    chosen = torch.tensor([[[0, 1], [0, 1], [1, 2], [0, 2], [0, 1]]])
    metric.update(
        torch.tensor([1.0, 2.0, 5.0, float("nan")]), torch.tensor([0, 2, 1, -1]), chosen, torch.tensor([0, 0, 1, 2, -1])
    )
    result = metric.compute()
    assert result["ce"].tolist() == [5.0, 1.5, 0.0]
    assert result["tokens"].tolist() == [1, 2, 0]
    torch.testing.assert_close(
        result["load"], torch.tensor([[[0, 1, 1], [3, 2, 1], [0, 0, 0]]]) / torch.tensor([[[2.0], [6], [1]]])
    )
    torch.testing.assert_close(
        result["mutual_information"], mutual_information(torch.tensor([[[0.0, 1, 1], [3, 2, 1]]]))
    )


def test_group_routing_adds_up_to_the_routing_of_all_tokens_and_across_ranks():
    torch.manual_seed(0)
    group_of_row, updates = torch.tensor([0, 1, 1, 0]), []
    whole = RoutingStatistics(2, 5)
    for n in (7, 1, 12):
        logits, row = torch.randn(2, n, 5), torch.randint(-1, 4, (n,))
        whole.update(routed(logits, 2, row >= 0))
        updates.append((torch.rand(n), row, logits.topk(2).indices, row))
    metric = GroupRouting(["a", "b"], group_of_row, 2, 5)
    for update in updates:
        metric.update(*update)
    assert torch.equal(metric.load.sum(1), whole.load)
    assert_ranks_agree(GroupRouting(["a", "b"], group_of_row, 2, 5), updates)


def test_groups_of_a_dense_model_have_losses_only():
    metric = GroupRouting(["a", "b"], torch.tensor([1, 0]))
    metric.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), None, torch.tensor([0, 1]))
    assert metric.compute()["ce"].tolist() == [3.0, 1.0]
    assert metric.compute()["mutual_information"].shape == (0,)


# -------------------------------------------------------------------------------------------- CKAMatrix


def features(n: int) -> tuple[list[Tensor], list[Tensor]]:
    base = torch.randn(n, 6)
    noise = torch.randn(n, 40)
    return [base, noise], [base @ torch.ones(6, 3).tril() + 0.1 * torch.randn(n, 3), base + 0.5, noise[:, :9]]


def test_cka_matrix_of_one_minibatch_is_linear_cka():
    torch.manual_seed(0)
    xs, ys = features(30)
    for debiased in (True, False):
        metric = CKAMatrix(2, 3, debiased=debiased)
        metric.update(xs, ys)
        expected = torch.tensor([[linear_cka(x, y, debiased=debiased) for y in ys] for x in xs])
        torch.testing.assert_close(metric.compute(), expected, rtol=1e-4, atol=1e-5)


def test_cka_matrix_from_minibatches_approaches_the_whole_sample():
    torch.manual_seed(0)
    xs, ys = features(1024)
    metric = CKAMatrix(2, 3)
    for start in range(0, 1024, 32):
        rows = slice(start, start + 32)
        metric.update([x[rows] for x in xs], [y[rows] for y in ys])
    expected = torch.tensor([[linear_cka(x, y) for y in ys] for x in xs])
    torch.testing.assert_close(metric.compute(), expected, rtol=0, atol=0.05)


def test_cka_matrix_undefined_entries_are_zero():
    metric = CKAMatrix(2, 3)
    xs, ys = features(3)  # too few samples for the unbiased estimator
    metric.update(xs, ys)
    assert torch.equal(metric.compute(), torch.zeros(2, 3))
    xs, ys = features(20)
    metric.update([torch.ones_like(xs[0]), xs[1]], ys)
    assert torch.equal(metric.compute()[0], torch.zeros(3))
    assert metric.compute()[1, 2] > 0.1
    with pytest.raises(ValueError, match="layers of features"):
        metric.update(xs, ys[:2])


def test_cka_matrix_across_ranks():
    torch.manual_seed(0)
    assert_ranks_agree(CKAMatrix(2, 3), [features(n) for n in (12, 40, 9)])


def test_term_mean_by_hand_with_nothing_seen_and_across_ranks():
    metric = TermMean()
    assert metric.compute() is None
    metric.update(torch.tensor(0.0), torch.tensor(0.0))  # a micro-batch with nothing to compare
    assert metric.compute() is None
    metric.update(torch.tensor(3.0), torch.tensor(2))
    metric.update(torch.tensor(7.0), torch.tensor(3))
    assert metric.compute().item() == 2.0
    assert_ranks_agree(TermMean(), [(torch.tensor(3.0), torch.tensor(2)), (torch.tensor(1.0), torch.tensor(1))])


def test_term_mean_counts_exactly_where_bf16_is_the_default():
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does while a module is built
    try:
        metric = TermMean()
        for value in (1.0, 3.0):
            for _ in range(300):
                metric.update(torch.tensor(value), torch.tensor(1.0))
        assert metric.compute().item() == 2.0
    finally:
        torch.set_default_dtype(torch.float32)
