"""A teacher's answers on disk: bytes for each position, rates, and what a step costs with the teacher and without it.

    python benchmarks/cache.py [--rows 40] [--teacher_steps 20] [--steps 6] [--teacher_width 256] [--width 128]

Rows: plant diseases, soil (English) and XQuAD (Hindi), from the folder named by AGRI_MOE_DATA, in Qwen3's tokens and
vocabulary of 151,936. A teacher is trained on them from random weights; the longer, the more its answers are like those
of a real one. Writing is timed as a whole (the teacher included) and by itself, reading in the order of the files; a
step with the teacher and from each cache in a process of its own, from the end of one step to the end of the next, so
with the reading of the cache in it.

HDF5, if h5py is installed, holds the same numbers the plain way: ids as int32, log-probabilities as float16, gzip with
shuffled bytes. DistillKit's numbers are those that it publishes, for 50 logits of a smaller vocabulary.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from loss_step import processor
from measure import forget_peak, resident_mb
from real_rows import DATA, fit, qwen3

from agri_moe.cli import main
from agri_moe.data.logit_cache import Answers, LogitCache, write_shard

OUTPUT = Path(__file__).parent / "output" / "cache"
KINDS = {
    "top 50": ("--kind", "topk", "--k", "50"),
    "top 64": ("--kind", "topk", "--k", "64"),
    "12 samples": ("--kind", "sampled", "--draws", "12"),
    "50 samples": ("--kind", "sampled", "--draws", "50"),
}
PUBLISHED = {"DistillKit, published": 114.0, "DistillKit, published, uncompressed": 300.0}


class StepTimer(lightning.Callback):
    """Writes down the seconds from step to step and the process's peak memory after the first.

    Args:
        path: File to write at the end.
    """

    def __init__(self, path: str):
        self.path = path
        self._ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        if not self._ends:
            forget_peak()  # which may be that of loading
        self._ends.append(time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        """Write, without the first step."""
        seconds = np.diff(self._ends).tolist()
        Path(self.path).write_text(json.dumps({"seconds": seconds, "peak_mb": resident_mb("VmHWM")}))


@dataclass
class Stored:
    """One way to keep the answers; rates in positions per second, 0 where there is none."""

    name: str
    bytes_per_position: float
    whole: float = 0.0
    write: float = 0.0
    read: float = 0.0


# ---- inputs


def take_rows(rows: int) -> dict[str, list[str]]:
    """The first rows of every source, written to files of their own."""
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for name in ("plant_disease", "soil", "hindi_qa"):
        for split, suffix, count in (("train", "train", rows), ("validation", "val", max(rows // 8, 2))):
            path = OUTPUT / f"{name}_{suffix}.parquet"
            pq.write_table(pq.read_table(DATA / f"{name}_{suffix}.parquet").slice(0, count), path)
            splits[split].append(str(path))
    return splits


def experiment(name: str, module: str, options: dict[str, Any], rows: dict[str, list[str]], steps: int) -> Path:
    """Write a config."""
    data = {"tokenizer": str(DATA / "qwen3-0.6b"), "max_length": 2048, "tokens_per_batch": 2048, "bad_rows": "skip"}
    timer = {"class_path": "cache.StepTimer", "init_args": {"path": str(OUTPUT / f"{name}.json")}}
    trainer: dict[str, Any] = {"accelerator": "cpu", "max_steps": steps, "limit_val_batches": 0, "callbacks": [timer]}
    trainer |= {"default_root_dir": str(OUTPUT / name), "gradient_clip_val": 1.0, "enable_model_summary": False}
    content = {
        "model": {"class_path": f"agri_moe.models.{module}", "init_args": options | {"learning_rate": 2e-3}},
        "data": {"class_path": "agri_moe.data.chat_data.ChatDataModule", "init_args": data | rows},
        "trainer": trainer,
    }
    path = OUTPUT / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def distillation(name: str, teacher: dict[str, Any], width: int, rows: dict[str, list[str]], steps: int) -> Path:
    """A config with a small MoE student of random weights."""
    moe = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * width}
    options = {
        "student": {"config": qwen3(width, 4) | moe, "upcycle": None},
        "teacher": teacher,
        "objective": {"kl": {"weight": 1.0}},
    }
    return experiment(name, "distill.DistillModule", options, rows, steps)


# ---- storage


def stored(name: str, folder: Path, seconds: float) -> Stored:
    """Sizes and rates of a cache that took so long to write."""
    cache = LogitCache(folder)
    rows = list(cache)  # and once more, all pages and libraries warm
    start = time.perf_counter()
    rows = list(cache)
    read = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        write_shard(Path(scratch) / "shard", cache.header.kind, rows)
        write = time.perf_counter() - start
    positions = sum(len(answers.positions_N) for _, answers in rows)
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    return Stored(name, size / positions, positions / seconds, positions / write, positions / read)


def in_hdf5(rows: list[tuple[int, Answers]]) -> Stored | None:
    """The same in HDF5; None without h5py."""
    try:
        import h5py  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    path = OUTPUT / "answers.h5"
    start = time.perf_counter()
    with h5py.File(path, "w") as file:
        for key, answers in rows:
            if len(answers.positions_N):
                group, options = file.create_group(str(key)), {"compression": "gzip", "shuffle": True}
                group.create_dataset("ids", data=answers.ids_NK.astype(np.int32), **options)
                group.create_dataset("log_probs", data=np.float16(answers.log_probs_NK), **options)
    write = time.perf_counter() - start
    start = time.perf_counter()
    with h5py.File(path) as file:
        positions = sum(len(group["ids"][:]) + 0 * len(group["log_probs"][:]) for group in file.values())
    read = time.perf_counter() - start
    return Stored("HDF5, top 50", path.stat().st_size / positions, 0.0, positions / write, positions / read)


# ---- training


def measured(config: Path) -> dict[str, Any]:
    """Median seconds of a step and the peak memory of a run in a fresh process."""
    command = [sys.executable, __file__, "--train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads(config.with_suffix(".json").read_text())
    return {"seconds": statistics.median(result["seconds"]), "peak_mb": result["peak_mb"]}


def report(kept: list[Stored], steps: dict[str, dict[str, Any]], note: str) -> str:
    """Two tables."""

    def cell(value: float, form: str) -> str:
        return format(value, form) if value else "-"

    lines = ["| kept | bytes/position | written with the teacher/s | written/s | read/s |", "|---|---|---|---|---|"]
    for one in kept:
        rates = " | ".join(cell(rate, ",.0f") for rate in (one.whole, one.write, one.read))
        lines.append(f"| {one.name} | {one.bytes_per_position:.1f} | {rates} |")
    lines += ["", note, "", "| teacher | seconds/step | of online | peak MB | of online |", "|---|---|---|---|---|"]
    online = steps["online"]
    for name, own in steps.items():
        shares = (own[key] / online[key] for key in ("seconds", "peak_mb"))
        time_share, memory_share = (f"{share:.0%}" for share in shares)
        lines.append(f"| {name} | {own['seconds']:.2f} | {time_share} | {own['peak_mb']:,.0f} | {memory_share} |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Measure everything and print the tables."""
    if not DATA.is_dir():
        raise SystemExit(f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real rows.")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    rows = take_rows(arguments.rows)
    network = {"network": {"config": qwen3(arguments.teacher_width, arguments.teacher_layers)}}
    trained = experiment("pretrain", "pretrain.PretrainModule", network, rows, arguments.teacher_steps)
    fit(trained, OUTPUT / "pretrain", "model")
    teacher = {"source": str(OUTPUT / "pretrain" / "model"), "dtype": "float32"}
    online = distillation("online", teacher, arguments.width, rows, arguments.steps)
    kept, steps = [], {"online": measured(online)}
    for name, options in KINDS.items():
        folder = OUTPUT / name.replace(" ", "_")
        start = time.perf_counter()
        main(["cache", "--config", str(online), "--output", str(folder), *options])
        kept.append(stored(name, folder, time.perf_counter() - start))
        cached = {"cache": str(folder)}
        steps[name] = measured(distillation(folder.name, cached, arguments.width, rows, arguments.steps))
    hdf5 = in_hdf5(list(LogitCache(OUTPUT / "top_50")))
    note = "" if hdf5 else "HDF5 is left out: h5py is not installed."
    kept += [*([hdf5] if hdf5 else []), *(Stored(name, size) for name, size in PUBLISHED.items())]
    print(f"\n{processor()} ({platform.system()}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{vars(arguments)}\n\n{report(kept, steps, note)}")
    result = {"arguments": vars(arguments), "kept": [asdict(one) for one in kept], "steps": steps}
    (OUTPUT / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40, help="training rows of each of the three sources")
    parser.add_argument("--teacher_steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--teacher_width", type=int, default=256)
    parser.add_argument("--teacher_layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.train:
        main(["fit", "--config", chosen.train])
    else:
        run(chosen)
