"""Steps that are not finite, or jump: left out on every rank, counted, named; the run goes on as without them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger

from agri_moe.callbacks.numerics import NumericsGuard
from agri_moe.cli import main
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.models.layerwise import LayerwiseModule
from agri_moe.models.pretrain import PretrainModule
from agri_moe.models.source import ModelConfig
from agri_moe.objective import Objective
from agri_moe.terms import CrossEntropy
from agri_moe.trained import load_checkpoint
from tests.ranks import run_ranks
from tests.test_cli import scalars
from tests.test_layerwise import MOVING
from tests.test_two_ranks import sharded


class Spoiled(PretrainModule):
    """Whose loss is not finite, or large, on micro-batches with a chosen row; or that leaves a step out by hand."""

    factors: dict[int, float]  # row -> factor on the loss of its micro-batch
    by_hand: frozenset[int] = frozenset()  # optimizer steps

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        out = super().training_step(batch, batch_idx)
        for row, factor in self.factors.items():
            if (batch["row_ids"] == row).any():
                out["loss"] = out["loss"] * factor
        return out

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.global_step in self.by_hand:
            for parameter in self.parameters():
                parameter.grad = None


class Watcher(lightning.Callback, Logger):
    """Keeps what each optimizer step had: its rows, and what was logged of it."""

    name, version = "watcher", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[set[int]] = []
        self.metrics: list[dict[str, float]] = []
        self._step: set[int] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._step |= {*batch["row_ids"].flatten().tolist()} - {-1}
        if trainer.global_step > len(self.rows):
            self.rows.append(self._step)
            self._step = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)

    def log_hyperparams(self, *args: Any) -> None:
        pass


def data_module(corpus: Path, tmp_path: Path, **options: Any) -> ChatDataModule:
    files = {"train": str(corpus / "train.parquet"), "validation": str(corpus / "validation.parquet")}
    given = {"tokenizer": str(corpus / "tokenizer"), "cache_dir": str(tmp_path / "cache"), "max_length": 512}
    return ChatDataModule(**{**files, **given, "tokens_per_batch": 1024, **options})


def fit(
    module: PretrainModule, data: ChatDataModule, *callbacks: lightning.Callback, **options: Any
) -> tuple[lightning.Trainer, Watcher]:
    watcher = Watcher()
    given = {"max_steps": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0} | options
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=watcher,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[*callbacks, watcher],
        **given,
    )
    trainer.fit(module, datamodule=data, ckpt_path=given.pop("ckpt_path", None))
    return trainer, watcher


def spoiled(source: Path, factors: dict[int, float], by_hand: frozenset[int] = frozenset()) -> Spoiled:
    torch.manual_seed(0)
    module = Spoiled(network=ModelConfig(str(source)), learning_rate=1e-2)
    module.factors, module.by_hand = factors, by_hand
    return module


def weights(module: PretrainModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.model.hf.state_dict().items()}


@pytest.fixture(scope="module")
def healthy(corpus: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Watcher:
    """What an undisturbed run looks like."""
    _, watcher = fit(spoiled(dense, {}), data_module(corpus, tmp_path_factory.mktemp("healthy")))
    return watcher


@pytest.mark.parametrize(("factor", "precision"), [(math.nan, "32-true"), (math.inf, "bf16-mixed")])
def test_a_step_that_is_not_finite_is_left_out(
    factor: float, precision: Any, corpus: Path, dense: Path, tmp_path: Path, healthy: Watcher
) -> None:
    """The weights are those of a run whose optimizer was kept from that step, to the bit; logged terms are finite."""
    row = min(healthy.rows[2])
    data = data_module(corpus, tmp_path)
    module = spoiled(dense, {row: factor})
    with pytest.warns(UserWarning, match=rf"Step 2 is left out.*train\.parquet rows .*\b{row}\b") as warned:
        trainer, watcher = fit(module, data, precision=precision)
    (told,) = [str(w.message) for w in warned if "left out" in str(w.message)]
    named = {int(number) for number in re.findall(r"\d+", told.split("parquet rows")[1])}
    assert row in named < healthy.rows[2], "the micro-batch with that row, and not the other one of the step"
    assert watcher.rows == healthy.rows, "the order of the rows is as it was"
    assert [m["train/skipped_steps"] for m in watcher.metrics] == [0, 0, 1, 1, 1, 1]
    assert "train/ce" not in watcher.metrics[2]
    assert all(math.isfinite(value) for metrics in watcher.metrics for value in metrics.values())
    assert trainer.global_step == 6

    other = spoiled(dense, {}, by_hand=frozenset({2}))
    fit(other, data, precision=precision)
    expected = weights(other)
    for name, value in weights(module).items():
        assert torch.equal(value, expected[name]), name


def test_without_a_step_to_leave_out_nothing_changes(corpus: Path, dense: Path, tmp_path: Path) -> None:
    """Clipping by the guard's norm is torch's own, to the bit."""
    guarded, free = spoiled(dense, {}), spoiled(dense, {})
    free.configure_callbacks = list  # type: ignore[method-assign]
    norms = []
    for module in (guarded, free):
        _, watcher = fit(module, data_module(corpus, tmp_path), gradient_clip_val=0.5)
        norms.append([metrics["train/gradient_norm"] for metrics in watcher.metrics])
    assert norms[0] == norms[1]
    expected = weights(free)
    for name, value in weights(guarded).items():
        assert torch.equal(value, expected[name]), name


def test_several_in_a_row_stop_the_run(corpus: Path, dense: Path, tmp_path: Path, healthy: Watcher) -> None:
    """In one sentence with the rows of the last; the weights are finite."""
    rows = {min(step): math.nan for step in healthy.rows[1:4]}
    module = spoiled(dense, rows)
    with pytest.raises(ValueError, match=r"step 3 is the 3rd in a row .* loss is nan.*train\.parquet rows \d+"):
        fit(module, data_module(corpus, tmp_path), NumericsGuard(stop_after=3))
    assert all(value.isfinite().all() for value in weights(module).values())


def test_a_run_that_diverges_stops_with_finite_weights(corpus: Path, dense: Path, tmp_path: Path) -> None:
    """Not a poisoned row, but a learning rate: the forward pass overflows."""
    module = Spoiled(network=ModelConfig(str(dense)), learning_rate=1e30)
    module.factors = {}
    module.optimizer_config.warmup_steps = 0
    with pytest.raises(ValueError, match=r"5th in a row .*model\.learning_rate"):
        fit(module, data_module(corpus, tmp_path), max_steps=12, accumulate_grad_batches=1)
    assert all(value.isfinite().all() for value in weights(module).values())


def test_a_spike_is_left_out_when_asked(corpus: Path, dense: Path, tmp_path: Path, healthy: Watcher) -> None:
    row = min(healthy.rows[5])
    factors = {row: 1000.0}
    guard = NumericsGuard(spike_sigma=6, window=8)
    with pytest.warns(UserWarning, match=rf"Step 5 is left out.*above.*6 sigma.*train\.parquet rows .*\b{row}\b"):
        fit(spoiled(dense, factors), data_module(corpus, tmp_path), guard)
    assert guard.skipped_steps == 1
    taken = NumericsGuard()
    fit(spoiled(dense, factors), data_module(corpus, tmp_path), taken)
    assert taken.skipped_steps == 0, "nobody asked"


def test_jumps_by_hand() -> None:
    """Limits worked out here; the other kind of step has a window of its own; the state goes on exactly."""
    guard = NumericsGuard(spike_sigma=2, window=8)
    for loss in (1.0, 2.0, 3.0, 2.0):
        assert guard._against([loss, 1.0 + loss / 10], "stage 1") == ""
    limit = 2 + 2 * math.sqrt(2 / 3)  # mean 2, squares of differences 1, 0, 1, 0 over 3
    again = NumericsGuard(spike_sigma=2, window=8)
    again.load_state_dict(guard.state_dict())
    assert guard._against([limit - 1e-6, 1.2], "stage 1") == ""
    assert "loss 3.65 is above 3.633" in again._against([3.65, 1.2], "stage 1")
    assert again._recent["stage 1"][0][-1] == pytest.approx(limit), "it enters as the limit"
    assert again._against([100.0, 1.2], "stage 2") == "", "nothing is known of this kind yet"
    assert "gradient norm" in again._against([2.0, 9.0], "stage 1")
    assert again._against([math.nan, 1.0], "stage 1") == "its loss is nan"
    assert all(math.isfinite(value) for values in again._recent["stage 1"] for value in values)


@pytest.mark.parametrize("options", [{"stop_after": 0}, {"window": 3}, {"spike_sigma": 0.0}, {"spike_sigma": math.nan}])
def test_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="NumericsGuard needs"):
        NumericsGuard(**options)


def test_the_command_line_has_it_by_default_and_resumes_it(distill_config: Path, tmp_path: Path) -> None:
    """With settings of its own in the config it is the only one; its window is in the checkpoint."""
    config = yaml.safe_load(distill_config.read_text())
    own = {"class_path": "agri_moe.callbacks.numerics.NumericsGuard", "init_args": {"spike_sigma": 20, "window": 8}}
    config["trainer"]["callbacks"] = [config["trainer"]["callbacks"][0], own]
    distill_config.write_text(yaml.safe_dump(config))
    half = main(["fit", "--config", str(distill_config), "--trainer.max_steps=4"])
    whole = main(["fit", "--config", str(distill_config)])
    guards = []
    for cli in (half, whole):
        assert cli is not None
        (guard,) = [c for c in cli.trainer.callbacks if isinstance(c, NumericsGuard)]  # type: ignore[attr-defined]
        guards.append(guard)
    windows = [guard._recent["stage 1"] for guard in guards]
    for before, after in zip(*windows, strict=True):
        assert [*after][:4] == [*before]
        assert len(after) == 6


SPOIL = """
import math, torch
torch.set_num_threads(1)
from agri_moe.cli import main
from agri_moe.models.distill import DistillModule
step = DistillModule.training_step

