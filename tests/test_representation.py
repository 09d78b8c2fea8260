"""Hidden states, attention, diversity and anchor in the whole module, against plain transformers run row by row."""

import copy
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_distill import SPEC, gradients, make_module, relative, totals
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from agri_moe.callbacks.cka import CKAMonitor
from agri_moe.data.packing import collate
from agri_moe.models.causal import CausalModel, Reads, start_rows
from agri_moe.models.distill import DistillModule
from agri_moe.models.pretrain import PretrainModule
from agri_moe.models.source import ModelConfig, StudentConfig
from agri_moe.models.upcycle import UpcycleSpec, load_upcycled
from agri_moe.objective import Objective
from agri_moe.teacher import OnlineTeacher
from agri_moe.terms import CKA, KL, Anchor, Attention, Balance, CrossEntropy, Diversity, Hidden, RouterZ

EVERYTHING = Objective(
    ce=CrossEntropy(weight=0.5),
    kl=KL(weight=1.0),
    cka=CKA(weight=0.5, sample_tokens=64),
    hidden=Hidden(weight=0.5, sample_tokens=48),
    attention=Attention(weight=0.5, layers="uniform", queries=8),
    diversity=Diversity(weight=0.1, sample_tokens=64),
    anchor=Anchor(cka=CKA(weight=0.2, sample_tokens=64), hidden=Hidden(weight=0.2, distance="cosine")),
)
TERMS = {
    "ce",
    "kl",
    "cka",
    "hidden",
    "attention",
    "diversity",
    "anchor_cka",
    "anchor_hidden",
    "balance",
    "router_z",
}


def with_anchor(module, chat, dense):
    hf = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    start_rows(hf, chat.new_marker_pieces)
    object.__setattr__(module, "anchor", OnlineTeacher(CausalModel(hf)))
    return module


def everything(chat, dense, teacher, objective=EVERYTHING, **options):
    torch.manual_seed(0)  # the projections
    return with_anchor(make_module(chat, dense, teacher, objective, **options), chat, dense)


def test_every_term_is_there_and_reaches_the_student(chat, rows, dense, teacher):
    module = everything(chat, dense, teacher)
    values, grads = gradients(module, chat, [[rows[:6], rows[6:]]], rows)
    assert set(values) == TERMS
    assert all(torch.isfinite(value) for value in values.values())
    assert set(grads) >= {"projections.0_1.weight", "projections.1_3.weight"}
    assert all(torch.isfinite(g).all() for g in grads.values())
    for name in ("cka", "hidden", "attention", "diversity", "anchor_cka", "anchor_hidden"):
        off = copy.deepcopy(EVERYTHING)
        term = getattr(off.anchor, name.removeprefix("anchor_")) if "anchor" in name else getattr(off, name)
        term.weight = 0.0
        fewer, without = gradients(everything(chat, dense, teacher, off), chat, [[rows[:6], rows[6:]]], rows)
        assert set(fewer) == TERMS - {name}
        changed = [n for n in without if not torch.allclose(without[n], grads[n], rtol=1e-4, atol=1e-9)]
        assert any("experts" in n for n in changed), name


def test_checkpointing_changes_nothing(chat, rows, dense, teacher):
    """The layers run twice then, hooks and all."""
    plain = gradients(everything(chat, dense, teacher), chat, [[rows[:6], rows[6:]]], rows)
    module = everything(chat, dense, teacher)
    module.model.hf.gradient_checkpointing_enable({"use_reentrant": False})
    module.model.train()
    checkpointed = gradients(module, chat, [[rows[:6], rows[6:]]], rows)
    assert relative(checkpointed[1], plain[1]) < 1e-5


def test_nothing_supervised_gives_a_graph_and_zero_gradient(chat, dense, teacher):
    _, grads = gradients(everything(chat, dense, teacher), chat, [[[]]], [])
    assert grads
    assert all(torch.isfinite(g).all() and g.abs().max() == 0 for g in grads.values())


