"""What each term of the objective adds to a training step: time and peak memory, each term on and off.

    python benchmarks/objective.py [--tokens 2048] [--repeats 5] [--terms +cka,+attention]

A step is all that happens to a packed micro-batch before the optimizer: positions chosen, teacher forward, student
forward, every term, backward. The optimizer's own step is left out (it is the same for all, and would hide the rest).
Weights are random, the vocabulary is Qwen3's, gradient checkpointing is off.

The configurations take turns, each round in another order, so that a noisy machine hurts all of them; a ratio is the
median over the rounds of the time over that of CE and KL alone in the same round. Memory is measured apart, each
configuration in a process of its own: the highest resident size during a second step, above the size before the first
one, with weights loaded: activations, gradients and what is used in between. It is read from Linux's /proc.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for every model that is loaded; read when tqdm is imported

import numpy as np
import torch
from ablation import build, quiet, qwen3
from loss_step import processor, resident_mb
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.data.chat import Segment
from agri_moe.data.packing import SEGMENTS, PackedRow, StepTotals, collate, count_targets, pack
from agri_moe.models.base import parameter_counts
from agri_moe.models.distill import DistillModule
from agri_moe.objective import Batch
from agri_moe.teacher import OnlineTeacher

BASE: dict[str, Any] = {"ce": {"weight": 1.0}, "kl": {"weight": 1.0}}
CKA: dict[str, Any] = {"cka": {"weight": 0.1}}
ATTENTION: dict[str, Any] = {"attention": {"weight": 0.1}}
DIVERSITY: dict[str, Any] = {"diversity": {"weight": 0.01}}
REFERENCE = "ce+kl"
TERMS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "+cka": CKA,
    "+hidden": {"hidden": {"weight": 0.1}},
    "+attention": ATTENTION,
    "+diversity": DIVERSITY,
    "+cka+attention+diversity": CKA | ATTENTION | DIVERSITY,
}
"""Name of a configuration -> what it adds to CE and KL, with the shipped defaults of each term."""

MAX_LENGTH = 1024
# A malloc that gives freed tensors back at once: else the resident size is that of the allocator's reserves.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Problem:
    """Student, teacher and one micro-batch.

    Args:
        folder: Where the two dense checkpoints lie, see `write_models`.
        arguments: Sizes.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.batch, self.control_ids = random_batch(arguments.tokens, arguments.vocabulary)
        self.modules: dict[str, DistillModule] = {}

    def add(self, name: str) -> DistillModule:
        """Build the module of a configuration; all share one teacher."""
        options = {
            "student": {"source": str(self.folder / "dense"), "upcycle": {"num_experts": 8, "num_experts_per_tok": 2}},
            "teacher": {"source": str(self.folder / "teacher"), "view": "same", "dtype": "float32"},
            "objective": BASE | TERMS[name],
        }
        module = build("distill.DistillModule", options)
        assert isinstance(module, DistillModule)
        chat = SimpleNamespace(control_ids=self.control_ids, new_marker_pieces={})
        stub: Any = SimpleNamespace(
            datamodule=SimpleNamespace(chat=chat),
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            world_size=1,
            accumulate_grad_batches=1,
            global_step=0,
            precision="32-true",
            training=True,
        )
        module._trainer = stub
        module.configure_model()
        if self.modules:
            object.__setattr__(module, "teacher", next(iter(self.modules.values())).teacher)
        self.modules[name] = module
        return module

    def step(self, name: str) -> float:
        """Seconds of one step."""
        module = self.modules[name]
        module.zero_grad(set_to_none=True)
        started = time.perf_counter()
        batch = module.on_before_batch_transfer(dict(self.batch), 0)
        module.training_step(batch, 0)["loss"].backward()
        seconds = time.perf_counter() - started
        module.zero_grad(set_to_none=True)
        return seconds


def random_batch(tokens: int, vocabulary: int) -> tuple[Batch, frozenset[int]]:
    """A packed micro-batch of random rows of 120 to 300 tokens: half prompt, a quarter thought, a quarter advisory."""
    random = np.random.default_rng(0)
    end = vocabulary - 1
    rows: list[PackedRow] = []
    while len(rows) < tokens // 210:
        size = int(random.integers(120, 301))
        ids = np.append(random.integers(0, end, size - 1), end)
        parts = [size // 2, size // 4, size - size // 2 - size // 4]
        segments = np.repeat([int(Segment.USER), int(Segment.THOUGHT), int(Segment.ASSISTANT)], parts)
        rows.append(PackedRow(len(rows), ids, segments))
    control = frozenset([end])
    counts = np.sum([count_targets(r.input_ids.tolist(), r.segment_ids.tolist(), control) for r in rows], axis=0)
    assert counts.shape == (2, SEGMENTS)
    sequences = pack([len(row.input_ids) for row in rows], MAX_LENGTH)
    totals = StepTotals(counts, sum(len(row.input_ids) for row in rows), 1)
    return collate([[rows[i] for i in chosen] for chosen in sequences], totals, MAX_LENGTH, end), control


def write_models(folder: Path, arguments: argparse.Namespace) -> None:
    """A dense model to upcycle and a teacher, with random weights."""
    for name, width, layers in (
        ("dense", arguments.width, arguments.layers),
        ("teacher", arguments.teacher_width, arguments.teacher_layers),
    ):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**qwen3(width, layers, 3 * width), vocab_size=arguments.vocabulary)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)


