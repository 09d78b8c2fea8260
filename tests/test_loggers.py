"""Any of Lightning's loggers, beside TensorBoard: what arrives, with the callbacks on."""

import csv
from pathlib import Path

import pytest
import yaml
from lightning_utilities.core.imports import RequirementCache

from agri_moe.cli import main
from agri_moe.runs import all_runs
from tests.test_cli import refused, scalars

MLFLOW = Path(__file__).parents[1] / "configs" / "loggers" / "mlflow.yaml"


def overlay(folder: Path, class_path: str, **options: object) -> str:
    path = folder / "logger.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"logger": {"class_path": class_path, "init_args": options}}}))
    return f"--config={path}"


@pytest.fixture
def quick(distill_config):
    """Two steps, a validation, all callbacks."""
    return ["--config", str(distill_config), "--trainer.max_steps=2", "--trainer.val_check_interval=4"]


def test_a_csv_logger_gets_what_tensorboard_gets(quick, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    csv_logger = overlay(tmp_path, "lightning.pytorch.loggers.CSVLogger", save_dir=".")
    run = main(["fit", *quick, csv_logger]).run.folder
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    logged = scalars(run)
    for name in ("train/ce", "val/kl", "router_entropy/layer_00", "throughput/tokens_per_second"):
        theirs = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        assert theirs == [(step, pytest.approx(value)) for step, value in logged[name]], name
    assert "CSVLogger is given no pictures" in caplog.text
    for name in ("cka", "routing", "samples"):
        assert list((run / name).glob("step=*")), "callbacks write into the run's folder"
    assert [one.folder.name for one in all_runs(tmp_path)][-1] == run.name
    main(["report"])
    assert (run / "report" / "index.html").exists(), "the newest run is a run, and not that logger's folder"
    main(["test", "--model.max_new_tokens=4"])
    assert "test/chrf" in scalars(run / "test")


def test_no_logger_at_all(quick):
    cli = main(["fit", *quick, "--trainer.logger=false"])
    assert not cli.trainer.loggers
    assert not list(cli.run.folder.glob("events*"))
    assert list((cli.run.folder / "cka").glob("step=*.npz"))


def test_mlflow_gets_numbers_settings_and_pictures(quick, tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow", reason="mlflow is an extra").MlflowClient
    monkeypatch.chdir(tmp_path)
    run = main(["fit", *quick, f"--config={MLFLOW}"]).run.folder
    store = client("sqlite:///mlflow.db")
    (experiment,) = [one for one in store.search_experiments() if one.name == "agri_moe"]
    (found,) = store.search_runs([experiment.experiment_id])
    logged = scalars(run)
    for name in ("train/ce", "val/kl"):
        theirs = [(entry.step, entry.value) for entry in store.get_metric_history(found.info.run_id, name)]
        assert theirs == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged[name]]
    assert found.data.params["model/init_args/learning_rate"] == "0.01"
    for tag in ("cka", "expert_load", "advisories"):
        assert len(store.list_artifacts(found.info.run_id, tag)) == 1, tag


def test_a_logger_whose_package_is_missing(quick, capsys, tmp_path, monkeypatch):
    lacking = RequirementCache("no_such_package>=1.0")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", lacking)
    wandb = overlay(tmp_path, "lightning.pytorch.loggers.WandbLogger")
    message = refused(capsys, "fit", *quick, wandb)
    assert "lightning.pytorch.loggers.WandbLogger, which the config names, needs a package" in message
    assert "no_such_package" in message
