"""Time, memory and exactness of one distillation loss step: ours, its matrix products alone, and the peers.

    python benchmarks/loss_step.py [--tokens 512] [--chunk_sizes 64 128 256] [--divergences forward jsd] [--repeats 5]

A step is forward and backward with the gradients of the student's hidden states and head, in float32, at temperature 1
(at others liger-kernel leaves out T squared). The peers take KL(teacher || student) alone; ours is timed so, and with
cross-entropy beside it, as training has it.

    products     the four that the step needs (two logits, two gradients) over all rows at once; holds [N, V] logits
    liger        LigerFusedLinearJSDLoss, beta 0, not compiled, its own chunk size (1,024 rows: all of them at 512)
    trl chunked  `_chunked_divergence_loss` of TRL's DistillationTrainer; it takes six products: logits twice
    trl dense    `generalized_jsd_loss` of TRL's GKDTrainer on whole [N, V] logits

Memory is the peak above the resident size before the step, in a process of its own, and so contains both gradients.
Value and gradients are held against float64 on the first rows; an error is the largest difference over the largest
true entry. Peers that are not installed are left out, and said to be (`make bench` installs them).
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, get_args

import torch
from measure import Product, Products, Step, above_mb, apart, in_turns, mark, ratio, report, table
from measure import processor as processor  # other benchmarks take these two from here
from measure import resident_mb as resident_mb
from torch import Tensor

from agri_moe.losses import CHUNK_SIZE, Divergence, fused_ce_kl

Loss = Callable[["Problem"], Tensor]
PRODUCTS = "products"


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
        """Drop the gradients."""
        self.hidden_ND.grad = self.head_VD.grad = None

    def step(self, loss: Loss) -> Tensor:
        """Forward and backward; gradients of the step before are dropped."""
        self.forget()
        value = loss(self)
        value.backward()
        return value.detach()

    def products(self) -> Products:
        """The step's four matrix products."""
        n, (v, d), d_t = len(self.hidden_ND), self.head_VD.shape, self.teacher_head_VD.shape[1]
        return Products([*Product(n, d, v, 1).with_gradients(), Product(n, d_t, v, 1)])


# ---------------------------------------------------------------------- contestants


def ours(problem: Problem, ce: float, divergence: Divergence, chunk_size: int) -> Tensor:
    """`fused_ce_kl`, mean over the rows."""
    n = len(problem.hidden_ND)
    return fused_ce_kl(
        problem.hidden_ND,
        problem.head_VD,
        problem.targets_N,
        problem.teacher_hidden_ND,
        problem.teacher_head_VD,
        ce_scale=ce / n,
        kl_scale=1.0 / n,
        divergence=divergence,
        chunk_size=chunk_size,
    ).loss


def liger(problem: Problem) -> Tensor:
    """liger-kernel's chunked JSD at beta 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    value: Tensor = loss(
        problem.hidden_ND, problem.head_VD, problem.teacher_hidden_ND, problem.teacher_head_VD, problem.targets_N
    )
    return value


def trl_chunked(problem: Problem) -> Tensor:
    """TRL's chunked divergence."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden_1ND, teacher_1ND = problem.hidden_ND[None], problem.teacher_hidden_ND[None]
    mask_1N = torch.ones(1, len(problem.hidden_ND))
    value: Tensor = _chunked_divergence_loss(
        hidden_1ND, teacher_1ND, problem.head_VD, problem.teacher_head_VD, mask_1N, beta=0.0
    )[0]
    return value


def trl_dense(problem: Problem) -> Tensor:
    """The loss of TRL's GKDTrainer on whole logits."""
    from trl.experimental.gkd import GKDTrainer

    student_1NV = (problem.hidden_ND @ problem.head_VD.T)[None]
    teacher_1NV = (problem.teacher_hidden_ND @ problem.teacher_head_VD.T)[None]
    value: Tensor = GKDTrainer.generalized_jsd_loss(student_1NV, teacher_1NV, problem.targets_N[None], beta=0.0)
    return value


PEERS: dict[str, tuple[str, Loss]] = {
    "liger": ("liger_kernel", liger),
    "trl chunked": ("trl", trl_chunked),
    "trl dense": ("trl", trl_dense),
}
"""Contestant -> the package that it needs, and its loss."""


def contestants(arguments: argparse.Namespace) -> dict[str, Loss]:
    """Ours by divergence and chunk size, and the peers that are installed."""
    losses: dict[str, Loss] = {}
    for chunk_size in arguments.chunk_sizes:
        at = "" if len(arguments.chunk_sizes) == 1 else f", chunks of {chunk_size}"
        for divergence in arguments.divergences:
            name = "ours" if divergence == "forward" else f"ours ({divergence})"
            losses[name + at] = partial(ours, ce=0.0, divergence=divergence, chunk_size=chunk_size)
            losses[f"{name} with CE{at}"] = partial(ours, ce=1.0, divergence=divergence, chunk_size=chunk_size)
    return losses | {name: loss for name, (package, loss) in PEERS.items() if find_spec(package)}


