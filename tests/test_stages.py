"""Stages: one run is the runs that it is made of, chained; a run that is resumed goes on as if it had not stopped."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import yaml

from agri_moe.cli import main
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.models.distill import DistillModule
from agri_moe.models.source import StudentConfig
from agri_moe.models.upcycle import UpcycleSpec
from agri_moe.objective import Objective
from agri_moe.optimizer import OptimizerConfig
from agri_moe.schedules import Schedule, Value
from agri_moe.stages import Stage, override, settings, spans, stage_at, trained_summary
from agri_moe.teacher import TeacherConfig
from agri_moe.terms import CKA, KL, Balance, CrossEntropy, Hidden, SegmentName
from tests.test_cli import refused, scalars

Weights = dict[str, torch.Tensor]

BASE = Objective(
    ce=CrossEntropy(weight=0.5),
    kl=KL(weight=1.0, temperature=Schedule(3.0, 1.0, steps=4)),
    cka=CKA(weight=0.1, sample_tokens=64),
)
FIRST: dict[str, Any] = {
    "freeze": ["self_attn", "norm", "embed"],
    "learning_rate": 2e-2,
    "learning_rate_multipliers": {r"mlp\.gate": 3.0},
    "warmup_steps": 1,
}
SECOND: dict[str, Any] = {
    "freeze": ["embed", "down_proj"],
    "learning_rate_multipliers": {"self_attn": 0.3},
    "objective": {
        "ce": {"weight": {"start": 1.0, "end": 0.2, "steps": 3}},
        "kl": {"weight": 0.3},
        "balance": {"weight": 0.1},
    },
}
SECOND_OBJECTIVE = Objective(
    ce=CrossEntropy(weight=Schedule(1.0, 0.2, steps=3)),
    kl=KL(weight=0.3, temperature=Schedule(3.0, 1.0, steps=4)),
    cka=CKA(weight=0.1, sample_tokens=64),
    balance=Balance(weight=0.1),
)
STEPS = (3, 4)


def two_stages() -> list[Stage]:
    return [Stage(steps=STEPS[0], **FIRST), Stage(**copy.deepcopy(SECOND))]


class Watch(lightning.Callback):
    """Keeps what a test asks about; starts from given weights and rows; saves after the steps that it is told."""

    def __init__(self, start: tuple[Weights, int] | None = None, save: dict[int, Path] | None = None):
        self.start = start
        self.save = save or {}
        self.weights: list[Weights] = []
        self.rates: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []

    def on_fit_start(self, trainer, pl_module):
        if self.start is not None:
            pl_module.model.hf.load_state_dict(self.start[0], strict=False)
            trainer.fit_loop.epoch_loop.batch_progress.total.processed = self.start[1]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        names = {id(p): name for name, p in pl_module.model.hf.named_parameters()}
        self.rates.append({names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.weights):
            self.weights.append({name: p.detach().clone() for name, p in pl_module.model.hf.named_parameters()})
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            if trainer.global_step in self.save:
                trainer.save_checkpoint(self.save[trainer.global_step])


class Make:
    """Small distillation runs."""

    def __init__(self, corpus: Path, dense: Path, teacher: Path, root: Path):
        self.corpus, self.dense, self.teacher, self.root = corpus, dense, teacher, root

    def module(self, **options: Any) -> DistillModule:
        options = {"learning_rate": 1e-2, "optimizer": OptimizerConfig(warmup_steps=2)} | options
        return DistillModule(
            StudentConfig(str(self.dense), UpcycleSpec(num_experts=4, num_experts_per_tok=2, jitter=0.3)),
            TeacherConfig(source=str(self.teacher), dtype="float32"),
            **{"objective": BASE} | options,
        )

    def fit(
        self, module: DistillModule, steps: int, watch: Watch, ckpt_path: Path | None = None, **options: Any
    ) -> Any:
        trainer = lightning.Trainer(
            **{"max_steps": steps, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1} | options,
            accelerator="cpu",
            callbacks=[watch],
            logger=False,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=self.root,
        )
        data = ChatDataModule(
            tokenizer=str(self.corpus / "tokenizer"),
            train=str(self.corpus / "train.parquet"),
            validation_share=0,
            max_length=512,
            tokens_per_batch=512,
            cache_dir=str(self.root / "cache"),
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return trainer


@pytest.fixture
def make(corpus: Path, dense: Path, teacher: Path, tmp_path: Path) -> Make:
    return Make(corpus, dense, teacher, tmp_path)


def differing(a: Weights, b: Weights) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


# ---------------------------------------------------------------------- the promise


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_two_stage_run_is_two_runs_chained_by_hand(make, accumulate):
    """Bit by bit: weights, learning rates and what is logged; each step on rows of its own."""
    whole, options = Watch(), {"accumulate_grad_batches": accumulate}
    trainer = make.fit(make.module(stages=two_stages()), sum(STEPS), whole, **options)
    assert sum(STEPS) * accumulate < trainer.num_training_batches

    first, second = dict(FIRST), dict(SECOND)
    first["optimizer"] = OptimizerConfig(warmup_steps=first.pop("warmup_steps"))
    second["objective"] = SECOND_OBJECTIVE
    one = Watch()
    make.fit(make.module(**first), STEPS[0], one, **options)
    two = Watch(start=(one.weights[-1], STEPS[0] * accumulate))
    make.fit(make.module(**second), STEPS[1], two, **options)

    for step, (got, wanted) in enumerate(zip(whole.weights, one.weights + two.weights, strict=True)):
        assert not differing(got, wanted), f"after step {step}"
    for got_rates, wanted_rates in zip(whole.rates, one.rates + two.rates, strict=True):
        assert {name: got_rates[name] for name in wanted_rates} == pytest.approx(wanted_rates, rel=1e-14)
    for got_metrics, wanted_metrics in zip(whole.metrics, one.metrics + two.metrics, strict=True):
        assert got_metrics.pop("train/stage") in (1.0, 2.0)
        assert got_metrics == pytest.approx(wanted_metrics, rel=1e-14)


def test_what_rests_does_not_move_and_the_second_stage_does_not_remember(make):
    watch, module = Watch(), make.module(stages=two_stages())
    trainer = make.fit(module, sum(STEPS), watch)
    names = set(watch.weights[0])
    learned = {name for name in names if "mlp.experts" in name or "mlp.gate" in name}
    end_of_first = watch.weights[STEPS[0] - 1]
    assert differing(watch.weights[0], end_of_first) == learned
    assert differing(end_of_first, watch.weights[-1]) == {n for n in names if "embed" not in n and "down_proj" not in n}
    assert [m["train/stage"] for m in watch.metrics] == [1.0] * STEPS[0] + [2.0] * STEPS[1]
    (steps,) = {float(moments["step"]) for moments in trainer.optimizers[0].state.values()}
    assert steps == STEPS[1], "the moments are those of the second stage"
    frozen = {n for n, p in module.model.hf.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in names if "embed" in n or "down_proj" in n}


@pytest.mark.parametrize("stop", [2, 3, 5], ids=["mid-stage 1", "at the boundary", "mid-stage 2"])
def test_resumed_equals_undisturbed(make, tmp_path, stop):
    path = tmp_path / "checkpoint.ckpt"
    undisturbed = Watch(save={stop: path})
    make.fit(make.module(stages=two_stages()), sum(STEPS), undisturbed)
    resumed = Watch()
    resumed.weights = list(undisturbed.weights[:stop])  # so that its steps are counted as in the other
    make.fit(make.module(stages=two_stages()), sum(STEPS), resumed, ckpt_path=path)
    assert len(resumed.weights) == sum(STEPS)
    assert not any(map(differing, undisturbed.weights, resumed.weights))
    assert resumed.rates == undisturbed.rates[stop:]


def test_gradients_that_cannot_be_spared_are_dropped_before_clipping(make, monkeypatch):
    """As DDP and FSDP2 need it: the same weights and the same norm as where gradients are not even formed."""
    plain, dropped = Watch(), Watch()
    make.fit(make.module(stages=two_stages()), sum(STEPS), plain)
    monkeypatch.setattr("agri_moe.models.base.SingleDeviceStrategy", type("Other", (), {}))
    module = make.module(stages=two_stages())
    make.fit(module, sum(STEPS), dropped)
    # down_proj rests in stage 2 only, so its gradient was formed there too.
    assert all(p.requires_grad for n, p in module.model.hf.named_parameters() if "down_proj" in n)
    assert not any(map(differing, plain.weights, dropped.weights))
    assert plain.metrics == dropped.metrics


def test_learning_rates_worked_by_hand(make):
    """Two stages of three and four steps, warm-up 1 and 0, the cosine down to a tenth."""
    plan = [
        Stage(steps=3, train=["mlp"], learning_rate=0.2, warmup_steps=1, learning_rate_multipliers={"gate": 0.5}),
        Stage(steps=4, warmup_steps=0, learning_rate_multipliers={"gate": 0.0, "q_proj": 2.0}),
    ]
    module = make.module(learning_rate=0.1, stages=plan, optimizer=OptimizerConfig(final_learning_rate=0.1))
    watch = Watch()
    make.fit(module, 7, watch, gradient_clip_val=None)
    half = 0.1 + 0.9 / 2
    first = [1 / 2, 1.0, half]
    quarter = (1 + math.cos(math.pi / 4)) / 2
    second = [1.0, 0.1 + 0.9 * quarter, half, 0.1 + 0.9 * (1 - quarter)]
    zeros = [0.0] * 3
    wanted = {
        "mlp.experts.gate_up_proj": [0.1 * f for f in first] + [0.0] * 4,
        "mlp.experts.down_proj": [0.2 * f for f in first] + [0.1 * f for f in second],
        "q_proj.weight": zeros + [0.2 * f for f in second],
        "model.norm.weight": zeros + [0.1 * f for f in second],
    }
    for end, rates in wanted.items():
        (name,) = (n for n in watch.rates[0] if n.endswith(end) and ("layers.1" in n or "layers" not in n))
        assert [step[name] for step in watch.rates] == pytest.approx(rates), name
    assert [m["train/learning_rate"] for m in watch.metrics] == pytest.approx(
        [0.2 * f for f in first] + [0.1 * f for f in second]
    )


def test_stages_in_epochs(make, capsys):
    module, watch = make.module(stages=[Stage(epochs=0.5, train=["mlp"]), Stage(epochs=1.5)]), Watch()
    trainer = make.fit(module, -1, watch, max_epochs=2, limit_train_batches=5, accumulate_grad_batches=2)
    assert trainer.global_step == 6
    assert [m["train/stage"] for m in watch.metrics] == [1.0] * 2 + [2.0] * 4
    assert module.stage_progress == 1.0


def test_one_stage_that_says_nothing_changes_nothing(make):
    plain, staged = Watch(), Watch()
    make.fit(make.module(freeze=["norm"]), 3, plain)
    make.fit(make.module(freeze=["norm"], stages=[Stage()]), 3, staged)
    assert not any(map(differing, plain.weights, staged.weights))
    assert plain.rates == staged.rates


def test_the_command_line_runs_stages_and_tells_and_goes_on(distill_config, caplog, tmp_path):
    """From YAML, in one run folder; validation comes under the last stage's objective."""
    config = yaml.safe_load(distill_config.read_text())
    stages: list[dict[str, Any]] = [
        {"steps": 2, "train": [r"mlp\.(experts|gate)"], "objective": {"kl": {"weight": 0.0}, "cka": {"weight": 0.0}}},
        {"learning_rate": 1e-3, "objective": {"kl": {"weight": {"start": 0.0, "end": 1.0, "steps": 2}}}},
    ]
    config["model"]["init_args"]["stages"] = stages
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    distill_config.write_text(yaml.safe_dump(config))
    with caplog.at_level("INFO"):
        cli = main(["fit", "--config", str(distill_config)])
    told = [line for line in caplog.messages if line.startswith("Stage ")]
    assert len(told) == 2
    assert told[0].startswith("Stage 1 of 2, steps 0 to 2: trains 49,408 of 76,224 parameters: mlp.")
    assert "mlp.gate 256" in told[0]
    assert "self_attn" not in told[0]
    assert told[1].startswith("Stage 2 of 2, steps 2 to 6: trains ")
    logged = scalars(tmp_path / "lightning_logs" / "version_0")
    assert [value for _, value in logged["train/stage"]] == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert cli.model.objective.kl.weight == Schedule(0.0, 1.0, steps=2)
    checkpoint = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "step=00000004.ckpt"
    caplog.clear()
    with caplog.at_level("INFO"):
        main(["fit", "--config", str(distill_config), f"--resume={checkpoint}"])
    assert [line for line in caplog.messages if line.startswith("Stage ")] == told[1:]
    again = scalars(tmp_path / "lightning_logs" / "version_1")
    assert all(again[tag] == logged[tag][-len(again[tag]) :] for tag in logged)
    saved = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["stages"][0]["steps"] == 2


