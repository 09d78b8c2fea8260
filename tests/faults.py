"""Real runs that are killed, told to stop, starved of disk or damaged, and what becomes of them.

`tests/test_faults.py` does a few of each, `scripts/soak.py` many. A run is a process of its own, forked from a server
that has imported everything and computed nothing: killing it is killing a run, only that its imports take no time.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
PATIENCE = 120.0
"""Seconds after which a process that should have done something is taken for stuck."""


# ---------------------------------------------------------------------- processes


def _fit(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """`python main.py fit ...`, with what it says in a file."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as `main.py` has it
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))  # the callbacks in killer.py
    from agri_moe.cli import main

    sys.argv = ["main.py", "fit", *arguments]
    main(["fit", *arguments])


def start(arguments: list[str], log: Path, ranks: int = 1, **environment: str) -> list[Any]:
    """A run on so many ranks; their processes."""
    multiprocessing.set_forkserver_preload(["agri_moe.training_cli", "tensorboard.backend.event_processing"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(ranks):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
        variables = environment | (group if ranks > 1 else {})
        processes.append(CONTEXT.Process(target=_fit, args=(arguments, log.with_suffix(f".{rank}.log"), variables)))
        processes[-1].start()
    return processes


def join(processes: list[Any], patience: float = PATIENCE) -> list[int]:
    """The exit status of each: negative for a signal that killed it."""
    for process in processes:
        process.join(patience)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"process {process.pid} is stuck")
    return [process.exitcode for process in processes]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(what: Callable[[], Any], processes: list[Any], pause: float = 0.002) -> bool:
    """Until something is so; False if the processes have ended before."""
    until = time.monotonic() + PATIENCE
    while not what():
        if not any(process.is_alive() for process in processes):
            return bool(what())
        assert time.monotonic() < until, "it never came to that"
        time.sleep(pause)
    return True


# ---------------------------------------------------------------------- a run and what became of it


@dataclass
class Trial:
    """A config's run in a folder of its own.

    Args:
        folder: Of its config, its log and its runs.
        config: As `fit` takes it.
    """

    folder: Path
    config: dict[str, Any]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(self.config))
        config["trainer"]["default_root_dir"] = str(self.folder)
        config["trainer"]["callbacks"] = [
            *config["trainer"]["callbacks"],
            {"class_path": "killer.RowLog", "init_args": {"path": str(self.folder / "rows")}},
            {"class_path": "killer.SignPost", "init_args": {"path": str(self.post), "seconds": 0.0}},
        ]
        self.path.write_text(yaml.safe_dump(config))

    @property
    def path(self) -> Path:
        """Its config."""
        return self.folder / "config.yaml"

    @property
    def post(self) -> Path:
        """Where it writes down what it does."""
        return self.folder / "now.txt"

    @property
    def run(self) -> Path:
        """Its run's folder."""
        return self.folder / "lightning_logs" / "version_0"

    def pace(self, seconds: float) -> None:
        """How long it stays in each micro-batch."""
        config = yaml.safe_load(self.path.read_text())
        config["trainer"]["callbacks"][-1]["init_args"]["seconds"] = seconds
        self.path.write_text(yaml.safe_dump(config))

    def start(self, *arguments: str, ranks: int = 1, **environment: str) -> list[Any]:
        """Begin it, or go on."""
        self.post.unlink(missing_ok=True)
        return start(["--config", str(self.path), *arguments], self.folder / "fit", ranks, **environment)

    def fit(self, *arguments: str, ranks: int = 1, patience: float = 3 * PATIENCE, **environment: str) -> list[int]:
        """Begin it, or go on, to its end."""
        return join(self.start(*arguments, ranks=ranks, **environment), patience)

    def is_at(self, where: str) -> bool:
        """Whether it says so."""
        return self.post.exists() and self.post.read_text() == where

    def send(
        self, number: int, where: str, seconds: float = 0.2, arguments: list[str] | None = None, **options: Any
    ) -> list[int]:
        """Begin it, or go on, send a signal to every rank when it is there, and the exit status of each.

        A rank's own processes are told first, as by a terminal's Ctrl-C or by SLURM.
        """
        self.pace(seconds)
        processes = self.start(*(arguments or []), **options)
        found = wait_for(lambda: self.is_at(where), processes)
        for process in processes:
            if process.is_alive():
                for pid in [*children(process.pid), process.pid]:
                    os.kill(pid, number)
        statuses = join(processes)
        self.pace(0.0)
        assert found, f"it never was at {where}:\n{self.said()}"
        return statuses

    def said(self) -> str:
        """All that its processes have printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("fit.*.log")))

    def sentences(self) -> list[str]:
        """The mistakes it told."""
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def checkpoints(self) -> set[str]:
        """Names in its folder of checkpoints."""
        return {path.name for path in (self.run / "checkpoints").glob("*")}

    def rows(self) -> list[tuple[int, int]]:
        """Each row of each step that counts, with the step: of a step that was done twice, the last time."""
        seen: list[tuple[int, int]] = []
        for path in self.folder.glob("rows.*"):
            own: list[tuple[int, int]] = []
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if "from" in entry:
                    own = [(step, row) for step, row in own if step < entry["from"]]
                else:
                    own += [(entry["step"], row) for row in entry["rows"]]
            seen += own
        return sorted(seen)


def weights(trial: Trial) -> dict[str, Any]:
    """Weights, moments and schedule of its last checkpoint, whole or in pieces, by name."""
    import torch

    from agri_moe.runs import Run
    from agri_moe.trained import read_sharded

    path, _ = Run(trial.run).intact_checkpoint()
    assert path is not None
    content = read_sharded(path) if path.is_dir() else torch.load(path, weights_only=True)
    (optimizer,) = content["optimizer_states"]
    moments = {f"{name}/{kind}": m for name, state in optimizer["state"].items() for kind, m in state.items()}
    return content["state_dict"] | moments | {"step": torch.tensor(content["global_step"])}


def curves(trial: Trial) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of it, speed left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every crash that it sees
    events = EventAccumulator(str(trial.run))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("throughput")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def difference(trial: Trial, expected: Trial) -> str:
    """How a run that ended differs from the undisturbed one; empty if it does not, in a single bit."""
    import torch

    if (status := json.loads((trial.run / "run.json").read_text())["status"]) != "finished":
        return f"it is {status}"
    if trial.rows() != expected.rows():
        return "it saw other rows"
    ours, theirs = weights(trial), weights(expected)
    if ours.keys() != theirs.keys():
        return f"its checkpoint holds other things: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for name, value in theirs.items():
        if not torch.equal(ours[name], value):
            return f"{name} differs by {float((ours[name] - value).abs().max()):.2e}"
    logged, wanted = curves(trial), curves(expected)
    if logged.keys() != wanted.keys():
        return f"it logged other things: {sorted(logged.keys() ^ wanted.keys())[:3]}"
    for tag, curve in wanted.items():
        if [step for step, _ in logged[tag]] != [step for step, _ in curve]:
            return f"{tag} was logged at steps {[step for step, _ in logged[tag]]}, not {[step for step, _ in curve]}"
        if logged[tag] != curve:
            return f"{tag} differs"
    return ""


# ---------------------------------------------------------------------- what is small enough to be killed often


def write_models(folder: Path) -> None:
    """Rows, a tokenizer, a student's dense source and a teacher, from nothing."""
    from agri_moe.data.synthetic import write_corpus
    from tests.conftest import _dense

    write_corpus(folder / "corpus", train_rows=96, validation_rows=16, seed=0, vocab_size=600)
    _dense(folder / "dense", folder / "corpus")
    _dense(folder / "teacher", folder / "corpus", hidden_size=48)


