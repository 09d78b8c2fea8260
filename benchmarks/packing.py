"""Packing against padding on the real rows: how many tokens are useful, and how much faster a step is.

    python benchmarks/packing.py [--rows 16] [--repeats 5]

The share of useful tokens is taken over all training rows of at most 2,048 tokens: tokens of rows over places in the
batches. Padding is shown for batches in random order, and for batches of rows of like length (which gives up the random
order); packing is `agri_moe.data.packing.pack`, as training uses it, for micro-batches of one and of eight sequences.

The speed-up is that of `DistillModule`'s whole step (step.py) on the same rows: several to a sequence, or each a
sequence of its own, padded to the longest. Heads run at supervised positions only in both, so that the bodies alone
gain.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from contestants import Ours, parser, real_data, setting_of
from measure import in_turns, ratio, report, table
from step import about

from agri_moe.data.packing import pack

LONGEST = 2048
BATCHES = (2, 4, 8, 16)
_MULTIPLE = 8  # `collate` rounds a batch's width up to it


def padded_share(lengths: Sequence[int], rows: int) -> float:
    """Useful share of batches of so many rows each, in the order given; the last batch may be smaller."""
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def packed_share(lengths: Sequence[int], sequences: int, longest: int = LONGEST) -> float:
    """Useful share of micro-batches of so many packed sequences."""
    totals = [sum(lengths[row] for row in rows) for rows in pack(lengths, longest)]
    order = np.random.default_rng(0).permutation(len(totals))
    widths = [-(-totals[i] // _MULTIPLE) * _MULTIPLE for i in order]
    return sum(lengths) / sum(widths) * padded_share(widths, sequences)


def shares(lengths: Sequence[int]) -> dict[str, float]:
    """Useful share by way of batching."""
    shuffled = np.random.default_rng(0).permutation(np.array(lengths)).tolist()
    found = {f"padded, {rows} rows": padded_share(shuffled, rows) for rows in BATCHES}
    found |= {f"padded, {rows} rows of like length": padded_share(sorted(lengths), rows) for rows in BATCHES[-2:]}
    return found | {f"packed, {count} x {LONGEST:,}": packed_share(lengths, count) for count in (1, 8)}


def run(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    setting = setting_of(arguments)
    lengths = [len(row.input_ids) for row in setting.corpus.rows]
    if not arguments.random:
        lengths = real_data(LONGEST).rows("train").lengths.tolist()
    found = shares(lengths)
    teacher = setting.new_teacher()
    whole = replace(setting, max_length=LONGEST)
    contestants = {"packed": Ours(whole, teacher), "padded": Ours(whole, teacher, packed=False)}
    seconds = in_turns({name: one.step for name, one in contestants.items()}, arguments.repeats)
    gain = ratio(seconds["padded"], seconds["packed"])
    steps: list[list[Any]] = [
        [name, statistics.median(values), f"{setting.tokens / statistics.median(values):,.0f}"]
        for name, values in seconds.items()
    ]
    text = [
        f"{len(lengths):,} rows, {np.mean(lengths):,.0f} tokens on average, median {np.median(lengths):,.0f}, "
        f"longest {max(lengths):,}.\n",
        table(("batches", "useful tokens"), [[name, f"{share:.1%}"] for name, share in found.items()]),
        "",
        about(setting),
        table(("our step", "seconds", "tokens/s"), steps),
        f"\nPacking is {gain} times as fast.",
    ]
    report(
        "packing",
        "\n".join(text),
        {"arguments": vars(arguments), "useful_share": found, "seconds": seconds, "speed_up": gain},
    )


def main() -> None:
    arguments = parser(__doc__ or "", rows=16, micro_rows=8).parse_args()
    torch.set_num_threads(arguments.threads)
    run(arguments)


if __name__ == "__main__":
    main()