def training_step(self, batch, batch_idx):
    out = step(self, batch, batch_idx)
    if self.global_step in (1, 3) and self.global_rank == 1:
        out["loss"] = out["loss"] * math.nan
    return out

DistillModule.training_step = training_step
main()
"""


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_all_ranks_leave_the_same_steps_out(strategy: str, distill_config: Path, tmp_path: Path) -> None:
    """Only the second rank's loss is not finite."""
    config = yaml.safe_load(distill_config.read_text())
    config["trainer"] |= {"max_steps": 5, "precision": "bf16-mixed"}
    config["trainer"] |= sharded(2) if strategy == "sharded" else {"devices": 2, "strategy": "ddp"}
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:2]
    distill_config.write_text(yaml.safe_dump(config))
    run_ranks(["-c", SPOIL, "fit", "--config", str(distill_config)], 2)
    run = tmp_path / "lightning_logs" / "version_0"
    logged = scalars(run)
    assert [value for _, value in logged["train/skipped_steps"]] == [0, 1, 1, 2, 2]
    assert [step for step, _ in logged["train/ce"]] == [0, 2, 4]
    assert [step for step, _ in logged["router_entropy/layer_00"]] == [0, 2, 4]
    assert all(math.isfinite(value) for values in logged.values() for _, value in values)
    (newest,) = (run / "checkpoints").glob("step=00000005.ckpt")
    model, _ = load_checkpoint(newest, "--model")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_layer_wise_run_leaves_steps_out_too(
    layerwise_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a layer; what experts are judged by stays finite as well."""
    step = LayerwiseModule.training_step

    def training_step(self: LayerwiseModule, batch: Any, batch_idx: int) -> dict[str, Any]:
        out = step(self, batch, batch_idx)
        if self.global_step == 1:
            out["loss"] = out["loss"] * math.nan
        return out

    monkeypatch.setattr(LayerwiseModule, "training_step", training_step)
    with pytest.warns(UserWarning, match="Step 1 is left out"):
        cli = main(["fit", "--config", layerwise_config(reallocation=MOVING)])
    assert cli is not None
    assert all(value.isfinite().all() for value in cli.model.state_dict().values())
    logged = scalars(tmp_path / "lightning_logs" / "version_0")
    assert [step for step, _ in logged["train/mse"]] == [0, 2, 3]
    assert all(math.isfinite(value) for values in logged.values() for _, value in values)


def test_a_step_without_anything_to_learn_is_no_fault(corpus: Path, dense: Path, tmp_path: Path) -> None:
    """Rows without a thought, where only thoughts are to be learned: the loss is 0, and the step counts."""
    rows = [{"scenario": f"धान {i}", "advisory": "छिड़काव करें।"} for i in range(12)]
    files = {"train": str(tmp_path / "rows.jsonl"), "validation": str(corpus / "validation.parquet")}
    Path(files["train"]).write_text("\n".join(json.dumps(row) for row in rows))
    objective = Objective(ce=CrossEntropy(segments=["thought"]))
    module = PretrainModule(network=ModelConfig(str(dense)), objective=objective)
    trainer, watcher = fit(module, data_module(corpus, tmp_path, **files), max_steps=3)
    assert trainer.global_step == 3
    assert [metrics["train/ce"] for metrics in watcher.metrics] == [0, 0, 0]
    assert [metrics["train/skipped_steps"] for metrics in watcher.metrics] == [0, 0, 0]
    assert all(value.isfinite().all() for value in weights(module).values())
