"""Every shipped config parses into real objects, and the real run's config runs."""

from pathlib import Path

import lightning
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from agri_moe.cli import main
from agri_moe.models.base import LanguageModule

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(CONFIGS.rglob("*.yaml"))


def test_there_are_configs():
    assert {path.name for path in ALL} >= {
        "distill.yaml",
        "teacher.yaml",
        "dense.yaml",
        "distilled.yaml",
        "control.yaml",
    }


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_config_builds_its_objects(path, tmp_path):
    cli = LightningCLI(
        LanguageModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        run=False,
        args=["--config", str(path), "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"],
    )
    assert isinstance(cli.model, LanguageModule)
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


def test_the_real_config_runs_on_small_checkpoints_of_the_family(dense, teacher, corpus, tmp_path):
    cli = main(
        [
            "fit",
            f"--config={CONFIGS / 'distill.yaml'}",
            f"--model.student.source={dense}",
            f"--model.teacher.source={teacher}",
            f"--data.train={corpus / 'train.parquet'}",
            f"--data.validation={corpus / 'validation.parquet'}",
            f"--data.tokenizer={corpus / 'tokenizer'}",
            f"--data.cache_dir={tmp_path / 'cache'}",
            "--data.tokens_per_batch=2048",
            "--data.num_workers=0",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.max_steps=2",
            "--trainer.limit_val_batches=1",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert cli.trainer.global_step == 2
    trained = {name for name, p in cli.model.model.hf.named_parameters() if p.requires_grad}
    assert trained
    assert not any("self_attn" in name or "norm" in name for name in trained)
    assert cli.model.model.hf.is_gradient_checkpointing
    assert str(cli.model.teacher.model.hf.dtype) == "torch.bfloat16"
