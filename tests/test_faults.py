"""Real processes killed, told to stop, starved and damaged; what they trained is what the undisturbed run trained.

A short version of what `scripts/soak.py` does for as long as one likes.
"""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from agri_moe.data.packing import obey_the_parent_alone
from agri_moe.runs import damage
from tests.faults import (
    CONTEXT,
    INT,
    KILL,
    TERM,
    USR1,
    Trial,
    children,
    difference,
    fill,
    flip,
    join,
    kill_in_a_save,
    scheduler,
    sharded,
    small_config,
    small_disk,
    wait_for,
    write_models,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(models):
    trial = Trial(models / "undisturbed", small_config(models))
    assert trial.fit() == [0], trial.said()
    assert trial.checkpoints() == {f"step=0000000{n}.ckpt{end}" for n in (6, 8) for end in ("", ".complete")}
    return trial


@pytest.fixture
def trial(tmp_path, models):
    return Trial(tmp_path / "trial", small_config(models))


def goes_on_as(trial, undisturbed):
    assert trial.fit() == [0], trial.said()
    assert difference(trial, undisturbed) == ""
    assert trial.checkpoints() == undisturbed.checkpoints(), "older ones are deleted, those of before a resume too"
    assert not (trial.run.parent / "version_1").exists()


def test_killed_in_a_save_in_a_step_and_in_the_last_validation(trial, undisturbed):
    assert kill_in_a_save(trial)
    assert trial.send(KILL, "step 6") == [-KILL]
    assert trial.send(KILL, "validation 8") == [-KILL]
    goes_on_as(trial, undisturbed)
    assert not [name for name in trial.checkpoints() if "partial" in name]


@pytest.mark.parametrize(
    ("number", "where", "status", "saved"),
    [(TERM, "step 3", 143, 3), (INT, "validation 4", 130, 4)],
)
def test_told_to_stop_it_saves_once(trial, undisturbed, number, where, status, saved):
    assert trial.send(number, where) == [status]
    assert max(trial.checkpoints()) == f"step={saved:08d}.ckpt.complete"
    assert not (trial.run / "lock.json").exists()
    assert json.loads((trial.run / "run.json").read_text())["status"] == "running"
    goes_on_as(trial, undisturbed)


@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_told_to_stop_with_its_workers_it_saves_all_the_same(number, trial, undisturbed):
    """A terminal's Ctrl-C and SLURM tell every process, those that build batches too."""
    workers = ["--data.num_workers=2"]
    assert trial.send(number, "step 3", arguments=workers) == [128 + number], trial.said()
    assert max(trial.checkpoints()) == "step=00000003.ckpt.complete"
    assert trial.fit(*workers) == [0], trial.said()
    assert difference(trial, undisturbed) == ""


def test_workers_end_with_the_run(trial):
    trial.pace(20.0)
    processes = trial.start("--data.num_workers=2")
    wait_for(lambda: trial.is_at("step 1"), processes)
    workers = children(processes[0].pid)
    assert len(workers) == 2
    processes[0].kill()
    join(processes)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), [])


def stuck(ready):
    obey_the_parent_alone(0)
    ready.set()
    time.sleep(60)


def test_a_worker_that_is_stuck_is_ended_by_its_parent_alone():
    ready = CONTEXT.Event()
    worker = CONTEXT.Process(target=stuck, args=(ready,))
    worker.start()
    assert ready.wait(60)
    for number in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def test_under_slurm_it_saves_and_goes_back_in_the_queue(trial, undisturbed, tmp_path):
    path = scheduler(tmp_path / "slurm")
    assert trial.send(USR1, "step 5", PATH=path, SLURM_JOB_ID="77") == [128 + USR1]
    assert (tmp_path / "slurm" / "asked.txt").read_text() == "requeue 77\n"
    assert "step=00000005.ckpt.complete" in trial.checkpoints()
    assert not list(trial.folder.glob("hpc_ckpt*"))
    goes_on_as(trial, undisturbed)


def test_a_checkpoint_of_lightnings_own_is_not_loaded_unasked(trial):
    (trial.folder / "hpc_ckpt_3.ckpt").write_bytes(b"of another run")
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    assert trial.fit("--trainer.devices=1", **slurm) == [2], trial.said()
    assert "hpc_ckpt_3.ckpt was saved by Lightning under SLURM" in trial.sentences()[0]


