"""Time and memory of one distillation loss step, against the same matrix products alone.

    python benchmarks/loss_step.py [--tokens 512] [--chunk_sizes 64 128 256] [--divergences forward jsd] [--repeats 5]

A step is forward and backward of `fused_ce_kl` (CE and a divergence at temperature 2) with the gradients of hidden
states and head, in float32. The products are its four: student logits, teacher logits, and two for the
gradient. They are timed twice: over all rows at once, which is the fastest they go and holds [N, V] logits,
and by chunks of the same size as the step's. The variants take turns: a noisy machine hurts all.

Memory is the peak resident size above the size just before the step, and so contains the two gradients.
It is read from Linux's /proc and left out elsewhere.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from agri_moe.losses import CHUNK_SIZE, Divergence, fused_ce_kl

Step = Callable[[], None]


class Problem:
    """Random tensors of the real shapes: a 0.6B student and a teacher twice as wide."""

    def __init__(self, tokens: int, vocabulary: int, width: int, teacher_width: int) -> None:
        torch.manual_seed(0)
        self.hidden_ND = torch.randn(tokens, width, requires_grad=True)
        self.head_VD = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
        self.targets_N = torch.randint(vocabulary, (tokens,))
        self.teacher_hidden_ND = torch.randn(tokens, teacher_width)
        self.teacher_head_VD = torch.randn(vocabulary, teacher_width) / teacher_width**0.5

    def forget(self) -> None:
        """Drop the gradients of the last step."""
        self.hidden_ND.grad = self.head_VD.grad = None

    def fused(self, chunk_size: int, divergence: Divergence) -> None:
        """One loss step, forward and backward."""
        loss = fused_ce_kl(
            self.hidden_ND,
            self.head_VD,
            self.targets_N,
            self.teacher_hidden_ND,
            self.teacher_head_VD,
            ce_scale=1.0,
            kl_scale=1.0,
            temperature=2.0,
            divergence=divergence,
            chunk_size=chunk_size,
        ).loss
        loss.backward()

    @torch.no_grad()
    def products(self, chunk_size: int) -> None:
        """The step's four matrix products and nothing else."""
        vocabulary, width = self.head_VD.shape
        logits_CV = torch.empty(chunk_size, vocabulary)
        head_gradient_VD = torch.empty(vocabulary, width)
        for start in range(0, len(self.hidden_ND), chunk_size):
            hidden_CD = self.hidden_ND[start : start + chunk_size]
            out: Tensor = logits_CV[: len(hidden_CD)]
            torch.mm(self.teacher_hidden_ND[start : start + chunk_size], self.teacher_head_VD.T, out=out)
            torch.mm(hidden_CD, self.head_VD.T, out=out)
            torch.mm(out, self.head_VD)
            if start == 0:
                torch.mm(out.T, hidden_CD, out=head_gradient_VD)
            else:
                head_gradient_VD.addmm_(out.T, hidden_CD)


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


def measure(step: Step) -> tuple[float, float]:
    """Return (seconds, peak MB above the start; NaN where Linux's counters are not at hand)."""
    clear = Path("/proc/self/clear_refs")
    linux = clear.exists()
    if linux:
        clear.write_text("5")  # resets VmHWM, see proc(5)
    before = resident_mb("VmRSS") if linux else float("nan")
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return seconds, resident_mb("VmHWM") - before if linux else float("nan")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--teacher_width", type=int, default=2048)
    parser.add_argument("--chunk_sizes", type=int, nargs="+", default=[CHUNK_SIZE])
    parser.add_argument("--divergences", nargs="+", choices=get_args(Divergence), default=["forward"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments.tokens, arguments.vocabulary, arguments.width, arguments.teacher_width)
    whole = "products, all rows at once"
    steps: dict[str, Step] = {whole: partial(problem.products, arguments.tokens)}
    for chunk_size in arguments.chunk_sizes:
        steps[f"products, chunks of {chunk_size}"] = partial(problem.products, chunk_size)
        for divergence in arguments.divergences:
            steps[f"{divergence}, chunks of {chunk_size}"] = partial(problem.fused, chunk_size, divergence)

    results: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 1):
        for name, step in steps.items():
            problem.forget()
            result = measure(step)
            if repeat:  # the first round warms up
                results[name].append(result)

    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(
        f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary:,}, widths {arguments.width} and "
        f"{arguments.teacher_width}; medians of {arguments.repeats}"
    )
    print(f"{'':<32}{'seconds':>9}{'fastest':>9}{'x products':>12}{'peak MB':>9}")
    reference = statistics.median(seconds for seconds, _ in results[whole])
    for name, runs in results.items():
        seconds = statistics.median(s for s, _ in runs)
        memory = statistics.median(m for _, m in runs)
        fastest = min(s for s, _ in runs)
        print(f"{name:<32}{seconds:>9.2f}{fastest:>9.2f}{seconds / reference:>12.2f}{memory:>9.0f}")


if __name__ == "__main__":
    main()
