"""How time and memory grow: the loss with tokens and vocabulary, a step's body with the number of experts.

    python benchmarks/growth.py [--repeats 5] [--plot docs/images/growth.png]

The loss is `fused_ce_kl`, CE and KL, forward and backward, float32. Its memory is the peak above the resident size
before it, in a process of its own, less the two gradients that it returns: what it works in. The body is a Qwen3-MoE
without embeddings to speak of and without a head, forward and backward, top-2, with more experts of the same width: the
work for a token stays, the weights grow. Points of one line take turns.

Pass marks: what the loss works in grows by at most 15% over eight times the tokens, and at most with the vocabulary;
its time at most with their product (10% allowed); the body's time by at most 15% over four times the experts.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loss_step import Problem, ours
from measure import above_mb, apart, in_turns, mark, report, table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.losses import CHUNK_SIZE

TOKENS = (1, 2, 4, 8)
VOCABULARIES = (1, 2, 4)
EXPERTS = (1, 2, 4)
PLOT = Path(__file__).parents[1] / "docs" / "growth.png"

Seconds = Mapping[int, Sequence[float]]
"""Factor -> seconds of each round."""


class Body:
    """The layers of a Mixture-of-Experts and a batch for them."""

    def __init__(self, arguments: argparse.Namespace, experts: int) -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "qwen3_moe",
            vocab_size=1024,
            hidden_size=arguments.body_width,
            intermediate_size=3 * arguments.body_width,
            moe_intermediate_size=3 * arguments.body_width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(arguments.body_width // 64, 2),
            num_key_value_heads=max(arguments.body_width // 128, 1),
            head_dim=min(64, arguments.body_width // 2),
            num_local_experts=experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        )
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.train()
        self.ids_BT = torch.randint(1024, (1, arguments.body_tokens))

    def step(self) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        self.model(input_ids=self.ids_BT, use_cache=False).last_hidden_state.square().mean().backward()


def loss(problem: Problem) -> Tensor:
    return ours(problem, ce=1.0, divergence="forward", chunk_size=CHUNK_SIZE)


def build(arguments: argparse.Namespace, tokens: int, vocabulary: int) -> Problem:
    return Problem(tokens, vocabulary, arguments.width, arguments.teacher_width)


def workspace_mb(arguments: argparse.Namespace, tokens: int, vocabulary: int) -> float:
    """Peak above the resident size before, less the gradients of head and hidden states."""
    problem = build(arguments, tokens, vocabulary)
    above = above_mb(partial(problem.step, loss), problem.forget)
    return above - (problem.hidden_ND.numel() + problem.head_VD.numel()) * 4 / 1e6


def sizes(arguments: argparse.Namespace) -> dict[str, dict[int, tuple[int, int]]]:
    """Line -> factor -> tokens and vocabulary of the loss."""
    whole = arguments.vocabulary
    return {
        "tokens": {factor: (arguments.tokens * factor, whole) for factor in TOKENS},
        "vocabulary": {f: (arguments.tokens * 4, whole * f // VOCABULARIES[-1]) for f in VOCABULARIES},
    }


def time_line(arguments: argparse.Namespace, points: Mapping[int, tuple[int, int]]) -> Seconds:
    """Seconds of the loss at every point of a line."""
    problems = {factor: build(arguments, *size) for factor, size in points.items()}
    steps = {str(factor): partial(problem.step, loss) for factor, problem in problems.items()}
    return {int(name): values for name, values in in_turns(steps, arguments.repeats).items()}


def time_bodies(arguments: argparse.Namespace) -> Seconds:
    """Seconds of the body by its number of experts, as a multiple of the smallest."""
    steps = {str(factor): Body(arguments, arguments.experts * factor).step for factor in EXPERTS}
    return {int(name): values for name, values in in_turns(steps, arguments.repeats).items()}


def growth(seconds: Seconds, factor: int) -> float:
    """Median over the rounds of the time at a factor over that at 1."""
    return statistics.median(much / one for much, one in zip(seconds[factor], seconds[1], strict=True))


def plot(times: Mapping[str, Seconds], memory: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Growth of time and memory, relative to the first point of each line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, seconds in times.items():
        grown = [[much / one for much, one in zip(seconds[f], seconds[1], strict=True)] for f in seconds]
        middle = [statistics.median(values) for values in grown]
        spread = [[m - min(v) for m, v in zip(middle, grown, strict=True)],
                  [max(v) - m for m, v in zip(middle, grown, strict=True)]]  # fmt: skip
        left.errorbar(list(seconds), middle, yerr=spread, marker="o", capsize=3, label=name)
    for name, points in memory.items():
        right.plot(list(points), [value / points[1] for value in points.values()], marker="o", label=name)
    for axes, title in ((left, "time"), (right, "what the loss works in")):
        axes.plot([1, 8], [1, 8], color="grey", linewidth=1, linestyle=":", label="proportional")
        axes.set(title=title, xlabel="times as many", ylabel="times as much", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.set_xticks(TOKENS), axes.set_yticks(TOKENS)
        axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    memory = {
        line: {factor: float(apart("--memory", *map(str, size))) for factor, size in points.items()}
        for line, points in sizes(arguments).items()
    }
    times = {line: time_line(arguments, points) for line, points in sizes(arguments).items()}
    times["experts"] = time_bodies(arguments)
    rows: list[list[Any]] = []
    for line, seconds in times.items():
        for factor, values in seconds.items():
            median = statistics.median(values)
            mb = f"{memory[line][factor]:,.0f}" if line in memory else "-"
            rows.append([line, f"x{factor}", median, f"{growth(seconds, factor):.2f}", mb])
    marks = [
        mark("loss memory over x8 tokens", memory["tokens"][8] / memory["tokens"][1], 1.15),
        mark("loss memory over x4 vocabulary", memory["vocabulary"][4] / memory["vocabulary"][1], 4.4),
        mark("loss time over x8 tokens", growth(times["tokens"], 8), 8.8),
        mark("loss time over x4 vocabulary", growth(times["vocabulary"], 4), 4.4),
        mark("body time over x4 experts", growth(times["experts"], 4), 1.15),
    ]
    plot(times, memory, arguments.plot)
    about = (
        f"Loss: {arguments.tokens} tokens x1, vocabulary {arguments.vocabulary:,} (x4 at {4 * arguments.tokens} "
        f"tokens), widths {arguments.width} and {arguments.teacher_width}. Body: {arguments.experts} experts x1, "
        f"{arguments.layers} layers of {arguments.body_width}, {arguments.body_tokens:,} tokens.\n"
    )
    head = ("line", "size", "seconds", "times x1", "works in, MB")
    text = "\n".join([about, table(head, rows), "", *marks, f"Plot: {arguments.plot}"])
    report("growth", text, {"arguments": vars(arguments) | {"plot": str(arguments.plot)}, "seconds": times,
                            "workspace_mb": memory})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=CHUNK_SIZE, help="of the loss, at x1")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher_width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8, help="of the body, at x1")
    parser.add_argument("--body_width", type=int, default=512)
    parser.add_argument("--body_tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--memory", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(json.dumps(workspace_mb(arguments, *arguments.memory)))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
