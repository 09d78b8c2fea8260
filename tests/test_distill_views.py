"""A teacher that reads rows in its own template, against plain transformers row by row."""

import copy

import numpy as np
import pytest
import torch
import yaml
from test_cli import main, scalars
from test_distill import make_module

from agri_moe.data.packing import PackedRow, StepTotals, collate, count_targets
from agri_moe.data.synthetic import make_rows
from agri_moe.data.teacher_view import TeacherView
from agri_moe.objective import Objective
from agri_moe.terms import CKA, KL, Attention, CrossEntropy, Hidden

OBJECTIVE = Objective(
    ce=CrossEntropy(weight=0.5),
    kl=KL(weight=1.0, segments=["thought", "assistant"]),
    cka=CKA(weight=0.5, sample_tokens=64),
    hidden=Hidden(weight=0.5, sample_tokens=10_000, layers="last"),
    attention=Attention(weight=0.5, queries=10_000, segments=["thought", "assistant"]),
)


@pytest.fixture(scope="module", params=["native", "no_thought"])
def view(request, teacher):
    return TeacherView(str(teacher), request.param)


@pytest.fixture(scope="module")
def viewed(chat, view):
    """Rows with what the teacher reads of them."""
    rows = []
    for i, row in enumerate(make_rows(8, seed=2, split="train")):
        ours, theirs = chat.encode(row), view.encode(chat, row)
        arrays = [np.array(x) for x in (ours.input_ids, ours.segment_ids, theirs.input_ids, theirs.tokens)]
        rows.append(PackedRow(i, *arrays))
    return rows


def batch_of(chat, rows, layout):
    counts = sum(count_targets(r.input_ids, r.segment_ids, chat.control_ids, r.teacher_tokens) for r in rows)
    totals = StepTotals(counts, sum(len(r.input_ids) for r in rows), 1)
    return collate([[rows[i] for i in chosen] for chosen in layout], totals, 4096, chat.pad_id)


def step(module, batch):
    batch = module.on_before_batch_transfer(batch, 0)
    out = module.learn(batch, *module.signals(batch, module.objective))
    values = {n: (sums[0] / sums[1]).item() for n, sums in module._step_terms.items()}
    module._step_terms.clear()
    return batch, out["loss"], values


@pytest.mark.parametrize("layout", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[7], [1, 2, 3, 0, 4, 6, 5]]])
def test_terms_equal_plain_transformers(chat, dense, teacher, view, viewed, layout):
    torch.manual_seed(0)
    module = make_module(chat, dense, teacher, OBJECTIVE)
    _, loss, values = step(module, batch_of(chat, viewed, layout))
    assert torch.isfinite(loss)
    student, taught = copy.deepcopy(module.model.hf), copy.deepcopy(module.teacher.model.hf)
    student.set_attn_implementation("eager")
    taught.set_attn_implementation("eager")
    kl, attention, distance, tokens = 0.0, [], 0.0, 0
    for row in viewed:
        ours, theirs = (
            model(torch.tensor(ids)[None], use_cache=False, output_attentions=True, output_hidden_states=True)
            for model, ids in ((student, row.input_ids), (taught, row.teacher_ids))
        )
        # Where both predict the same token of the same content, and it is no control token.
        pairs = [
            (t - 1, int(row.teacher_tokens[t]) - 1)
            for t in range(1, len(row.input_ids))
            if row.segment_ids[t] >= 3 and row.teacher_tokens[t] > 0 and row.input_ids[t] not in chat.control_ids
        ]
        assert all(row.input_ids[i + 1] == row.teacher_ids[j + 1] for i, j in pairs)
        at, there = (torch.tensor(x) for x in zip(*pairs, strict=True))
        kl += torch.nn.functional.kl_div(
            ours.logits[0, at].log_softmax(-1),
            theirs.logits[0, there].log_softmax(-1),
            reduction="sum",
            log_target=True,
        ).item()
        tokens += len(pairs)
        keys = torch.tensor(row.teacher_tokens)
        shared = keys >= 0
        p = ours.attentions[-1][0].unflatten(0, (2, 2)).mean(1)[:, at][..., shared]
        q = theirs.attentions[-1][0].unflatten(0, (2, 2)).mean(1)[:, there][..., keys[shared]]
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        attention.append((torch.special.xlogy(q, q) - torch.special.xlogy(q, p.clamp(min=1e-30))).sum(-1).mean(0))
        streams = streams_of(student, row.input_ids)[at], streams_of(taught, row.teacher_ids)[there]
        projected = streams[0] @ module.model.projections["1_3"].weight.T
        distance += (((projected - streams[1]) ** 2).sum(-1) / (streams[1] ** 2).sum(-1)).sum()
    assert values["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert values["attention"] == pytest.approx(torch.cat(attention).mean().item(), rel=1e-3)
    assert values["hidden"] == pytest.approx((distance / tokens).item(), rel=1e-4)


def streams_of(model, ids):
    """The residual stream after the last layer; transformers' own last hidden state is normalised."""
    seen = []
    hook = model.model.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out[0].detach()))
    model(torch.tensor(ids)[None], use_cache=False)
    hook.remove()
    return seen[0]


def test_a_teacher_that_reads_no_thought_is_not_asked_about_it(chat, dense, teacher):
    view = TeacherView(str(teacher), "no_thought")
    row = make_rows(1, seed=3, split="train")[0]
    ours, theirs = chat.encode(row), view.encode(chat, row)
    arrays = [np.array(x) for x in (ours.input_ids, ours.segment_ids, theirs.input_ids, theirs.tokens)]
    module = make_module(chat, dense, teacher, OBJECTIVE)
    batch, _, _ = step(module, batch_of(chat, [PackedRow(0, *arrays)], [[0]]))
    assert set(batch["segments"][: len(batch["kl_targets"])].tolist()) == {4}
    ce, kl = module.objective.counts(batch)
    assert (ce.item(), kl.item()) == (len(batch["targets"]), len(batch["kl_targets"]))


def test_a_run_in_the_native_view(distill_config, tmp_path):
    """Through the command: rows cached with the view, aligned share told, resumable as any other run."""
    config = yaml.safe_load(distill_config.read_text())
    config["model"]["init_args"]["teacher"]["view"] = "native"
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    cli = main(["fit", "--config", str(distill_config)])
    assert cli.datamodule.aligned_share > 0.9
    logged = scalars(tmp_path / "lightning_logs" / "version_0")
    assert np.isfinite([value for _, value in logged["train/kl"]]).all()
    assert logged["val/aligned"][0][1] == pytest.approx(cli.datamodule.aligned_share, abs=0.05)


def test_a_teacher_without_a_template_is_refused_before_it_is_loaded(distill_config, dense, capsys):
    config = yaml.safe_load(distill_config.read_text())
    config["model"]["init_args"]["teacher"] = {"source": str(dense), "view": "native"}
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(distill_config)])
    assert stop.value.code == 2
    assert "needs a chat template" in capsys.readouterr().err


def test_rows_of_which_nothing_aligns_give_no_nan(chat, dense, teacher, viewed):
    lost = [row._replace(teacher_tokens=np.full_like(row.teacher_tokens, -1)) for row in viewed[:2]]
    module = make_module(chat, dense, teacher, OBJECTIVE)
    batch, loss, values = step(module, batch_of(chat, lost, [[0], [1]]))
    assert len(batch["kl_targets"]) == len(batch["sample"]) == 0
    assert (batch["queries"] == -1).all()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.model.parameters() if p.grad is not None)
    assert values["ce"] > 0, "the rows are learned all the same"