def write_demo_models(folder: Path) -> None:
    """The same in the demo's sizes."""
    from agri_moe.data.synthetic import write_corpus
    from tests.conftest import _dense

    write_corpus(folder / "corpus", train_rows=2000, validation_rows=60, seed=0, vocab_size=2000)
    shape = {"num_hidden_layers": 3, "head_dim": 32}
    _dense(folder / "dense", folder / "corpus", hidden_size=128, intermediate_size=256, **shape)
    wider = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 6}
    _dense(folder / "teacher", folder / "corpus", **wider, **shape)


def demo_config(models: Path, steps: int) -> dict[str, Any]:
    """The demo's distillation with all its callbacks; a checkpoint every 5 steps, a validation every 100."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo" / "distilled.yaml").read_text())
    options = config["model"]["init_args"]
    options["student"] = {"source": str(models / "dense"), "upcycle": {"num_experts": 4, "num_experts_per_tok": 2}}
    options["teacher"]["source"] = str(models / "teacher")
    config["data"]["init_args"] |= {
        "train": str(models / "corpus" / "train.parquet"),
        "validation": str(models / "corpus" / "validation.parquet"),
        "tokenizer": str(models / "corpus" / "tokenizer"),
        "cache_dir": str(models / "cache"),
    }
    trainer = config["trainer"]
    trainer |= {"max_steps": steps, "max_epochs": -1, "val_check_interval": 100, "enable_progress_bar": False}
    trainer["callbacks"][0]["init_args"]["every_n_steps"] = 5
    return config


def small_config(models: Path, steps: int = 8, **trainer: Any) -> dict[str, Any]:
    """A distillation run of some hundred thousand parameters: a checkpoint every 2 steps, a validation every 4."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "agri_moe.models.distill.DistillModule",
            "init_args": {
                "student": {
                    "source": str(models / "dense"),
                    "upcycle": {"num_experts": 4, "num_experts_per_tok": 2},
                },
                "teacher": {"source": str(models / "teacher"), "dtype": "float32"},
                "objective": {"ce": {"weight": 0.5}, "kl": {"weight": 1.0}},
                "learning_rate": 1e-2,
                "optimizer": {"warmup_steps": 2},
            },
        },
        "data": {
            "class_path": "agri_moe.data.chat_data.ChatDataModule",
            "init_args": {
                "train": str(models / "corpus" / "train.parquet"),
                "validation": str(models / "corpus" / "validation.parquet"),
                "tokenizer": str(models / "corpus" / "tokenizer"),
                "max_length": 512,
                "tokens_per_batch": 512,
                "cache_dir": str(models / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 8,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "agri_moe.callbacks.resume.Checkpoint", "init_args": {"every_n_steps": 2}},
                {"class_path": "agri_moe.callbacks.router.RouterMonitor", "init_args": {"every_n_steps": 1}},
            ],
        }
        | trainer,
    }


