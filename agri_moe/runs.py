"""Run folders: one per experiment, with its config, its checkpoints and a word on how it ended.

    lightning_logs/version_N/
        config.yaml               the resolved config
        tokenizer/                with the chat template, for export and generate
        run.json                  fingerprints of config, rows and tokenizer; "running" or "finished"
        lock.json                 while a process trains here: host, process id; touched every few seconds
        checkpoints/step=00000100.ckpt
        checkpoints/step=00000100.ckpt.complete      SHA-256 of every file of the checkpoint; without it, none counts
        checkpoints/step=00000200.ckpt.partial       being written; its name is given to it when all of it is on disk

Nothing here imports torch: tools that only look for a run stay quick.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOGS = "lightning_logs"
MARKER = ".complete"
PARTIAL = ".partial"
HEARTBEAT_SECONDS = 10
DEAD_AFTER_SECONDS = 60

# Where a run happens, how long it lasts and what it logs do not make it another experiment.
NOT_IDENTITY = frozenset(
    (
        *("accelerator", "devices", "num_nodes", "strategy", "sync_batchnorm", "use_distributed_sampler", "plugins"),
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run", "val_check_interval"),
        *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "check_val_every_n_epoch"),
        *("logger", "log_every_n_steps", "callbacks", "default_root_dir", "profiler", "num_sanity_val_steps"),
        *("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "enable_autolog_hparams", "barebones"),
    )
)

# Neither do the options of model and data that only `test` and `predict` look at.
TESTED = frozenset(("max_new_tokens", "test"))


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of the parts of a resolved config that make it this experiment and no other."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True, default=str).encode()).hexdigest()


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a resolved config that make it this experiment: model, data, seed, and the trainer's arithmetic."""
    trainer = {k: v for k, v in config.get("trainer", {}).items() if k not in NOT_IDENTITY}
    trained = {k: _trained(config.get(k)) for k in ("model", "data")}
    return {**trained, "seed_everything": config.get("seed_everything"), "trainer": trainer}


