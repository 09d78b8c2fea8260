"""scripts/distill.slurm with stand-ins for SLURM: what it starts, and what it does when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "distill.slurm"


def start(folder: Path, training: str, *args: str, **variables: str) -> subprocess.Popen[str]:
    """The script in a folder of its own, where srun notes its arguments and does what `training` says."""
    commands = {
        "srun": f'echo "$@" > srun.txt\n{training}\n',
        "scontrol": 'if [ "$1" = show ]; then printf "n7\\nn8\\n"; else echo "$@" >> requeue.txt; fi\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_CPUS_PER_TASK": "64", "SLURM_SUBMIT_DIR": str(folder)}
    environment = os.environ | job | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", str(SCRIPT), *args], env=environment, text=True)


def test_it_starts_fit_on_all_nodes(tmp_path: Path) -> None:
    assert start(tmp_path, "exit 0", "--config", "a.yaml").wait(30) == 0
    words = (tmp_path / "srun.txt").read_text().split()
    assert "--rdzv-endpoint=n7:22345" in words
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-id=12345"} < set(words)
    fit = ["main.py", "fit", "--trainer.devices=8", "--trainer.num_nodes=2", "--config", "a.yaml"]
    assert words[words.index("main.py") :] == fit


@pytest.mark.parametrize("status", [1, 2, 137])
def test_a_run_that_fails_is_not_started_again(tmp_path: Path, status: int) -> None:
    assert start(tmp_path, f"exit {status}").wait(30) == status
    assert not (tmp_path / "requeue.txt").exists()


TOLD = """trap 'echo told >> srun.txt; sleep 0.3; echo saved >> srun.txt; exit 143' TERM
while true; do sleep 0.1; done"""


def test_when_its_time_is_up_training_saves_and_it_goes_back_in_the_queue(tmp_path: Path) -> None:
    job = start(tmp_path, TOLD, SLURM_RESTART_COUNT="1", LOCK_SECONDS="0")
    while not (tmp_path / "srun.txt").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert (tmp_path / "srun.txt").read_text().split()[-2:] == ["told", "saved"]
    assert (tmp_path / "requeue.txt").read_text() == "requeue 12345\n"


def test_it_goes_back_in_the_queue_too_where_saving_takes_too_long(tmp_path: Path) -> None:
    job = start(tmp_path, TOLD.replace("0.3", "20"), SAVE_SECONDS="1")
    while not (tmp_path / "srun.txt").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(15) == 0
    assert (tmp_path / "requeue.txt").read_text() == "requeue 12345\n"