def test_what_a_stage_leaves_out_is_logged_no_more_and_validated_with_its_own_stage(distill_config, tmp_path):
    """The validation right after the first stage's last step is about the first stage."""
    config = yaml.safe_load(distill_config.read_text())
    config["model"]["init_args"]["stages"] = [{"steps": 2}, {"objective": {"cka": {"weight": 0.0}}}]
    config["trainer"] |= {"val_check_interval": 2, "max_steps": 4, "limit_val_batches": 1}
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    distill_config.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(distill_config)])
    logged = scalars(tmp_path / "lightning_logs" / "version_0")
    assert [step for step, _ in logged["train/cka"]] == [0, 1]
    assert [step for step, _ in logged["val/cka"]] == [0, 1]
    assert [step for step, _ in logged["train/ce"]] == [step for step, _ in logged["val/ce"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_projections_rest_where_a_stage_does_not_compare(make, strategy):
    """DDP waits for the gradient of every parameter, used or not."""
    hidden = {"hidden": {"weight": 1.0}}
    module = make.module(
        stages=[Stage(steps=2, objective=hidden), Stage(steps=2), Stage(objective=hidden)],
        optimizer=OptimizerConfig(warmup_steps=0, weight_decay=0.5),
    )
    seen = []

    class Look(Watch):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pass

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.model.projections["0_1"].weight.detach().clone())

    make.fit(module, 6, Look(), accumulate_grad_batches=1, strategy=strategy, devices=1)
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, False, False, True, True]


