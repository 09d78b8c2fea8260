"""The fault suite for as long as one likes: real runs killed, told to stop and damaged, and what became of each.

    python scripts/soak.py                    every case, 20 SIGKILLs at random moments among them
    python scripts/soak.py --minutes 30       one run under SIGKILL after SIGKILL, at the end the weights of the other

Prints a table; exit status 1 if a run that was disturbed is not what the undisturbed one is. The cases themselves, and
how a run is compared with another, are in `tests/faults.py`.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from agri_moe.runs import Run, damage
from tests.faults import (
    INT,
    KILL,
    TERM,
    USR1,
    Trial,
    curves,
    demo_config,
    difference,
    fill,
    flip,
    join,
    kill_at_random,
    kill_in_a_save,
    scheduler,
    sharded,
    small_config,
    small_disk,
    wait_for,
    write_demo_models,
    write_models,
)

BETWEEN = 30.0
"""Seconds of training, at most, between a start and the SIGKILL in a soak."""
A_DAY = 86_400.0
STEPS_A_MINUTE = 30
"""Optimizer steps of a soak for each of its minutes: about what starts and repeated steps leave time for."""

Case = tuple[str, Callable[[], str]]
"""What is done, and how what came of it differs from what should have; empty if it does not."""


def goes_on(trial: Trial, expected: Trial, ranks: int = 1) -> str:
    """Take a disturbed run to its end; how it differs from the undisturbed one."""
    if any(statuses := trial.fit(ranks=ranks, patience=A_DAY)):
        return f"exit status {statuses}: {' '.join(trial.sentences()[-1:])}"
    return difference(trial, expected)


def stop(trial: Trial, expected: Trial, number: int, where: str, status: int) -> str:
    """Send a signal at a place, and go on."""
    statuses = trial.send(number, where)
    return goes_on(trial, expected) if statuses == [status] else f"exit status {statuses}, not {status}"


def one_process(folder: Path, models: Path, whole: Trial, chance: random.Random, seconds: float) -> Iterator[Case]:
    """Cases of a run on one device, which is to end with the same bits."""

    def trial(name: str) -> Trial:
        return Trial(folder / name, small_config(models))

    def random_kill(name: str) -> str:
        one = trial(name)
        for _ in range(100):
            if kill_at_random(one, seconds, chance):
                return goes_on(one, whole)
            one = trial(f"{name}_again")
        return "it always ended before"

    for number in range(20):
        yield f"SIGKILL at a random moment, {number + 1}", partial(random_kill, f"random_{number}")

    def in_a_save(name: str) -> str:
        one = trial(name)
        return goes_on(one, whole) if kill_in_a_save(one) else "no save was hit"

    for number in range(3):
        yield f"SIGKILL in the middle of a save, {number + 1}", partial(in_a_save, f"save_{number}")
    for name, number, where, status in (
        ("SIGKILL in a validation", KILL, "validation 4", -KILL),
        ("SIGKILL in the last validation", KILL, "validation 8", -KILL),
        ("SIGTERM in a step", TERM, "step 3", 143),
        ("SIGTERM in the last step", TERM, "step 8", 143),
        ("SIGTERM in a validation", TERM, "validation 4", 143),
        ("SIGTERM in the last validation", TERM, "validation 8", 143),
        ("SIGINT in a step", INT, "step 5", 130),
    ):
        one = trial(name.replace(" ", "_"))
        yield name, partial(stop, one, whole, number, where, status)

    def requeued() -> str:
        one, path = trial("slurm"), scheduler(folder / "scheduler")
        statuses = one.send(USR1, "step 5", PATH=path, SLURM_JOB_ID="77")
        asked = (folder / "scheduler" / "asked.txt").read_text()
        return goes_on(one, whole) if (statuses, asked) == ([128 + USR1], "requeue 77\n") else f"{statuses}, {asked}"

    yield "SIGUSR1 under SLURM: saved, put back in the queue", requeued
    yield "disk full in a save (tmpfs)", partial(disk_full, folder / "disk", models, whole)
    for what in ("a bit flipped", "cut in half", "emptied"):
        one = trial(what.replace(" ", "_"))
        yield f"newest checkpoint: {what}", partial(damaged, one, whole, what, chance)


def disk_full(folder: Path, models: Path, whole: Trial) -> str:
    """Somebody else fills the disk while the run goes on."""
    if os.geteuid():
        return "skipped: only root may mount a disk to fill"
    with small_disk(folder, 30) as disk:
        one = Trial(disk / "run", small_config(models))
        one.pace(0.3)
        processes = one.start()
        wait_for(lambda: one.is_at("step 5"), processes)
        filler = fill(disk, leave=300_000)
        if join(processes) != [2] or "No space left on device" not in "".join(one.sentences()):
            return f"it did not end in one sentence: {one.said()[-300:]}"
        filler.unlink()
        one.pace(0.0)
        return goes_on(one, whole)


def damaged(one: Trial, whole: Trial, what: str, chance: random.Random) -> str:
    """Damage the newest checkpoint of a run that was killed."""
    one.send(KILL, "step 6")
    path = Run(one.run).checkpoints()[0]
    if what == "a bit flipped":
        flip(path, chance)
    else:
        os.truncate(path, path.stat().st_size // 2 if what == "cut in half" else 0)
    found = goes_on(one, whole)
    return found or ("" if f"{path.name} is damaged" in one.said() else "it was not named")


def far(trial: Trial, expected: Trial) -> str:
    """How losses of a run that went on with another number of ranks differ by more than float32 rounds."""
    ours, theirs = curves(trial), curves(expected)
    for tag in ("train/ce", "train/kl"):
        for (step, value), (at, wanted) in zip(ours[tag], theirs[tag][-len(ours[tag]) :], strict=True):
            if step != at or abs(value - wanted) > 2e-4 * abs(wanted):
                return f"{tag} at step {step} is {value}, not {wanted}"
    return ""


def two_ranks(folder: Path, models: Path, chance: random.Random) -> Iterator[Case]:
    """Cases of sharded runs, and of other numbers of ranks."""
    config = small_config(models, val_check_interval=4, **sharded(2), accumulate_grad_batches=1)
    whole = Trial(folder / "sharded", config)

    def undisturbed() -> str:
        return whole.said()[-300:] if any(whole.fit(ranks=2)) else ""

    yield "(two ranks, sharded, undisturbed)", undisturbed

    def hit(name: str, number: int, where: str, victims: slice) -> str:
        one = Trial(folder / name, config)
        one.pace(0.2)
        processes = one.start(ranks=2)
        wait_for(lambda: one.is_at(where), processes)
        for process in processes[victims]:
            os.kill(process.pid, number)
        if number == KILL:  # as torchrun does when one of them is gone
            for process in processes:
                process.kill()
        statuses = join(processes)
        one.pace(0.0)
        return goes_on(one, whole, ranks=2) if number == KILL or statuses == [143, 143] else f"exit status {statuses}"

    yield "two ranks, sharded: SIGKILL of both in a step", partial(hit, "both", KILL, "step 6", slice(2))
    yield "two ranks, sharded: SIGTERM to the second alone", partial(hit, "second", TERM, "step 3", slice(1, 2))
    yield "two ranks, sharded: SIGTERM in a validation", partial(hit, "validating", TERM, "validation 4", slice(2))

    def other_size(name: str, first: int, second: int) -> str:
        """As many rows in a step on each number of ranks, so that the same is learnt."""
        sizes = {ranks: small_config(models, **sharded(ranks), accumulate_grad_batches=2 // ranks) for ranks in (1, 2)}
        for ranks, config in sizes.items():
            config["trainer"]["val_check_interval"] = 8 // ranks
        one = Trial(folder / name, sizes[first])
        if any(s != 143 for s in one.send(TERM, "step 4", ranks=first)):
            return one.said()[-300:]
        checkpoint = f"--resume={one.run / 'checkpoints' / 'step=00000004.ckpt'}"
        other = Trial(folder / f"{name}_on", sizes[second])
        if any(other.fit(checkpoint, "--resume_anyway=true", ranks=second)):
            return other.said()[-300:]
        rows = sorted([row for row in one.rows() if row[0] < 4] + other.rows())
        return "it saw other rows" if rows != whole.rows() else far(other, whole)

    yield "from two ranks to one: the same rows and losses", partial(other_size, "to_one", 2, 1)
    yield "from one rank to two: the same rows and losses", partial(other_size, "to_two", 1, 2)

    def every_file() -> str:
        newest, _ = Run(whole.run).intact_checkpoint()
        assert newest is not None
        for path in sorted(p for p in newest.rglob("*") if p.is_file()):
            content = path.read_bytes()
            for _ in range(200):
                flip(path, chance)
                if damage(newest) is None:
                    return f"a flipped bit of {path.name} was not seen"
                path.write_bytes(content)
            path.unlink()
            if damage(newest) is None:
                return f"the loss of {path.name} was not seen"
            path.write_bytes(content)
        return ""

    yield "sharded checkpoint: 200 flipped bits in each file, each file lost", every_file


def suite(folder: Path) -> int:
    """Every case; how many failed."""
    chance = random.Random(0)
    write_models(folder)
    whole = Trial(folder / "whole", small_config(folder))
    processes = whole.start()
    wait_for(whole.post.exists, processes)
    began = time.monotonic()
    assert join(processes) == [0], whole.said()
    seconds = time.monotonic() - began
    cases = [*one_process(folder, folder, whole, chance, 0.9 * seconds), *two_ranks(folder, folder, chance)]
    failed = 0
    for name, case in cases:
        began = time.monotonic()
        found = case()
        failed += bool(found) and not found.startswith("skipped")
        print(f"{name:<62} {time.monotonic() - began:6.1f} s  {found or 'the same'}", flush=True)
    print(f"{len(cases)} cases, {failed} failed")
    return failed


def soak(folder: Path, minutes: float) -> int:
    """A run of the demo's size under SIGKILL after SIGKILL; 1 if it does not end as the undisturbed one."""
    chance = random.Random(0)
    write_demo_models(folder)
    config = demo_config(folder, steps=max(60, round(STEPS_A_MINUTE * minutes)))
    whole, one = Trial(folder / "whole", config), Trial(folder / "killed", config)
    began = time.monotonic()
    if any(whole.fit(patience=A_DAY)):
        print(whole.said()[-2000:])
        return 1
    seconds = time.monotonic() - began
    print(f"undisturbed: {config['trainer']['max_steps']} steps in {seconds:.0f} s", flush=True)
    until, kills, unfinished = time.monotonic() + 60 * minutes, 0, True
    while unfinished and time.monotonic() < until:
        unfinished = kill_at_random(one, BETWEEN, chance)
        kills += unfinished
        newest = max((path.name for path in (one.run / "checkpoints").glob("*.ckpt")), default="no checkpoint")
        left = max(0.0, until - time.monotonic())
        print(f"{kills:4d} kills, {newest}, {left:.0f} s left", flush=True)
    found = goes_on(one, whole)
    print(f"{kills} kills in {minutes:g} minutes; weights, moments, rows and curves: {found or 'the same'}")
    return int(bool(found))


def main() -> None:
    """Either of them, in a folder that is gone afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="Of a soak of one run, instead of every case once.")
    minutes = parser.parse_args().minutes
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        sys.exit(min(1, suite(Path(folder)) if minutes is None else soak(Path(folder), minutes)))


if __name__ == "__main__":
    main()