def _trained(section: Any) -> Any:
    options = section.get("init_args") if isinstance(section, Mapping) else None
    if not isinstance(options, Mapping):
        return section
    return {**section, "init_args": {k: v for k, v in options.items() if k not in TESTED}}


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Every leaf at which two nested configs differ, as `key: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{key}.{k}".lstrip("."))]
    return [] if old == new else [f"{key}: {old} -> {new}"]


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    @property
    def number(self) -> int:
        """N of version_N."""
        return int(self.folder.name.removeprefix("version_"))

    def read(self) -> dict[str, Any]:
        """The content of run.json; empty if there is none.

        Raises:
            ValueError: If it is damaged.
        """
        path = self.folder / "run.json"
        try:
            content = json.loads(path.read_bytes()) if path.exists() else {}
        except (ValueError, RecursionError):  # of JSON or of UTF-8
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: restore it, or move {self.folder} away.")
        return content

    def write(self, **values: Any) -> None:
        """Update run.json."""
        replace_text(self.folder / "run.json", json.dumps(self.read() | values, indent=1))

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.folder / "config.yaml"

    def checkpoints(self) -> list[Path]:
        """Checkpoints by step, newest first, damaged and unfinished ones included."""
        return checkpoints_in(self.folder / "checkpoints")

    def intact_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with each newer one.

        Raises:
            ValueError: If there are checkpoints but none is whole: starting over would be the wrong guess.
        """
        complaints: list[str] = []
        for path in self.checkpoints():
            problem = damage(path)
            if problem is None:
                return path, complaints
            complaints.append(f"{path} {problem}")
        if complaints:
            raise ValueError(
                f"no checkpoint of {self.folder} is intact ({'; '.join(complaints)}); "
                "restore one, or start afresh with --resume never."
            )
        return None, []


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints by step, newest first, damaged and unfinished ones included."""
    found = {step_of(path): path for path in folder.glob("step=*.ckpt")}
    return [found[step] for step in sorted(found, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name.

    Raises:
        ValueError: If there is none.
    """
    match = re.search(r"step=(\d+)", checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is no checkpoint of a run: its name lacks step=NUMBER.")
    return int(match[1])


def all_runs(root: Path) -> list[Run]:
    """The runs under `root`/lightning_logs, newest first; a logger of the user's may have folders of its own there."""
    folders = [p.parent for p in (root / LOGS).glob("version_*/run.json")]
    folders = [p for p in folders if p.name.removeprefix("version_").isdigit()]
    return sorted((Run(p) for p in folders), key=lambda run: run.number, reverse=True)


def unfinished_run(root: Path, mark: str) -> Run | None:
    """The newest run of the config with this fingerprint, if it has not finished."""
    same = (run for run in all_runs(root) if run.read().get("fingerprint") == mark)
    newest = next(same, None)
    return newest if newest is not None and newest.read().get("status") != "finished" else None


def newest_checkpoint(root: Path, mark: str | None = None) -> tuple[Run, Path]:
    """The newest intact checkpoint of the newest run that has one.

    Args:
        root: Where lightning_logs lies.
        mark: Only runs with this fingerprint.

    Raises:
        ValueError: If there is none.
    """
    for run in all_runs(root):
        if run.checkpoints() and mark in (None, run.read().get("fingerprint")):
            path, _ = run.intact_checkpoint()
            assert path is not None, "intact_checkpoint raises if there are checkpoints and none is whole"
            return run, path
    what = "with this config " if mark else ""
    raise ValueError(f"{root / LOGS} holds no run {what}with a checkpoint: train first with fit, or give --ckpt_path.")


def new_run(root: Path, mark: str) -> Run:
    """Create the folder of the next version."""
    runs = all_runs(root)
    number = runs[0].number + 1 if runs else 0
    while True:
        run = Run(root / LOGS / f"version_{number}")
        try:
            run.folder.mkdir(parents=True)
        except FileExistsError:  # another process was quicker
            number += 1
            continue
        run.write(fingerprint=mark, status="running")
        return run


# ---------------------------------------------------------------------- completeness


def beside(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return checkpoint.with_name(checkpoint.name + PARTIAL)


def commit(checkpoint: Path) -> None:
    """Give what was written `beside` a checkpoint's place its name; the rename is the moment from which it counts.

    Everything is flushed to the disk, and the checksums are there before the name is: at no moment is there a file or
    folder of this name that is not whole.

    Args:
        checkpoint: The final path, of a file or (sharded) a folder.
    """
    written = beside(checkpoint)
    for _, path in _files(written):
        _flush(path)
    for folder in {path.parent for _, path in _files(written)}:
        _flush(folder)
    mark_complete(checkpoint, written)
    written.replace(checkpoint)
    _flush(checkpoint.parent)


def mark_complete(checkpoint: Path, written: Path | None = None) -> None:
    """Write the checksums of a checkpoint, a file or a folder; its content may still lie at `written`."""
    content = written or checkpoint
    sums = {checkpoint.name if path == content else name: _sha256(path) for name, path in _files(content)}
    replace_text(_marker(checkpoint), json.dumps(sums, indent=1))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first: what is half removed must not count."""
    _marker(checkpoint).unlink(missing_ok=True)
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a process that died in the middle of a save has left in a folder of checkpoints."""
    for path in list(folder.glob("*" + PARTIAL)):
        remove(path)
    for marker in list(folder.glob("*" + MARKER)):
        if not marker.with_name(marker.name.removesuffix(MARKER)).exists():
            marker.unlink()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file has the checksum that was written with it."""
    marker = _marker(checkpoint)
    if not marker.exists():
        return "was not finished"
    try:
        expected = json.loads(marker.read_bytes())
    except ValueError:  # of JSON or of UTF-8
        expected = None
    if not isinstance(expected, dict) or not expected:
        return f"is damaged (its checksums, {marker.name}, cannot be read)"
    files = dict(_files(checkpoint))
    for name, digest in expected.items():
        if name not in files:
            return f"lacks {name}"
        if _sha256(files[name]) != digest:
            return f"is damaged ({name} has another checksum)"
    added = sorted(files.keys() - expected.keys())
    return f"holds {added[0]}, which was not saved with it" if added else None


def set_aside(checkpoint: Path) -> None:
    """Keep a damaged checkpoint under another name, so that its step can be saved again."""
    kept = checkpoint.with_name(checkpoint.name + ".damaged")
    remove(kept)
    checkpoint.rename(kept)
    _marker(checkpoint).unlink(missing_ok=True)


def size_on_disk(checkpoint: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for _, path in _files(checkpoint))


def _marker(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + MARKER)


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    if checkpoint.is_dir():
        for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
            yield str(path.relative_to(checkpoint)), path
    elif checkpoint.exists():
        yield checkpoint.name, checkpoint


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """What a file holds, or which names a folder holds, survives a power cut from now on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    If there is no room for it, nothing of it is left behind.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    _flush(path.parent)


# ---------------------------------------------------------------------- room on the disk

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def storage_error(error: BaseException | None) -> OSError | None:
    """The operating system's own complaint behind an exception, such as that the disk is full; None if there is none.

    torch turns it into a RuntimeError about positions in a file, and for sharded checkpoints into one for each rank.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error
        for failure, _ in getattr(error, "failures", {}).values():
            if (found := storage_error(failure)) is not None:
                return found
        error = error.__cause__ or error.__context__
    return None


def check_room(folder: Path, size: int, checkpoints: int) -> None:
    """Refuse to begin what could not be saved.

    Args:
        folder: Where the run's folder lies or will lie.
        size: Bytes of one checkpoint, about.
        checkpoints: How many there must be room for.

    Raises:
        ValueError: If there is less.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size * checkpoints:
        wanted = "two checkpoints" if checkpoints == 2 else "one checkpoint more"
        raise ValueError(
            f"{folder} has {free / 1e9:.3g} GB free, too little for {wanted} of about {size / 1e9:.3g} GB each: "
            "free some, or set trainer.default_root_dir to another disk."
        )


# ---------------------------------------------------------------------- lock


class Lock:
    """Keeps a second process out of a live run.

    A lock whose process is gone (same machine), or whose heartbeat is older than a minute (any machine), is taken over.

    Raises:
        ValueError: If a live process holds it.
    """

    def __init__(self, run: Run):
        self.path = run.folder / "lock.json"
        self._mine = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "since": time.time()}
        with _one_at_a_time(run.folder):
            if self.path.exists() and (holder := self._living_holder()):
                raise ValueError(
                    f"{run.folder} is in use by {holder}; wait for it, or start a second run of the same config with "
                    "--resume never."
                )
            replace_text(self.path, json.dumps(self._mine))
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _living_holder(self) -> str | None:
        if time.time() - self.path.stat().st_mtime > DEAD_AFTER_SECONDS:
            return None
        try:
            holder = json.loads(self.path.read_bytes())
            name = f"process {holder['process']} on {holder['host']}"
            same_machine = holder.get("machine", self._mine["machine"]) == self._mine["machine"]
            same_machine = same_machine and holder["host"] == self._mine["host"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"a process whose {self.path.name} cannot be read (it counts for a minute)"
        if not same_machine:
            return name
        # Within one process (a notebook, a script) one run follows the other.
        here = holder["process"] == os.getpid()
        return None if here or not Path(f"/proc/{holder['process']}").exists() else name

    def check(self) -> None:
        """Refuse to go on in a run that another process has taken over.

        Raises:
            ValueError: If one has, which it may where this one stood still for a minute.
        """
        if not self.held():
            raise ValueError(
                f"{self.path.parent} was taken over by another process while this one stood still: it goes on there."
            )

    def held(self) -> bool:
        """Whether the run is still this process's."""
        with suppress(OSError, ValueError):
            return bool(json.loads(self.path.read_bytes()) == self._mine)
        return False

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            # Released between the two; or the disk cannot be reached, for once: the next beat may be in time.
            with suppress(OSError):
                if self.held():
                    os.utime(self.path)

    def release(self) -> None:
        """Let the next process in."""
        self._stop.set()
        if self.held():
            self.path.unlink(missing_ok=True)


def _machine() -> str:
    """Tells machines of one name apart, and containers on one machine: process ids mean something within one alone."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not (boot.exists() and processes.exists()):
        return ""
    return f"{boot.read_text().strip()} {processes.stat().st_ino}"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two processes that look at a lock at the same moment must not both find it free."""
    with (folder / ".turn").open("w") as file:
        # Some network file systems know no such locks: there the two would have to come within milliseconds.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