def test_a_checkpoint_of_another_objective(make, tmp_path):
    """Running means come and go with the objective; a projection that was never trained does not."""
    balanced = Objective(kl=KL(weight=1.0), cka=CKA(weight=0.1, sample_tokens=64, layer_weights="balanced"))
    make.fit(make.module(objective=balanced), 2, Watch(save={2: tmp_path / "a.ckpt"}))
    make.fit(make.module(), 3, Watch(save={3: tmp_path / "b.ckpt"}), ckpt_path=tmp_path / "a.ckpt")
    module = make.module(objective=balanced)
    make.fit(module, 4, Watch(), ckpt_path=tmp_path / "b.ckpt")
    assert module.running["cka"].weight.item() == pytest.approx(0.1), "one update"
    hidden = Objective(kl=KL(weight=1.0), hidden=Hidden(weight=0.1))
    with pytest.raises(ValueError, match=r"the checkpoint lacks model\.projections\.0_1\.weight"):
        make.fit(make.module(objective=hidden), 4, Watch(), ckpt_path=tmp_path / "b.ckpt")


# ---------------------------------------------------------------------- objectives


@dataclass
class Adaptive:
    minimum: float
    maximum: float = 9.0


@dataclass
class Part:
    weight: Value = 0.0
    temperature: float | Schedule | Adaptive = 1.0
    segments: list[SegmentName] = field(default_factory=lambda: ["assistant"])
    layers: str | list[tuple[int, int]] = "uniform"