def sharded(ranks: int) -> dict[str, Any]:
    """Trainer options of a run in pieces."""
    name = "lightning.pytorch.strategies.ModelParallelStrategy"
    sizes = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
    return {"devices": ranks, "strategy": {"class_path": name, "init_args": sizes}}


# ---------------------------------------------------------------------- faults


def kill_in_a_save(trial: Trial) -> bool:
    """SIGKILL while a checkpoint has no name yet; False if the run ended first."""
    folder = trial.run / "checkpoints"
    processes = trial.start()
    wait_for(lambda: any(folder.glob("*.partial")), processes, pause=0.0)
    for process in processes:
        process.kill()
    join(processes)
    return any(folder.glob("*.partial"))


def kill_at_random(trial: Trial, seconds: float, chance: random.Random) -> bool:
    """SIGKILL at a moment of so many seconds of training; False if it ended before."""
    processes = trial.start()
    wait_for(trial.post.exists, processes)
    time.sleep(chance.uniform(0, seconds))
    alive = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    join(processes)
    return all(alive)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own, in memory; only root may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """What somebody else has written there, until no more than so many bytes were left."""
    path = folder / "somebody_elses"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                continue
        file.truncate(path.stat().st_size - leave)
    return path


def flip(path: Path, chance: random.Random) -> tuple[int, int]:
    """Flip one bit of a file; where."""
    content = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return place, bit


def scheduler(folder: Path) -> str:
    """A folder with a scontrol that notes what it is asked; for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked.txt\n')
    (folder / "scontrol").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
