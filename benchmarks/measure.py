"""How every benchmark here measures: contestants in turns, memory in processes of their own, the machine's name.

Time: the contestants take turns, each round in another order, so that a noisy machine hurts all of them; a ratio is
taken round by round. Memory: a process of its own with a malloc that gives freed tensors back at once, and the highest
resident size (VmHWM) of a second step; it is read from Linux's /proc and NaN elsewhere.
"""

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

OUTPUT = Path(__file__).parent / "output"
DATA = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).parents[2] / "shared" / "data"))
# Else the resident size is that of the allocator's reserves.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# What CUDA's allocator does anyway. glibc's gives large tensors back and takes fresh pages for the next ones.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}

Step = Callable[[], object]
Cell = str | float | int


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on besides the code: for the JSON, and the line above a table."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    facts = {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return facts | {"date": date.today().isoformat(), "command": " ".join(["python", *sys.argv])}


# ---------------------------------------------------------------------- time


def seconds_of(step: Step) -> float:
    """Wall-clock seconds of one step, on a GPU until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, by contestant and round; a round before the first warms up."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            taken = seconds_of(steps[name])
            if turn:
                seconds[name].append(taken)
    return seconds


class Ratio(NamedTuple):
    """Median, lowest and highest over the rounds."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def ratio(values: Sequence[float], to: Sequence[float]) -> Ratio:
    """The ratio of two contestants, round by round."""
    ratios = [value / other for value, other in zip(values, to, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def keep_pages() -> None:
    """Begin this process anew, unless that has been done, with a malloc that keeps the memory of freed tensors."""
    if any(os.environ.get(name) != value for name, value in KEPT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)


# ---------------------------------------------------------------------- memory


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def forget_peak() -> None:
    """Set VmHWM to the present size, see proc(5)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def give_back() -> None:
    """Give the allocator's free pages back to the system, see malloc_trim(3); does nothing where libc is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_mb(step: Step) -> dict[str, float]:
    """Resident MB before a first step (`before`), and at most in a second one (`peak`)."""
    before = resident_mb("VmRSS")
    step()
    forget_peak()
    step()
    return {"before": before, "peak": resident_mb("VmHWM")}


def above_mb(step: Step, forget: Step) -> float:
    """How far a second step rises above the resident size before it, once `forget` has dropped the first one's."""
    step()
    forget()
    before = resident_mb("VmRSS")
    forget_peak()
    step()
    return resident_mb("VmHWM") - before


def apart(*arguments: str) -> Any:
    """Run this script in a fresh process with more arguments; the last line that it prints is JSON."""
    command = [sys.executable, *sys.argv, *arguments]
    done = subprocess.run(command, env=os.environ | EXACT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------- matrix products


class Product(NamedTuple):
    """A matrix product [m, k] @ [k, n] that a step does `times` times over."""

    m: int
    k: int
    n: int
    times: int

    @property
    def flops(self) -> int:
        """Of all of them, a multiplication and an addition being two."""
        return 2 * self.m * self.k * self.n * self.times

    def with_gradients(self) -> list["Product"]:
        """Itself, as it is in the forward pass, and the two products of its backward pass."""
        return [self, Product(self.m, self.n, self.k, self.times), Product(self.n, self.m, self.k, self.times)]


class Products:
    """Matrix products and nothing else: the fastest that a step made of them could be.

    Operands and outputs are made once, so that no time goes into fresh pages.
    """

    def __init__(self, products: Sequence[Product], dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.products = [product for product in products if product.flops]
        largest = [max(getattr(p, a) * getattr(p, b) for p in self.products) for a, b in ("mk", "nk", "mn")]
        # One run of numbers for all operands of a side: small products then start from a warm cache, as they do
        # where activations have just been made.
        self._runs = [torch.randn(size, device=device).to(dtype) for size in largest]

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(product.flops for product in self.products)

    @torch.no_grad()
    def __call__(self) -> None:
        """Do them all once."""
        left, right, out = self._runs
        for m, k, n, times in self.products:
            a, b, c = left[: m * k].view(m, k), right[: n * k].view(n, k).T, out[: m * n].view(m, n)
            for _ in range(times):
                torch.mm(a, b, out=c)


# ---------------------------------------------------------------------- what comes out


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """As Markdown; floats with two digits."""
    cells = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [list(head), *cells]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def mark(name: str, value: float, limit: float, *, at_least: bool = False) -> str:
    """One line that holds a number against its pass mark."""
    passed = value >= limit if at_least else value <= limit
    bound = "at least" if at_least else "at most"
    return f"{'pass' if passed else 'MISS'}: {name} {value:.2f}, {bound} {limit:g}"


def report(part: str, text: str, result: Mapping[str, Any], device: str = "cpu") -> None:
    """Print a part's tables under the machine's name, and write its numbers to benchmarks/output/PART.json."""
    facts = machine(device)
    print(f"## {part}\n\n{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}\n")
    print(text)
    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / f"{part}.json"
    path.write_text(json.dumps(facts | dict(result), indent=1) + "\n", "utf-8")
    print(f"\nWritten: {path}")