@dataclass
class Nested:
    cka: Part = field(default_factory=Part)
    alpha: Value | None = None


@dataclass
class Whole:
    anchor: Nested = field(default_factory=Nested)
    kl: Part = field(default_factory=lambda: Part(weight=1.0, temperature=Schedule(2.0, 1.0, 5, "cosine", 3)))


def test_override_reaches_every_kind_of_field_and_leaves_the_rest():
    whole = Whole()
    before = copy.deepcopy(whole)
    changes = {
        "anchor": {"cka": {"weight": {"start": 1, "end": 0, "steps": 7}, "layers": [[0, 1], [1, 3]]}, "alpha": 0.5},
        "kl": {"temperature": {"minimum": 0.5}, "segments": ["thought"]},
    }
    given = copy.deepcopy(changes)
    assert override(whole, changes, "key") == Whole(
        anchor=Nested(cka=Part(weight=Schedule(1.0, 0.0, 7), layers=[(0, 1), (1, 3)]), alpha=0.5),
        kl=Part(weight=1.0, temperature=Adaptive(0.5), segments=["thought"]),
    )
    assert changes == given
    assert whole == before
    replaced = override(whole, {"kl": {"temperature": {"start": 4, "end": 1, "steps": 2}}}, "key")
    assert replaced.kl.temperature == Schedule(4.0, 1.0, 2), (
        "a value is replaced whole: the old kind and delay are gone"
    )
    assert override(whole, {"kl": {"temperature": Schedule(4, 1, 2)}}, "key") == replaced
    assert override(whole, {}, "key") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kll": {}}, r"key\.kll is no key; known are anchor, kl\."),
        ({"kl": {"wieght": 1}}, r"key\.kl\.wieght is no key; known are weight, temperature, segments, layers\."),
        ({"kl": 3}, r"key\.kl must be a mapping"),
        (
            {"anchor": {"cka": {"weight": "heavy"}}},
            r"key\.anchor\.cka\.weight cannot be 'heavy'; it takes float or Sched",
        ),
        (
            {"kl": {"weight": {"start": 1, "ende": 0, "steps": 3}}},
            r"it takes float or Schedule \{start, end, steps, kind,",
        ),
        ({"kl": {"segments": ["all"]}}, r"it takes a list of system or user or thought or assistant"),
    ],
)
def test_override_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        override(Whole(), changes, "key")