def test_one_supervised_token_gives_no_nan(chat, rows, dense, teacher):
    short = rows[0]._replace(segment_ids=rows[0].segment_ids.copy())
    short.segment_ids[:-2] = 2  # one advisory token and the end
    values, grads = gradients(everything(chat, dense, teacher), chat, [[[short]]], [short])
    assert all(torch.isfinite(value) for value in values.values())
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_an_equal_teacher_is_the_optimum(chat, rows, dense, distance):
    spec = UpcycleSpec(num_experts=4, num_experts_per_tok=2, jitter=0.0)
    objective = copy.deepcopy(EVERYTHING)
    objective.hidden.distance = distance
    module = with_anchor(make_module(chat, dense, dense, objective), chat, dense)
    module.build(load_upcycled(str(dense), spec, dtype=torch.float32))
    start_rows(module.model.hf, chat.new_marker_pieces)
    values, _ = gradients(module, chat, [[rows]], rows)
    for name in ("kl", "cka", "hidden", "attention", "anchor_cka", "anchor_hidden"):
        assert abs(values[name].item()) < 1e-4, name
    assert values["diversity"].item() == pytest.approx(1.0, abs=1e-4), "copies are as alike as can be"


def test_terms_equal_plain_transformers_row_by_row(chat, rows, dense, teacher):
    """All positions are taken, so that no sampling stands between the two."""
    objective = Objective(
        ce=CrossEntropy(weight=1.0, segments=["assistant"]),
        cka=CKA(weight=1.0, sample_tokens=10_000, segments=["assistant"], debiased=False),
        hidden=Hidden(weight=1.0, sample_tokens=10_000, segments=["assistant"]),
        attention=Attention(weight=1.0, layers="last", queries=10_000),
        diversity=Diversity(weight=1.0, sample_tokens=10_000),
        balance=Balance(weight=0.0),
        router_z=RouterZ(weight=0.0),
    )
    module = everything(chat, dense, teacher, objective)
    values, _ = gradients(module, chat, [[rows[:3], rows[3:6]]], rows[:6])
    student, taught = copy.deepcopy(module.model.hf).double(), copy.deepcopy(module.teacher.model.hf).double()
    student.set_experts_implementation("eager")  # the others know no float64
    for model in (student, taught):
        model.set_attn_implementation("eager")
    seen = [run(student, taught, row, chat) for row in rows[:6]]
    x = [torch.cat([row["x"][i] for row in seen]) for i in range(2)]
    y = [torch.cat([row["y"][j] for row in seen]) for j in (1, 3)]

    def cka(a, b):
        a, b = a - a.mean(0), b - b.mean(0)
        cross, own = (a.T @ b).norm() ** 2, (a.T @ a).norm() * (b.T @ b).norm()
        return cross / own

    assert values["cka"].item() == pytest.approx(1 - (cka(x[0], y[0]) + cka(x[1], y[1])).item() / 2, rel=1e-4)
    weights = [module.model.projections[name].weight.double() for name in ("0_1", "1_3")]
    mse = [(((a @ w.T - b) ** 2).mean(-1) / (b**2).mean(-1)).mean() for a, b, w in zip(x, y, weights, strict=True)]
    assert values["hidden"].item() == pytest.approx(sum(mse).item() / 2, rel=1e-4)
    kl = torch.cat([row["attention"] for row in seen])
    assert values["attention"].item() == pytest.approx(kl.mean().item(), rel=1e-3)
    assert values["diversity"].item() == pytest.approx(diversity(student, seen), rel=1e-3)