def test_a_second_signal_ends_it_at_once(trial):
    trial.pace(20.0)
    processes = trial.start()
    wait_for(lambda: trial.is_at("step 1"), processes)
    os.kill(processes[0].pid, TERM)
    time.sleep(1.2)
    assert processes[0].is_alive(), "it is to save at the end of the step"
    began = time.monotonic()
    os.kill(processes[0].pid, TERM)
    assert join(processes) == [143]
    assert time.monotonic() - began < 15
    assert trial.checkpoints() == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk to fill")
def test_a_disk_that_fills_ends_it_in_one_sentence(tmp_path, models, undisturbed):
    with small_disk(tmp_path / "disk", 30) as disk:
        trial = Trial(disk / "trial", small_config(models))
        trial.pace(0.3)
        processes = trial.start()
        wait_for(lambda: trial.is_at("step 5"), processes)
        filler = fill(disk, leave=300_000)  # a checkpoint takes more
        assert join(processes) == [2]
        (sentence,) = trial.sentences()
        assert "step=00000006.ckpt could not be saved, No space left on device" in sentence
        assert "Traceback" not in trial.said()
        assert trial.checkpoints() == {f"step=0000000{n}.ckpt{end}" for n in (2, 4) for end in ("", ".complete")}
        assert trial.fit() == [2]
        assert "too little for one checkpoint more" in trial.sentences()[-1]
        filler.unlink()
        trial.pace(0.0)
        goes_on_as(trial, undisturbed)


@pytest.mark.parametrize(
    ("elsewhere", "why"),
    [
        (False, "Stale file handle"),
        pytest.param(
            True,
            "__1_0.distcp of another rank is not there",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk of its own"),
        ),
    ],
)
def test_a_save_that_fails_on_the_second_rank_alone_ends_both(elsewhere, why, models, tmp_path):
    config = small_config(models, accumulate_grad_batches=1, **sharded(2))
    config["trainer"]["callbacks"].append({"class_path": "killer.NoFolder", "init_args": {"elsewhere": elsewhere}})
    trial = Trial(tmp_path / "trial", config)
    assert join(trial.start(ranks=2), 90) == [2, 2], trial.said()
    assert len(trial.sentences()) == 2
    assert all(f"step=00000002.ckpt could not be saved, {why}" in said for said in trial.sentences())
    assert trial.checkpoints() == set()


def test_other_rows_under_the_same_name_are_refused(trial, models, tmp_path):
    rows = tmp_path / "rows.parquet"
    rows.write_bytes((models / "corpus" / "train.parquet").read_bytes())
    train = f"--data.train={rows}"
    assert trial.send(TERM, "step 3", arguments=[train]) == [143]
    os.utime(rows, (1, 1))  # as a copy of it may be
    table = pq.read_table(rows)
    assert trial.send(TERM, "step 4", arguments=[train]) == [143]
    pq.write_table(table.slice(1), rows)
    assert trial.fit(train) == [2]
    (sentence,) = trial.sentences()
    assert "data.train: the content is not what" in sentence
    assert "--resume_anyway" in sentence
    assert trial.fit(train, "--resume_anyway=true") == [0], trial.said()


def test_of_two_at_the_same_moment_one_goes_on(trial, undisturbed):
    assert trial.send(KILL, "step 5") == [-KILL]
    both = [*trial.start(), *trial.start()]
    assert sorted(join(both)) == [0, 2], trial.said()
    (sentence,) = trial.sentences()
    assert "is in use by process" in sentence
    assert difference(trial, undisturbed) == ""


@pytest.mark.parametrize(
    ("where", "step", "pieces"), [("step 3", 2, {".partial"}), ("validation 8", 8, {"", ".complete"})]
)
def test_who_was_taken_over_in_a_save_or_at_its_end_writes_nothing_more(where, step, pieces, trial):
    """It stood still, because of its disk for example: the run is somebody else's now, and what lies there theirs."""
    trial.pace(3.0 if step == 2 else 0.5)
    processes = trial.start()
    assert wait_for(lambda: trial.is_at(where), processes)
    theirs = json.dumps({"host": "elsewhere", "process": 1})
    (trial.run / "lock.json").write_text(theirs)
    before = trial.checkpoints()
    assert {f"step={step:08d}.ckpt{end}" for end in pieces} <= before
    assert join(processes) == [2], trial.said()
    assert "was taken over by another process" in trial.sentences()[-1]
    assert trial.checkpoints() == before
    assert (trial.run / "lock.json").read_text() == theirs
    run = json.loads((trial.run / "run.json").read_text())
    assert run["status"] == "running"
    assert run.get("validated", -1) < step


