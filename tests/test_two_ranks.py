"""Two CPU processes with gloo: the same losses as one, data-parallel and sharded."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_cli import scalars

ROOT = Path(__file__).parents[1]
STRATEGIES = {
    "ddp": "ddp",
    "sharded": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    },
}


def launch(config: Path, *args: str) -> None:
    """Start both ranks as torchrun would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = "import torch; torch.set_num_threads(1); from agri_moe.cli import main; main()"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, "fit", "--config", str(config), *args],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
            | {"TORCHELASTIC_RUN_ID": "test", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=240)
        assert rank.returncode == 0, output[-3000:]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_two_ranks_train_as_one(distill_config, tmp_path, strategy):
    from agri_moe.cli import main

    config = yaml.safe_load(distill_config.read_text())
    config["trainer"] |= {"accumulate_grad_batches": 1, "max_steps": 4, "val_check_interval": 4}
    config["data"]["init_args"]["tokens_per_batch"] = 2048
    config["model"]["init_args"]["objective"]["cka"]["weight"] = 0.0  # a statistic of each rank's own sample
    config["model"]["init_args"]["objective"]["balance"] = {"weight": 0.0}  # likewise
    config["model"]["init_args"]["objective"]["hidden"] = {"weight": 0.5, "sample_tokens": 10_000}
    config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if "CKA" not in c["class_path"]]
    one = tmp_path / "one.yaml"
    one.write_text(
        yaml.safe_dump(config | {"trainer": config["trainer"] | {"default_root_dir": str(tmp_path / "one")}})
    )
    main(["fit", "--config", str(one)])

    config["data"]["init_args"]["tokens_per_batch"] = 1024  # of each of two ranks
    config["trainer"] |= {"devices": 2, "strategy": STRATEGIES[strategy], "default_root_dir": str(tmp_path / "two")}
    two = tmp_path / "two.yaml"
    two.write_text(yaml.safe_dump(config))
    launch(two)

    runs = [tmp_path / name / "lightning_logs" / "version_0" for name in ("one", "two")]
    assert not (runs[1].parent / "version_1").exists(), "the ranks agreed on one run"
    first, second = map(scalars, runs)
    for tag in (
        "train/ce",
        "train/kl",
        "train/router_z",
        "train/hidden",
        "val/ce",
        "val/kl",
        "val/agreement",
        "val/balance_score",
    ):
        assert [s for s, _ in first[tag]] == [s for s, _ in second[tag]]
        assert [v for _, v in second[tag]] == pytest.approx([v for _, v in first[tag]], rel=2e-4), tag
    checkpoints = {p.name for p in (runs[1] / "checkpoints").iterdir()}
    assert {"step=00000004.ckpt", "step=00000004.ckpt.complete"} <= checkpoints


def test_two_stages_sharded_and_resumed_in_the_first(distill_config, tmp_path):
    """A sharded checkpoint needs moments of what rests too: here the first stage leaves out most of the model."""
    from agri_moe.cli import main

    config = yaml.safe_load(distill_config.read_text())
    config["trainer"] |= {"accumulate_grad_batches": 1, "max_steps": 4, "val_check_interval": 4}
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    config["data"]["init_args"]["tokens_per_batch"] = 2048
    options = config["model"]["init_args"]
    options["objective"] = {"kl": {"weight": 1.0}, "balance": {"weight": 0.0}}
    options["stages"] = [
        {"steps": 3, "train": ["mlp"]},
        {"freeze": ["down_proj"], "objective": {"kl": {"weight": 0.5}}},
    ]
    config["trainer"]["default_root_dir"] = str(tmp_path / "one")
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(one)])
    config["data"]["init_args"]["tokens_per_batch"] = 1024
    config["trainer"] |= {"devices": 2, "strategy": STRATEGIES["sharded"], "default_root_dir": str(tmp_path / "two")}
    two.write_text(yaml.safe_dump(config))
    launch(two)
    runs = tmp_path / "two" / "lightning_logs"
    launch(two, f"--resume={runs / 'version_0' / 'checkpoints' / 'step=00000002.ckpt'}")

    first, second = scalars(tmp_path / "one" / "lightning_logs" / "version_0"), scalars(runs / "version_0")
    resumed = scalars(runs / "version_1")
    for tag in ("train/ce", "train/kl", "train/gradient_norm", "train/stage", "val/ce", "val/kl"):
        assert [v for _, v in second[tag]] == pytest.approx([v for _, v in first[tag]], rel=2e-4), tag
        assert resumed[tag] == second[tag][-len(resumed[tag]) :], tag
