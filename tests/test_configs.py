"""Every shipped config parses into real objects, and the real run's config runs."""

from pathlib import Path

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from agri_moe.cli import main
from agri_moe.models.training import TrainingModule

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "loggers")  # those are laid over others


def test_there_are_configs():
    assert {path.name for path in ALL} >= {
        "distill.yaml",
        "teacher.yaml",
        "dense.yaml",
        "distilled.yaml",
        "control.yaml",
        "representation.yaml",
        "stages.yaml",
        "curriculum.yaml",
        "on_policy.yaml",
        "sequence_level.yaml",
        "many_nodes.yaml",
        "distill_cached.yaml",
        "layerwise.yaml",
        "compress_moe.yaml",
        "pretrain.yaml",
        "hindi_tokens.yaml",
    }


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_config_builds_its_objects(path, tmp_path):
    cli = LightningCLI(
        TrainingModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        run=False,
        args=["--config", str(path), "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"],
    )
    assert isinstance(cli.model, TrainingModule)
    assert cli.datamodule.tokenizer
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# "), "a config begins by saying what it is for"
    assert len(lines) <= 65


def test_demo_configs_share_rows_and_batches():
    """Otherwise the demo's comparison would compare more than it says."""
    data = [yaml.safe_load(path.read_text())["data"] for path in sorted((CONFIGS / "demo").glob("*.yaml"))]
    assert all(one == data[0] for one in data)
    distilled, control = (
        yaml.safe_load((CONFIGS / "demo" / f"{name}.yaml").read_text()) for name in ("distilled", "control")
    )
    assert distilled["trainer"]["max_steps"] == control["trainer"]["max_steps"]
    options = [c["model"]["init_args"] for c in (distilled, control)]
    assert options[0]["learning_rate"] == options[1]["learning_rate"]
    assert options[0]["student"] == options[1]["network"]


def small(corpus, tmp_path):
    """Options that make two steps on small rows of any shipped config."""
    return [
        f"--data.train={corpus / 'train.parquet'}",
        f"--data.validation={corpus / 'validation.parquet'}",
        f"--data.tokenizer={corpus / 'tokenizer'}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.max_length=512",
        "--data.tokens_per_batch=2048",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
    ]


def fit(name, dense, teacher, corpus, tmp_path, *more):
    """Two steps of a shipped config, on small checkpoints of the family."""
    model = "network" if name == "sequence_level" else "student"
    teachers = [] if model == "network" else [f"--model.teacher.source={teacher}"]
    return main(
        [
            "fit",
            f"--config={CONFIGS / name}.yaml",
            f"--model.{model}.source={dense}",
            *teachers,
            *small(corpus, tmp_path),
            "--trainer.val_check_interval=4",
            "--trainer.check_val_every_n_epoch=null",
            "--trainer.log_every_n_steps=1",
            *more,
        ]
    )


def test_the_real_config_runs(dense, teacher, corpus, tmp_path):
    cli = fit("distill", dense, teacher, corpus, tmp_path)
    assert cli.trainer.global_step == 2
    trained = {name for name, p in cli.model.model.hf.named_parameters() if p.requires_grad}
    assert trained
    assert not any("self_attn" in name or "norm" in name for name in trained)
    assert cli.model.model.hf.is_gradient_checkpointing
    assert str(cli.model.teacher.model.hf.dtype) == "torch.bfloat16"
    assert cli.datamodule.aligned_share > 0.9


def test_every_way_of_comparing_runs(dense, teacher, corpus, tmp_path):
    cli = fit("representation", dense, teacher, corpus, tmp_path)
    for term in ("ce", "kl", "cka", "attention", "diversity", "anchor_cka"):
        assert cli.trainer.callback_metrics[f"train/{term}"].isfinite()
        assert cli.trainer.callback_metrics[f"val/{term}"].isfinite()
    assert cli.trainer.callback_metrics["val/diversity/layer_01"].isfinite()
    assert (cli.run.folder / "attention" / "step=00000002.npz").exists()


def test_continued_pretraining_runs(dense, corpus, tmp_path):
    """Adafactor with the inverse root, first for the routers alone, on a column of text."""
    rows = [arg.replace("max_length", "block_size") for arg in small(corpus, tmp_path)]
    stages = "[{steps: 1, train: [mlp.gate]}, {}]"
    options = ["--data.text_column=advisory", "--data.num_proc=1", f"--model.stages={stages}"]
    validation = ["--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=2"]
    config = [f"--config={CONFIGS / 'pretrain.yaml'}", f"--model.network.source={dense}"]
    cli = main(["fit", *config, *rows, *options, *validation])
    assert cli.model.stage_index == 1
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.Adafactor)
    steps = {name: int(optimizer.state[p]["step"]) for name, p in cli.model.model.hf.named_parameters()}
    assert set(steps.values()) == {1}  # its state began anew with the second stage
    for name in ("train/ce", "train/balance", "val/balanced_perplexity"):
        assert cli.trainer.callback_metrics[name].isfinite()


def test_stages_run(dense, teacher, corpus, tmp_path):
    config = CONFIGS / "stages.yaml"
    stages = yaml.safe_load(config.read_text())["model"]["init_args"]["stages"]
    stages[0]["steps"] = 1
    cli = fit("stages", dense, teacher, corpus, tmp_path, f"--model.stages={stages}")
    assert cli.model.stage_index == 1
    assert all(p.requires_grad for p in cli.model.model.hf.parameters())


def test_the_curriculum_runs(dense, teacher, corpus, tmp_path):
    metrics = fit("curriculum", dense, teacher, corpus, tmp_path).trainer.callback_metrics
    assert 1.0 < metrics["train/temperature"] < 2.0
    assert metrics["train/teacher_entropy"] > 0


def test_on_policy_runs(dense, teacher, corpus, tmp_path):
    few = ("--model.on_policy.share=1.0", "--model.on_policy.max_new_tokens=8", "--model.on_policy.rows=2")
    cli = fit("on_policy", dense, teacher, corpus, tmp_path, *few)
    assert cli.trainer.global_step == 2


def test_rows_written_by_a_teacher_are_learned(dense, teacher, corpus, tmp_path):
    assert fit("sequence_level", dense, teacher, corpus, tmp_path).trainer.global_step == 2


def test_layers_are_replaced_and_exported(dense, corpus, tmp_path):
    cli = main(
        [
            "fit",
            f"--config={CONFIGS / 'layerwise.yaml'}",
            f"--model.source={dense}",
            "--data=agri_moe.data.chat_data.ChatDataModule",
            *small(corpus, tmp_path),
            "--trainer.val_check_interval=2",
        ]
    )
    assert cli.trainer.global_step == 4
    assert cli.trainer.callback_metrics["val/cosine/layer_01"] > 0.9, "half width begins exactly"
    main(["export", "--output", str(tmp_path / "stock"), "--run_root", str(tmp_path)])