def test_no_flipped_bit_and_no_cut_goes_unseen(undisturbed):
    """Of the checkpoint and of its checksums; sharded ones are in the test below."""
    checkpoint = undisturbed.run / "checkpoints" / "step=00000006.ckpt"
    for path in (checkpoint, checkpoint.with_name(checkpoint.name + ".complete")):
        assert_no_damage_unseen(checkpoint, path, random.Random(0), flips=100)


def assert_no_damage_unseen(checkpoint: Path, path: Path, chance: random.Random, flips: int) -> None:
    """Every flip of a bit, cut, and loss of a file of a checkpoint is noticed; it is as before afterwards."""
    whole = path.read_bytes()
    assert damage(checkpoint) is None
    for _ in range(flips):
        where = flip(path, chance)
        assert damage(checkpoint), (path.name, where)
        path.write_bytes(whole)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert damage(checkpoint), (path.name, size)
    path.unlink()
    assert damage(checkpoint) or not checkpoint.exists(), path.name
    path.write_bytes(whole)
    assert damage(checkpoint) is None


def test_sharded_on_two_ranks_killed_in_a_save_told_to_stop_and_damaged(models, tmp_path):
    config = small_config(models, accumulate_grad_batches=1, val_check_interval=4, **sharded(2))
    whole, trial = (Trial(tmp_path / name, config) for name in ("whole", "trial"))
    assert whole.fit(ranks=2) == [0, 0], whole.said()
    trial.pace(0.2)
    processes = trial.start(ranks=2)
    wait_for(lambda: (trial.run / "checkpoints" / "step=00000004.ckpt.partial").exists(), processes, pause=0.0)
    for process in processes:
        process.kill()
    join(processes)
    assert "step=00000004.ckpt" not in trial.checkpoints(), "half of it must not have its name"
    processes = trial.start(ranks=2)
    wait_for(lambda: trial.is_at("step 5"), processes)
    os.kill(processes[1].pid, TERM)  # one rank alone hears of it
    assert join(processes) == [143, 143], trial.said()
    assert "step=00000005.ckpt.complete" in trial.checkpoints()
    trial.pace(0.0)
    assert trial.fit(ranks=2) == [0, 0], trial.said()
    assert difference(trial, whole) == ""

    folder = trial.run / "checkpoints" / "step=00000008.ckpt"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        assert_no_damage_unseen(folder, path, random.Random(1), flips=40)


def test_on_one_rank_and_on_two_again_each_row_is_seen_once_per_epoch(models, tmp_path):
    config = small_config(models, steps=-1, max_epochs=2, devices=1, accumulate_grad_batches=1)
    config["trainer"]["callbacks"][0]["init_args"]["every_n_steps"] = 1000
    config["trainer"]["val_check_interval"] = 1000
    trial = Trial(tmp_path / "trial", config)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    assert trial.send(TERM, "step 5", ranks=2, arguments=two) == [143, 143], trial.said()
    assert trial.send(TERM, "step 12") == [143], trial.said()
    assert trial.fit(*two, ranks=2) == [0, 0], trial.said()
    seen = [row for _, row in trial.rows()]
    assert sorted(seen) == sorted([*range(96), *range(96)])


def test_the_clock_saves_too(trial, undisturbed):
    config = yaml.safe_load(trial.path.read_text())
    config["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": None, "every_n_minutes": 1e-6, "keep": -1}
    trial.path.write_text(yaml.safe_dump(config))
    assert trial.fit() == [0], trial.said()
    assert trial.checkpoints() == {f"step=0000000{n}.ckpt{end}" for n in range(1, 9) for end in ("", ".complete")}
    assert difference(trial, undisturbed) == ""
