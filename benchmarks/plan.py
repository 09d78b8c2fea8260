"""What `plan` says of memory and parameters, against what a step really holds.

    python benchmarks/plan.py [--tokens 2048] [--vocabulary 151936] [--device cpu] [--output plan.json]

For each precision, with and without gradient checkpointing, a process of its own loads a teacher of 8 layers of 384 and
a student of 6 layers of 256 with 8 experts (random weights), and makes optimizer steps as `fit` makes them: forward
pass, backward pass, AdamW, gradients cleared. On a CPU, held is the resident size (Linux's /proc, with a malloc that
gives memory back at once, and without oneDNN's cache of kernels, which under bfloat16 keeps some 100 MB more whatever
the model); on a GPU, what PyTorch's allocator has given out. `weights` is measured when the models are there, `rest`
when a step is over (moments), `peak` is the highest of the second step; all above what was held before the models.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for every model that is loaded; read when tqdm is imported

import torch
from ablation import build, quiet
from loss_step import processor, resident_mb
from objective import EXACT, random_batch, write_models
from transformers import AutoTokenizer

from agri_moe.data.chat import Segment
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.models.base import parameter_counts
from agri_moe.models.distill import DistillModule
from agri_moe.objective import Batch
from agri_moe.planning import Planner, Run
from agri_moe.rehearsal import Rows
from agri_moe.teacher import OnlineTeacher

CASES = [(precision, again) for precision in ("32-true", "bf16-mixed") for again in (False, True)]
WIDTH, LAYERS, TEACHER_WIDTH, TEACHER_LAYERS = 256, 6, 384, 8


NO_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}


class Held(NamedTuple):
    """Bytes above what was held before the models were there, and parameters in all, active, trained."""

    weights: float
    rest: float
    peak: float
    parameters: tuple[int, int, int]


def make_module(folder: Path, checkpointing: bool) -> DistillModule:
    options = {
        "student": {"source": str(folder / "dense"), "upcycle": {"num_experts": 8, "num_experts_per_tok": 2}},
        "teacher": {"source": str(folder / "teacher"), "view": "same", "dtype": "float32"},
        "objective": {"ce": {"weight": 1.0}, "kl": {"weight": 1.0}, "cka": {"weight": 0.1}},
        "gradient_checkpointing": checkpointing,
    }
    module = build("distill.DistillModule", options)
    assert isinstance(module, DistillModule)
    return module


def read_rows(batch: Batch) -> Rows:
    """What the planner is told of a micro-batch."""
    sequences, length = batch["input_ids"].shape
    thought, advisory = (
        float((batch["target_segments"] == segment).float().mean()) for segment in (Segment.THOUGHT, Segment.ASSISTANT)
    )
    return Rows(sequences, length, None, thought, advisory)


def planned(folder: Path, batch: Batch, precision: Any, checkpointing: bool, accelerator: bool) -> Held:
    """What `plan` says."""
    data = ChatDataModule(tokenizer=str(folder / "dense"), train="absent.parquet")
    run = Run(1, "single", precision, accelerator, 1, 1, None, 1.0, 2, 500)
    planner = Planner(make_module(folder, checkpointing), data, run)
    memory = planner.memory(0, run, read_rows(batch), checkpointing=checkpointing)
    size = {part.name: part.bytes for part in memory.parts}
    weights = size["teacher: weights"] + size["student: weights"]
    rest = size["optimizer: moments"]
    student = planner.student(0)
    parameters = (student.total, student.active, student.pieces.trained)
    return Held(weights, rest, memory.peak - size.get("CUDA's own, assumed", 0), parameters)


class Meter:
    """What is held on a device, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        """At this moment."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated()
        return resident_mb("VmRSS") * 1e6

    def start(self) -> None:
        """Forget the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)

    def peak(self) -> float:
        """At most, since the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident_mb("VmHWM") * 1e6


def measured(folder: Path, batch: Batch, precision: str, checkpointing: bool, device: torch.device) -> Held:
    """What two steps hold: the second finds gradients and moments of the first."""
    meter = Meter(device)
    torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)  # the libraries' own comes before
    before = meter.now()
    module = make_module(folder, checkpointing)
    stub: Any = SimpleNamespace(
        datamodule=SimpleNamespace(chat=SimpleNamespace(control_ids=[0], new_marker_pieces={})),
        strategy=SimpleNamespace(root_device=device),
        world_size=1,
        accumulate_grad_batches=1,
        global_step=0,
        precision=precision,
        training=True,
    )
    module._trainer = stub
    module.configure_model()
    module.to(device)
    assert isinstance(module.teacher, OnlineTeacher), "no cache is named"
    for model in (module.model, module.teacher.model):
        for parameter in model.parameters():  # weights that are mapped from a file count as held only once read
            parameter.data = parameter.data.clone()
    weights = meter.now() - before
    optimizer = torch.optim.AdamW(module.model.parameters(), lr=1e-4, fused=True)
    for _ in range(2):
        meter.start()
        step(module, batch, optimizer, precision)
    peak, rest = meter.peak() - before, meter.now() - before - weights
    return Held(weights, rest, peak, parameter_counts(module.model))


def step(module: Any, batch: Batch, optimizer: torch.optim.Optimizer, precision: str) -> None:
    """One optimizer step, in the order of `fit`."""
    device = module.device
    chosen = {name: t.to(device) for name, t in module.on_before_batch_transfer(dict(batch), 0).items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        out = module.training_step(chosen, 0)
    out["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def apart(folder: Path, case: str) -> Held:
    """`measured` in a fresh process."""
    command = [sys.executable, *sys.argv, "--measure", case, "--models", str(folder)]
    done = subprocess.run(command, env=os.environ | EXACT | NO_CACHE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    weights, rest, peak, parameters = json.loads(done.stdout.splitlines()[-1])
    return Held(weights, rest, peak, tuple(parameters))


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Compare every case and print the table."""
    write_models(folder, arguments)
    AutoTokenizer.from_pretrained(arguments.data / "qwen3-0.6b").save_pretrained(folder / "dense")
    batch, _ = random_batch(arguments.tokens, arguments.vocabulary)
    print(f"{processor()}, torch {torch.__version__}, {arguments.device}; {tuple(batch['input_ids'].shape)} tokens")
    print("| precision | checkpointing | part | planned MB | measured MB | ratio |\n|---|---|---|---|---|---|")
    results = []
    for precision, checkpointing in CASES:
        case = f"{precision}:{int(checkpointing)}"
        told = planned(folder, batch, precision, checkpointing, arguments.device != "cpu")
        seen = apart(folder, case)
        if told.parameters != seen.parameters:
            raise RuntimeError(f"parameters planned {told.parameters}, really {seen.parameters}")
        for part in ("weights", "rest", "peak"):
            ours, theirs = getattr(told, part) / 1e6, getattr(seen, part) / 1e6
            print(f"| {precision} | {checkpointing} | {part} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.3f} |")
            results.append([precision, checkpointing, part, ours, theirs])
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="at least the tokenizer's 151,669")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a file for the numbers as JSON")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).parents[2] / "shared" / "data")),
        help="the folder with qwen3-0.6b/tokenizer.json",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.width, arguments.layers = WIDTH, LAYERS
    arguments.teacher_width, arguments.teacher_layers = TEACHER_WIDTH, TEACHER_LAYERS
    quiet()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        precision, checkpointing = arguments.measure.split(":")
        batch, _ = random_batch(arguments.tokens, arguments.vocabulary)
        held = measured(arguments.models, batch, precision, checkpointing == "1", torch.device(arguments.device))
        print(json.dumps(held))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments)


if __name__ == "__main__":
    main()