def test_an_outcome_that_makes_no_sense_names_the_stage():
    with pytest.raises(
        ValueError, match=r"model\.stages\[0\]\.objective cannot be so: objective\.kl\.weight must not be neg"
    ):
        resolve([Stage(objective={"kl": {"weight": -1}})])
    with pytest.raises(ValueError, match=r"objective\.kl\.segments names thought"):
        resolve([Stage(objective={"ce": {"segments": ["assistant"]}, "kl": {"segments": ["thought"]}})])


# ---------------------------------------------------------------------- mistakes


def resolve(stages: Sequence[Stage]) -> Any:
    return settings(
        stages, objective=BASE, learning_rate=0.1, warmup_steps=3, freeze=["norm"], multipliers={"gate": 2.0}
    )


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"model\.stages is empty"),
        ([Stage(), Stage()], r"model\.stages\[0\] has neither steps nor epochs"),
        ([Stage(steps=1, epochs=1), Stage()], r"model\.stages\[0\] has both steps and epochs"),
        ([Stage(steps=0), Stage()], r"model\.stages\[0\]\.steps must be positive"),
        ([Stage(steps=1), Stage(epochs=-0.5)], r"model\.stages\[1\]\.epochs must be positive"),
        ([Stage(learning_rate=0.0)], r"model\.stages\[0\]\.learning_rate must be positive"),
        ([Stage(warmup_steps=-1)], r"model\.stages\[0\]\.warmup_steps must not be negative"),
        ([Stage(freeze=["a"], train=["b"])], r"model\.stages\[0\] has both freeze and train"),
        ([Stage(train=[])], r"model\.stages\[0\]\.train is empty"),
    ],
)
def test_settings_that_make_no_sense(stages, message):
    with pytest.raises(ValueError, match=message):
        resolve(stages)


NAMES = ["embed.weight", "layers.0.mlp.gate.weight", "layers.0.mlp.experts", "layers.0.norm.weight"]


@pytest.mark.parametrize(
    ("stage", "scales"),
    [
        (Stage(), [1, 2, 1, 0]),
        (Stage(freeze=[]), [1, 2, 1, 1]),
        (Stage(freeze=["mlp"]), [1, 0, 0, 1]),
        (Stage(train=["mlp"]), [0, 2, 1, 0]),
        (Stage(train=["norm", "gate"]), [0, 2, 0, 1]),
        (Stage(train=["norm", "gate"], learning_rate_multipliers={}), [0, 1, 0, 1]),
        (Stage(learning_rate_multipliers={"embed": 0.0, "e": 3.0}), [0, 3, 3, 0]),
    ],
)
def test_what_a_stage_trains(stage, scales):
    assert resolve([stage])[0].scales(NAMES) == dict(zip(NAMES, scales, strict=True))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(freeze=["nrom"]), r"model\.stages\[0\]\.freeze: 'nrom' matches no parameter; names look like layers"),
        (Stage(train=["["]), r"model\.stages\[0\]\.train: '\[' is no regular expression"),
        (
            Stage(learning_rate_multipliers={"xyz": 1}),
            r"model\.stages\[0\]\.learning_rate_multipliers: 'xyz' matches no",
        ),
        (Stage(learning_rate_multipliers={"gate": -1}), r"the factor of 'gate' must not be negative"),
    ],
)
def test_patterns_that_are_wrong(stage, message):
    with pytest.raises(ValueError, match=message):
        resolve([stage])[0].scales(NAMES)


