"""What `select` is worth: small models trained on a tenth or a third of the documents, chosen or drawn at random.

    python benchmarks/selection.py [--budgets 10,30] [--seeds 3] [--output DIR]
    python benchmarks/selection.py --table                   print what is there, train nothing

The documents are those of real_text.py; the budget is a share of their tokens. For each budget the training documents
are drawn at random, or chosen by `select --group_by domain`, the highest scores first or by strata. A small Qwen3 with
random weights is then trained on them alone for as many steps; with so few documents it goes through them many times,
so each is read where its held-out loss is lowest. A seed draws the documents (of the random choice), the weights and
the order. select_command.py measures the command itself.

A finished cell is a JSON file in DIR, as in ablation.py; started again, the script goes on.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ablation import quiet, remember, result_file
from ablation_table import markdown
from loss_step import processor
from upcycling import Continued, Curve, Setting, shown

from agri_moe.cli import main
from agri_moe.data.chat import Chat

OUTPUT = Path(__file__).parent / "output" / "selection"
WAYS = ("random", "highest", "strata")
SETTING = Setting(width=64, inner=192, layers=2, dense_rate=3e-3, steps=300, check_every=50)
POOL = ("first", "second")
DOMAINS = ("plant_disease", "soil", "news_hi", "passages_hi")


class Selected:
    """The trainings.

    Args:
        output: Folder of choices and results.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.continued = Continued(SETTING, output)

    def chosen(self, way: str, budget: int, seed: int) -> Path:
        """The documents that a way has chosen, as a file."""
        name = f"{way}_{budget}" + f"_{seed}" * (way == "random")
        file = self.output / f"{name}.parquet"
        if file.exists():
            return file
        if way == "random":
            self._draw(file, budget, seed)
            return file
        options = ["--group_by", "domain", "--budget_in", "tokens", "--within", way]
        pool = [arg for part in POOL for arg in ("--input", str(self.continued.files[part]))]
        files = [*pool, "--output", str(file)]
        main(["select", *files, "--budget", f"{budget}%", "--tokenizer", str(self.continued.tokenizer), *options])
        return file

    def _draw(self, file: Path, budget: int, seed: int) -> None:
        """Documents in a random order, until the budget is spent."""
        documents = [one for part in POOL for one in pq.read_table(self.continued.files[part]).to_pylist()]
        chat = Chat.load(str(self.continued.tokenizer))
        tokens = [len(chat.encode_text(document["text"])) for document in documents]
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        drawn, left = [], sum(tokens) * budget / 100
        for i in order:
            if tokens[i] <= left:
                drawn.append(documents[i])
                left -= tokens[i]
        pq.write_table(pa.Table.from_pylist(drawn), file)

    def cell(self, way: str, budget: int, seed: int) -> dict[str, Any]:
        """Train on one choice: its curve, and how much there was to read."""

        def train() -> dict[str, Any]:
            data, curve = self.continued.data(seed, self.chosen(way, budget, seed)), Curve()
            network, steps, every = {"config": self.continued.shape()}, SETTING.steps, SETTING.check_every
            self.continued.fit(network, data, curve, rate=SETTING.dense_rate, steps=steps, every=every, seed=seed)
            rows = data.rows("train")
            return {"curve": curve.points, "documents": len(rows), "tokens": int(rows.lengths.sum())}

        return remember(self.output, f"{way}_{budget}_{seed}", self.config(way, budget, seed), train)

    def config(self, way: str, budget: int, seed: int) -> dict[str, Any]:
        """What a result depends on."""
        return {"setting": asdict(SETTING), "way": way, "budget": budget, "seed": seed}

    def results(self, budgets: Sequence[int], seeds: int) -> dict[tuple[int, str], list[dict[str, Any]]]:
        """What is finished: budget and way -> results, seed by seed."""
        found: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for budget in budgets:
            for way in WAYS:
                names = [(f"{way}_{budget}_{seed}", self.config(way, budget, seed)) for seed in range(seeds)]
                files = [path for name, config in names if (path := result_file(self.output, name, config)).exists()]
                if files:
                    found[budget, way] = [json.loads(path.read_text("utf-8"))["result"] for path in files]
        return found


def lowest(curve: dict[str, dict[str, float]]) -> dict[str, float]:
    """A curve where its held-out loss is lowest, with the step."""
    step = min(curve, key=lambda step: curve[step]["ce"])
    return curve[step] | {"step": float(step)}


def table(results: dict[tuple[int, str], list[dict[str, Any]]]) -> str:
    """Mean and spread over the seeds, of all held-out documents and of each domain."""
    rows = []
    for (budget, way), cells in results.items():
        best = [lowest(cell["curve"]) for cell in cells]
        losses = [shown([one[name] for one in best]) for name in ("ce", *(f"ce/{domain}" for domain in DOMAINS))]
        pieces = f"{statistics.fmean(cell['documents'] for cell in cells):,.0f}"
        rows.append([f"{budget}%", way, pieces, *losses, f"{statistics.fmean(one['step'] for one in best):.0f}"])
    return markdown(("tokens", "choice", "pieces", "held-out loss", *DOMAINS, "at step"), rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="10,30", help="shares of the tokens in percent, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print what is finished, train nothing")
    return parser.parse_args()


def run() -> None:
    """Train what is missing; print the table."""
    args = arguments()
    quiet()
    budgets = [int(budget) for budget in args.budgets.split(",")]
    selected = Selected(args.output)
    if not args.table:
        for seed in range(args.seeds):
            for budget in budgets:
                for way in WAYS:
                    selected.cell(way, budget, seed)
    text = (
        f"Qwen3 of {SETTING.layers} layers of {SETTING.width} with random weights, {SETTING.steps} steps of "
        f"{SETTING.tokens_per_batch:,} tokens, read where the held-out loss is lowest. {processor()}, "
        f"{torch.get_num_threads()} threads.\n\n{table(selected.results(budgets, args.seeds))}"
    )
    print(text)
    (args.output / "table.md").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    run()