# ---------------------------------------------------------------------- exactness


class Exact(NamedTuple):
    """Mean KL(teacher || student) and its gradients in float64."""

    value: float
    hidden_ND: Tensor
    head_VD: Tensor


@torch.no_grad()
def in_float64(problem: Problem) -> Exact:
    """From the definition, with the gradient worked out by hand: (softmax(s) - softmax(t)) / N."""
    log_qt_NV = (problem.teacher_hidden_ND.double() @ problem.teacher_head_VD.double().T).log_softmax(-1)
    hidden_ND, head_VD = problem.hidden_ND.double(), problem.head_VD.double()
    log_qs_NV = (hidden_ND @ head_VD.T).log_softmax(-1)
    value = (log_qt_NV.exp() * (log_qt_NV - log_qs_NV)).sum().item() / len(hidden_ND)
    gradient_NV = (log_qs_NV.exp() - log_qt_NV.exp()) / len(hidden_ND)
    return Exact(value, gradient_NV @ head_VD, gradient_NV.T @ hidden_ND)


def errors(problem: Problem, loss: Loss, exact: Exact) -> tuple[float, float, float]:
    """Relative error of the value, of the hidden states' gradient and of the head's."""
    value = float(problem.step(loss))
    found = []
    for leaf, true in ((problem.hidden_ND, exact.hidden_ND), (problem.head_VD, exact.head_VD)):
        assert leaf.grad is not None
        found.append(float((leaf.grad.double() - true).abs().max() / true.abs().max()))
    return abs(value - exact.value) / exact.value, found[0], found[1]


# ---------------------------------------------------------------------- all of it


def build(arguments: argparse.Namespace, tokens: int) -> Problem:
    return Problem(tokens, arguments.vocabulary, arguments.width, arguments.teacher_width)


def memory(arguments: argparse.Namespace, name: str) -> float:
    """Peak MB of a step above the resident size before it."""
    problem = build(arguments, arguments.tokens)
    return above_mb(partial(problem.step, contestants(arguments)[name]), problem.forget)


def run(arguments: argparse.Namespace) -> None:
    """Measure everything and report it."""
    losses = contestants(arguments)
    few = build(arguments, min(arguments.tokens, 64))
    exact = in_float64(few)
    wrong = {name: errors(few, loss, exact) for name, loss in losses.items() if "CE" not in name and "(" not in name}
    del few, exact
    peaks = {name: apart("--memory", name) for name in losses}
    problem = build(arguments, arguments.tokens)
    steps: dict[str, Step] = {PRODUCTS: problem.products()}
    steps |= {name: partial(problem.step, loss) for name, loss in losses.items()}
    seconds = in_turns(steps, arguments.repeats)

    result: dict[str, Any] = {"arguments": vars(arguments), "contestants": {}}
    rows: list[list[str | float]] = []
    for name, values in seconds.items():
        to_products, to_ours = ratio(values, seconds[PRODUCTS]), ratio(values, seconds[next(iter(losses))])
        error = [f"{e:.0e}" for e in wrong[name]] if name in wrong else ["-"] * 3
        peak = peaks.get(name)
        rows.append(
            [name, statistics.median(values), str(to_products), str(to_ours), f"{peak:,.0f}" if peak else "-", *error]
        )
        result["contestants"][name] = {
            "seconds": values, "to_products": to_products, "to_ours": to_ours, "peak_mb": peak,
            "relative_errors": wrong.get(name),
        }  # fmt: skip
    head = ("", "seconds", "x products", "x ours", "peak MB", "value", "d hidden", "d head")
    missing = [f"Left out: {name}, {package} is not installed." for name, (package, _) in PEERS.items()
               if name not in losses]  # fmt: skip
    about = (
        f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary:,}, widths {arguments.width} and "
        f"{arguments.teacher_width}, float32; medians of {arguments.repeats} rounds, (lowest to highest).\n"
    )
    report("loss_step", "\n".join([about, table(head, rows), "", *missing, *marks(seconds, peaks)]), result)


def marks(seconds: dict[str, list[float]], peaks: dict[str, float]) -> list[str]:
    """The pass marks, where everything that they compare was measured."""
    mine = next((name for name in peaks if name.startswith("ours") and "CE" not in name and "(" not in name), None)
    if mine is None:
        return []
    found = [mark("time over the products'", ratio(seconds[mine], seconds[PRODUCTS]).median, 1.3)]
    if "liger" in seconds:
        found.append(mark("time over liger's", ratio(seconds[mine], seconds["liger"]).median, 0.8))
    if "trl chunked" in seconds:
        found.append(mark("memory over TRL's chunked", peaks[mine] / peaks["trl chunked"], 1.0))
    return found


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
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(json.dumps(memory(arguments, arguments.memory)))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