@pytest.mark.parametrize(
    ("stages", "total", "wanted"),
    [
        (None, 10, [range(10)]),
        ([Stage()], 10, [range(10)]),
        ([Stage(steps=10)], 10, [range(10)]),
        ([Stage(steps=4), Stage()], 10, [range(4), range(4, 10)]),
        ([Stage(epochs=0.5), Stage(epochs=0.5), Stage(epochs=1)], 10, [range(2), range(2, 5), range(5, 10)]),
        ([Stage(steps=1), Stage(epochs=1), Stage()], 10, [range(1), range(1, 6), range(6, 10)]),
    ],
)
def test_spans_of_an_epoch_of_five_steps(stages, total, wanted):
    found = spans(stages, total, lambda: 5)
    assert found == wanted
    steps = [step for index, span in enumerate(found) for step in span if stage_at(found, step) == index]
    assert steps == list(range(total))
    assert stage_at(found, total) == len(found) - 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(steps=11), Stage()], "need 11 optimizer steps, the run has 10; shorten them"),
        ([Stage(steps=10), Stage()], "need 10 optimizer steps and some for the last stage, the run has 10"),
        ([Stage(steps=6), Stage(steps=6)], "need 12 optimizer steps, the run has 10"),
        ([Stage(steps=6), Stage(epochs=1)], "need 11 optimizer steps, the run has 10"),
        ([Stage(epochs=2), Stage()], "need 10 optimizer steps and some"),
        ([Stage(steps=6), Stage(steps=2)], "last 8 optimizer steps, the run 10; leave steps and epochs of the last"),
        ([Stage(epochs=0.05), Stage()], r"model\.stages\[0\]\.epochs is less than one optimizer step"),
    ],
)
def test_stages_that_do_not_fill_the_run(stages, message):
    with pytest.raises(ValueError, match=message):
        spans(stages, 10, lambda: 5)


def test_streamed_rows_have_no_epochs(make):
    module = make.module(stages=[Stage(epochs=1), Stage()])
    data = SimpleNamespace(streaming=True)
    module._trainer = SimpleNamespace(max_steps=10, fast_dev_run=False, datamodule=data, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match="stages must count in steps, for streamed rows"):
        module._stage_spans()


@pytest.mark.parametrize(
    ("stages", "needle"),
    [
        ([{"steps": 2, "freeze": ["self_atn"]}, {}], "model.stages[0].freeze: 'self_atn' matches no parameter"),
        ([{"steps": 2}, {"train": ["layers"], "freeze": []}], "model.stages[1] has both freeze and train"),
        ([{"steps": 2}, {"freeze": ["."]}], "model.stages[1] trains nothing"),
        (
            [{"steps": 2}, {"objective": {"kl": {"wieght": 2}}}],
            "model.stages[1].objective.kl.wieght is no key; known are",
        ),
        (
            [{"steps": 2}, {"objective": {"kl": {"weight": {"start": 1}}}}],
            "model.stages[1].objective.kl.weight cannot be",
        ),
        ([{"steps": 2}, {"objective": {"kl": {"weight": -2}}}], "model.stages[1].objective cannot be so"),
        ([{"steps": 2}, {"objective": {"cka": {"layers": [[0, 9]]}}}], "model.stages[1]: objective.cka.layers: [0, 9]"),
        (
            [{"steps": 2}, {"objective": {"attention": {"weight": 1.0, "heads": [[0, 0], [0, 7]]}}}],
            "model.stages[1]: objective.attention.heads: [[0, 0], [0, 7]] must be pairs of a student's key-value group",
        ),
        ([{"steps": 2}, {"lerning_rate": 2}], "lerning_rate"),
        ([{"steps": 7}, {}], "the stages need 7 optimizer steps, the run has 6"),
    ],
)
def test_the_command_line_refuses_before_weights_are_read(distill_config, capsys, monkeypatch, stages, needle):
    def loaded(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr("agri_moe.models.source.load_upcycled", loaded)
    config = yaml.safe_load(distill_config.read_text())
    config["model"]["init_args"]["stages"] = stages
    distill_config.write_text(yaml.safe_dump(config))
    message = refused(capsys, "fit", "--config", str(distill_config))
    assert needle in message
    assert len(message) < 400


def test_what_is_told():
    scales = {"model.layers.0.mlp.gate.weight": 1.0, "model.layers.1.mlp.gate.weight": 0.0, "lm_head.weight": 2.0}
    sizes = dict.fromkeys(scales, 1500) | {"lm_head.weight": 3}
    told = trained_summary(scales, sizes)
    assert told == "trains 1,503 of 3,003 parameters: mlp.gate 1,500 of 3,000, lm_head 3"