def run(student, taught, row, chat):
    """Hidden states and attention of one row at the positions that predict an advisory token."""
    ids = torch.tensor(row.input_ids)[None]
    targets, segments = ids[0, 1:], torch.tensor(row.segment_ids)[1:]
    at = ((segments == 4) & ~torch.isin(targets, torch.tensor(sorted(chat.control_ids)))).nonzero()[:, 0]
    blocks = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: blocks.append(args[0][0].detach()))
        for layer in student.model.layers
    ]
    streams = {}
    outputs = []
    for name, model in (("x", student), ("y", taught)):
        ends = [
            layer.register_forward_hook(
                lambda _m, _a, output, name=name: streams.setdefault(name, []).append(output[0])
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            outputs.append(model(ids, output_attentions=True, use_cache=False))
        for hook in ends:
            hook.remove()
    for hook in hooks:
        hook.remove()
    probabilities = [out.attentions[-1][0].unflatten(0, (2, 2)).mean(1)[:, at] for out in outputs]
    kl = torch.nn.functional.kl_div(probabilities[0].log(), probabilities[1], reduction="none").nan_to_num(0.0)
    return {
        "x": [stream[at] for stream in streams["x"]],
        "y": [stream[at] for stream in streams["y"]],
        "attention": kl.sum(-1).mean(0),
        "blocks": blocks,
    }


def diversity(student, seen):
    """Mean debiased CKA between all pairs of experts, by explicit Gram matrices."""
    values = []
    for i, layer in enumerate(student.model.layers):
        x = torch.cat([row["blocks"][i] for row in seen])
        experts = layer.mlp.experts
        outputs = []
        for e in range(4):
            gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, -1)
            outputs.append((torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T)
        values += [debiased_cka(a, b) for j, a in enumerate(outputs) for b in outputs[j + 1 :]]
    return float(sum(values) / len(values))


def debiased_cka(a, b):
    def hsic(k, m):
        n = len(k)
        k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
        return ((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()) / (
            n * (n - 3)
        )

    k, m = a @ a.T, b @ b.T
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def test_projections_are_trained_and_not_exported(chat, dense, teacher):
    module = everything(chat, dense, teacher)
    module._trainer = SimpleNamespace(max_steps=10, accumulate_grad_batches=1)
    trained = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert {id(p) for p in module.model.projections.parameters()} <= trained
    assert not any("projections" in name for name in module.model.hf.state_dict())
    assert everything(chat, dense, dense).model.projections.state_dict() == {}, "equal widths need none"


def test_a_cka_matrix_needs_a_teacher(dense):
    """An objective with an anchor alone loads none."""
    objective = Objective(anchor=Anchor(cka=CKA(weight=1.0)))
    module = DistillModule(StudentConfig(source=str(dense)), objective=objective)
    with pytest.raises(ValueError, match="CKAMonitor compares with a teacher"):
        CKAMonitor().setup(SimpleNamespace(), module, "fit")


def test_an_anchor_needs_a_source(chat):
    student = StudentConfig(config={"model_type": "qwen3_moe", "num_hidden_layers": 1}, upcycle=None)
    module = DistillModule(student, objective=Objective(anchor=Anchor(cka=CKA(weight=1.0))))
    with pytest.raises(ValueError, match="model.anchor is missing"):
        module.check(chat)


def test_experts_are_run_inside_their_layer_only_when_asked(chat, rows, dense, teacher):
    model = make_module(chat, dense, teacher, EVERYTHING).model
    ids = torch.tensor(rows[0].input_ids)[None]
    batch = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "expert_sample": torch.tensor([3, 5])}

    def look(reads):
        return model(batch, torch.tensor([0]), lambda hidden, head: None, reads)

    assert look(Reads()).experts == []
    outputs = look(Reads(experts=True)).experts
    assert [tuple(out.shape) for out in outputs] == [(SPEC.num_experts, 2, 32)] * 2
    assert look(Reads()).experts == [], "the wish of one pass does not outlive it"
    look(Reads(experts=True))
    model.hf(ids[:, :2])  # generation goes past `forward`, with fewer tokens than were sampled from


def test_diversity_needs_experts(chat, dense):
    module = PretrainModule(ModelConfig(source=str(dense)), objective=Objective(diversity=Diversity(weight=0.1)))
    with pytest.raises(ValueError, match=r"objective\.diversity compares experts, and model\.network has none"):
        module.check(chat)


class HostReads(TorchDispatchMode):
    """Collect the operations whose result, or its size, the host has to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten::equal", "repeat_interleave.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        by_place = name.startswith("aten::index") and isinstance(args[1], list | tuple)
        masked = by_place and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        if masked or any(waiting in name for waiting in self.WAITING):
            self.seen.append(f"{name} in {''.join(traceback.format_stack(limit=12)[:-1])}")
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits_for_the_device_within_a_step(chat, rows, dense, teacher):
    """Positions are chosen on the CPU; from there on, no size and no branch hangs on what the device computes."""
    module = everything(chat, dense, teacher)
    batch = module.on_before_batch_transfer(collate([rows], totals(chat, rows, 1), 2048, chat.pad_id), 0)
    with HostReads() as reads:
        module.training_step(batch, 0)["loss"].backward()
    # On CPU alone, the fused loss looks at the factor that backward hands it.
    assert [seen for seen in reads.seen if "losses/logits.py" not in seen] == []
    with HostReads() as reads:
        batch["targets"].max().item()
    assert len(reads.seen) == 1, "what the test looks for is found where it is"