class Row(NamedTuple):
    """One configuration's measurements."""

    seconds: float
    ratio: float
    lowest: float
    highest: float
    memory_mb: float


def time_all(problem: Problem, names: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, by configuration; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in [*names[first:], *names[:first]]:
            taken = problem.step(name)
            if repeat:
                seconds[name].append(taken)
    return seconds


def peak_mb(problem: Problem, name: str) -> float:
    """Peak of a second step above the resident size before the first, in MB; NaN where Linux's counters are absent."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    problem.add(name)
    before = resident_mb("VmRSS")
    problem.step(name)
    clear.write_text("5")  # resets VmHWM, see proc(5)
    problem.step(name)
    return resident_mb("VmHWM") - before


def peak_apart(folder: Path, name: str) -> float:
    """`peak_mb` in a fresh process with the arguments of this one."""
    command = [sys.executable, *sys.argv, "--measure_memory", name, "--models", str(folder)]
    done = subprocess.run(command, env=os.environ | EXACT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    value: float = json.loads(done.stdout.splitlines()[-1])
    return value


def summary(seconds: Mapping[str, Sequence[float]], memory: Mapping[str, float]) -> dict[str, Row]:
    """Medians, and the ratios to CE and KL alone round by round."""
    rows = {}
    for name, values in seconds.items():
        ratios = [ours / base for ours, base in zip(values, seconds[REFERENCE], strict=True)]
        row = Row(statistics.median(values), statistics.median(ratios), min(ratios), max(ratios), memory[name])
        rows[name] = row
    return rows


def table(rows: Mapping[str, Row]) -> str:
    """As Markdown."""
    base = rows[REFERENCE]
    lines = [
        "| terms | seconds | time | lowest to highest | peak MB | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row.seconds:.2f} | {row.ratio - 1:+.1%} | {row.lowest - 1:+.1%} to {row.highest - 1:+.1%} "
            f"| {row.memory_mb:,.0f} | {row.memory_mb / base.memory_mb - 1:+.1%} |"
        )
    return "\n".join(lines)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Measure every configuration and print the table."""
    write_models(folder, arguments)
    names = [name for name in TERMS if name == REFERENCE or name in arguments.terms]
    memory = {name: peak_apart(folder, name) for name in names}
    problem = Problem(folder, arguments)
    for name in names:
        problem.add(name)
    rows = summary(time_all(problem, names, arguments.repeats), memory)
    total, active, _ = parameter_counts(problem.modules[REFERENCE].model)
    online = problem.modules[REFERENCE].teacher
    assert isinstance(online, OnlineTeacher), "no cache is named"
    teacher, _, _ = parameter_counts(online.model)
    real = int((problem.batch["segment_ids"] != Segment.PAD).sum())
    supervised = int((problem.batch["target_segments"] >= Segment.THOUGHT).sum())
    print(f"{processor()} ({platform.system()}), {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(
        f"Student: {arguments.layers} layers of {arguments.width}, 8 experts, top-2, {total / 1e6:.0f}M parameters, "
        f"{active / 1e6:.0f}M active; teacher: {arguments.teacher_layers} layers of {arguments.teacher_width}, "
        f"{teacher / 1e6:.0f}M; vocabulary {arguments.vocabulary:,}."
    )
    print(f"{real:,} tokens, {supervised:,} of them supervised; {arguments.repeats} rounds. Optimizer step left out.\n")
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--teacher_width", type=int, default=384)
    parser.add_argument("--teacher_layers", type=int, default=20)
    parser.add_argument("--terms", default=",".join(TERMS), help="configurations beside ce+kl, with commas between")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure_memory", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.terms = arguments.terms.split(",")
    if unknown := [name for name in arguments.terms if name not in TERMS]:
        parser.error(f"--terms names {unknown[0]!r}; there are {', '.join(TERMS)}.")
    quiet()
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        print(json.dumps(peak_mb(Problem(arguments.models, arguments), arguments.measure_memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments)


if __name__ == "__main__":
    main()
