"""Training from a cache of the teacher's answers against training beside the teacher: what the student loses.

    python benchmarks/cached.py [--seeds 3] [--steps 300] [--cells NAMES] [--output DIR]
    python benchmarks/cached.py --from_teacher [--steps 100]    students that begin as the teacher
    python benchmarks/cached.py --table                         print what is there

Rows, models and scores are those of `ablation.py --corpus real`; given its folder, its teacher and dense models are
taken as they are. For each seed all students start from one upcycled model and see the same rows in the same order;
only where the teacher's answers come from differs: the teacher itself, or a cache that the `cache` command wrote once.
All are scored on the held-out rows against the teacher itself, over the whole vocabulary. `online, bfloat16` is the
teacher rounded, a change as small as any: what it moves is what a comparison of two trainings cannot resolve.

Under `CE + KL`, what people train with, the rows' own tokens are half of the loss and hide much of what a cache does to
the other half; under `KL alone` the advisory is learned from the teacher and nothing else.

`top 50, no tail` is what most libraries train on: the k best and nothing else (DistillKit's
`missing_probability_handling: zero`; others renormalise). It is the cache of the 50 best with the mass of all others
set to zero in its files: the probabilities of the 50, as they are read, add up to 1, and the student, over its whole
vocabulary, is told that nothing else ever comes. Without adding up to 1 the loss has its minimum at the same student,
and its gradient is that times the mass which the 50 hold.

A student far from its teacher gains from any push towards the most probable tokens. Where each cache leads in the end
is seen with `--from_teacher`: the student is the teacher upcycled, which has nothing to learn. It is thrown off by the
learning rate alone, also online; what it ends with above that is what the cache got wrong.

A second table holds the gradient of KL at the dense model of seed 0 against that with the teacher itself. What samples
add is noise, which the steps of a training average out; what the 50 best leave out is missing in every step.

A finished cell is a JSON file in DIR, as in ablation.py: started again, the script goes on where it stopped.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from ablation import BASE, SETTINGS, Ablation, quiet, remember
from ablation_table import Measure, Results, Spread, markdown, spread
from matplotlib.figure import Figure
from measure import mark
from torch import Tensor
from transformers import AutoModelForCausalLM

from agri_moe.cli import main
from agri_moe.data.chat import Segment
from agri_moe.data.logit_cache import MANIFEST, Answers, LogitCache, finish, shard_name, write_shard
from agri_moe.losses import SparseTeacher, entropy, fused_ce_kl, log_probabilities, most_probable, sampled_counts
from agri_moe.models.base import LanguageModule

OUTPUT = Path(__file__).parent / "output" / "cached"
LIMIT = 0.01  # of the loss with the teacher itself
NOTHING = 0.01  # nats; of less, no share is taken
GRADIENT_ROWS = 16  # one held-out row in so many

OBJECTIVES: dict[str, dict[str, Any]] = {"CE + KL": BASE, "KL alone": BASE | {"ce": {"weight": 0.0}}}
ONLINE, TOP, NO_TAIL = "online", "top 50", "top 50, no tail"
DTYPES = {ONLINE: "float32", "online, bfloat16": "bfloat16"}
COMMANDS = {
    TOP: ("--kind", "topk", "--k", "50"),
    "12 samples": ("--kind", "sampled", "--draws", "12"),
    "50 samples": ("--kind", "sampled", "--draws", "50"),
}
"""Cache -> options of the command that writes it."""
TEACHERS = (*DTYPES, *COMMANDS, NO_TAIL)
HELD_TO_LIMIT = (TOP, "12 samples")


class Cell(NamedTuple):
    """What a student learns by, and where the teacher's answers come from."""

    objective: str
    teacher: str

    @property
    def name(self) -> str:
        """As results and files have it."""
        return f"{self.objective}, {self.teacher}"


CELLS = {cell.name: cell for cell in (Cell(objective, teacher) for objective in OBJECTIVES for teacher in TEACHERS)}

# ---------------------------------------------------------------------- training


def erase_tail(source: Path, folder: Path) -> None:
    """Copy a cache of the most probable tokens as if there were no others: their mass goes to those that are there."""
    cache = LogitCache(source)
    folder.mkdir(parents=True)

    def without(answers: Answers) -> Answers:
        assert answers.log_probs_NK is not None, "a cache of the most probable tokens"
        kept_N1 = np.logaddexp.reduce(answers.log_probs_NK, axis=1, keepdims=True)
        nothing_N = np.full(len(answers.positions_N), -np.inf, np.float32)
        return answers._replace(log_probs_NK=answers.log_probs_NK - kept_N1, log_tail_N=nothing_N)

    write_shard(folder / shard_name(0), cache.header.kind, ((key, without(answers)) for key, answers in cache))
    finish(folder, cache.header, 1)


class Cached(Ablation):
    """Students that differ in where the teacher's answers come from."""

    scored = BASE

    def config(self, cell: str, seed: int) -> dict[str, Any]:
        """What the result of a cell depends on."""
        own: dict[str, Any] = {}
        if cell in CELLS:
            objective, teacher = CELLS[cell]
            own = {"objective": OBJECTIVES[objective], "teacher": teacher}
        return {"setting": asdict(self.setting), "seed": seed} | own

    def train(self, cell: str, student: dict[str, Any], seed: int) -> LanguageModule:
        """Train a student as a cell says."""
        objective, teacher = CELLS[cell]
        answers = self.teacher_config() | (
            {"dtype": DTYPES[teacher]} if teacher in DTYPES else {"cache": str(self.cache(teacher))}
        )
        options = {"student": student, "teacher": answers, "objective": OBJECTIVES[objective]}
        return self.fit("distill.DistillModule", options, self.setting.student, seed)[0]

    def folder(self, teacher: str) -> Path:
        """Where a cache lies."""
        return self.output / "answers" / teacher.replace(", ", "_").replace(" ", "_")

    def cache(self, teacher: str) -> Path:
        """The folder of a cache, which is written when it is not there."""
        folder = self.folder(teacher)
        if (folder / MANIFEST).exists():
            return folder
        if teacher == NO_TAIL:
            erase_tail(self.cache(TOP), folder)
        else:
            main(["cache", "--config", str(self.experiment()), "--output", str(folder), *COMMANDS[teacher]])
        return folder

    def experiment(self) -> Path:
        """A config file for the cache command."""
        options = {"student": self.student(0), "teacher": self.teacher_config(), "objective": BASE}
        content = {
            "model": {"class_path": "agri_moe.models.distill.DistillModule", "init_args": options},
            "data": {
                "class_path": "agri_moe.data.chat_data.ChatDataModule",
                "init_args": self.rows | {"format": asdict(self.corpus.format)},
            },
        }
        path = self.output / "cache.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
        return path

    def wanted(self, cells: Sequence[str], seeds: int) -> Iterator[tuple[str, int]]:
        """As in the ablation, but for the teacher."""
        return (pair for pair in super().wanted(cells, seeds) if pair[0] != "teacher")

    def gradients(self) -> dict[str, dict[str, float]]:
        """The gradient of KL from what the caches keep, against that from the teacher itself."""
        dense, teacher = self.dense(0)[0], self.teacher()[0]

        def work() -> dict[str, Any]:
            data = self.data(0)
            table = data.rows("validation").table
            rows = table.select(range(0, len(table), GRADIENT_ROWS))
            return gradient_errors(dense, teacher, rows, sorted(data.chat.control_ids))

        found = remember(self.output, "gradients", {"models": [dense.name, teacher.name], "every": GRADIENT_ROWS}, work)
        return {name: error for name, error in found.items() if name in TEACHERS}

    def about_cache(self) -> str:
        """How much of the teacher the 50 best hold, and what it takes to keep them."""
        cache = LogitCache(self.cache(TOP))
        tail = np.exp(np.concatenate([answers.log_tail_N for _, answers in cache if answers.log_tail_N is not None]))
        low, high = np.quantile(1 - tail, (0.1, 0.9))
        size = sum(path.stat().st_size for path in cache.folder.glob("*.arrow"))
        return (
            f"Caches: {len(cache):,} rows, {len(tail):,} positions; the 50 best hold {1 - tail.mean():.1%} of the "
            f"teacher's mass on average (tenths {low:.0%} and {high:.0%}), in {size / len(tail):.0f} bytes a position."
        )


class FromTeacher(Cached):
    """Students that begin as the teacher's own function."""

    def dense(self, seed: int) -> tuple[Path, dict[str, Any]]:
        """What the students are upcycled from."""
        return self.teacher()


# ---------------------------------------------------------------------- the gradient


def kept(log_p_MV: Tensor, generator: torch.Generator) -> dict[str, SparseTeacher]:
    """What each cache keeps of the teacher's log-probabilities, before it is rounded."""
    ids, log_probs, log_tail = most_probable(log_p_MV, 50)
    probs, tail = log_probs.exp(), log_tail.exp()
    about = (entropy(log_p_MV), log_p_MV.shape[1])
    found = {
        TOP: SparseTeacher(ids, probs, tail, *about),
        NO_TAIL: SparseTeacher(ids, probs / probs.sum(1, keepdim=True), torch.zeros_like(tail), *about),
    }
    for draws in (12, 50):
        ids, counts = sampled_counts(log_p_MV, draws, generator)
        found[f"{draws} samples"] = SparseTeacher(ids, counts / draws, None, *about)
    return found


def gradient_errors(student: Path, teacher: Path, rows: Any, control_ids: list[int]) -> dict[str, Any]:
    """KL's gradient in a dense student's parameters, summed over the answers of some rows.

    Args:
        student: Folder of the model.
        teacher: Folder of the model; both read the same ids.
        rows: Tokenised, with `input_ids` and `segment_ids`.
        control_ids: Tokens that the teacher is not asked for.

    Returns:
        For each cache its `cosine` with the gradient from the teacher itself, and its `error`: the length of the
        difference of the two over that one's.
    """
    asked, answering = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (student, teacher))
    parameters, generator = list(asked.parameters()), torch.Generator().manual_seed(0)
    sums: dict[str, Tensor] = {}
    for row in rows:
        ids, segments = torch.tensor(row["input_ids"]), torch.tensor(row["segment_ids"])
        at = (segments[1:] == Segment.ASSISTANT) & ~torch.isin(ids[1:], torch.tensor(control_ids))
        hidden_MD = asked.model(ids[None]).last_hidden_state[0, :-1][at]
        with torch.no_grad():
            said_MD = answering.model(ids[None]).last_hidden_state[0, :-1][at]
            chunks = list(log_probabilities(said_MD, answering.lm_head.weight))
        online = {"teacher_hidden_MD": said_MD, "teacher_head_VD": answering.lm_head.weight}
        ways: dict[str, dict[str, Any]] = {ONLINE: online}
        ways |= {name: {"sparse_teacher": sparse} for name, sparse in kept(torch.cat(chunks), generator).items()}
        for name, teaching in ways.items():
            out = fused_ce_kl(hidden_MD, asked.lm_head.weight, ids[1:][at], **teaching, ce_scale=0.0, kl_scale=1.0)
            own = torch.autograd.grad(out.loss, parameters, retain_graph=True)
            flat = torch.cat([gradient.flatten() for gradient in own]).double()
            sums[name] = sums[name] + flat if name in sums else flat
    true = sums.pop(ONLINE)
    return {
        name: {
            "error": float((found - true).norm() / true.norm()),
            "cosine": float(torch.cosine_similarity(found, true, 0)),
        }
        for name, found in sums.items()
    }


# ---------------------------------------------------------------------- the table

MEASURES = (
    Measure("loss", "loss", "↓"),
    Measure("ce", "CE", "↓"),
    Measure("loss_assistant", "advisory", "↓"),
    Measure("kl", "KL", "↓", 1, 4),
    Measure("agreement", "agree %", "↑", 100, 1),
)
PERCENT = Measure("", "", "", 100, 2)


def with_loss(results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """Results with the held-out value of what each cell was trained on, the teacher's whole distribution in it."""
    found = {name: {seed: dict(one) for seed, one in seeds.items()} for name, seeds in results.items()}
    for name in found.keys() & CELLS.keys():
        ce, kl = (OBJECTIVES[CELLS[name].objective][term]["weight"] for term in ("ce", "kl"))
        for one in found[name].values():
            one["loss"] = ce * one["ce"] + kl * one["kl"]
    return found


def excess(results: Results, cell: Cell, key: str) -> Spread | None:
    """By how much a measure is above that of the online teacher, as a share of it, seed by seed."""
    ours, theirs = results.get(cell.name, {}), results.get(cell._replace(teacher=ONLINE).name, {})
    both = [seed for seed in ours if seed in theirs and theirs[seed][key] > NOTHING]
    return Spread.of([ours[seed][key] / theirs[seed][key] - 1 for seed in both]) if both else None


def table(results: Results) -> str:
    """Every measure of every cell, and loss and KL against online."""
    head = ["objective", "teacher", "seeds", *(f"{m.title} {m.better}" for m in MEASURES), "loss, %", "CE, %", "KL, %"]
    rows = []
    for name in results:
        cell = CELLS.get(name, Cell("-", name))
        spreads = [spread(results, name, m.key) for m in MEASURES]
        shown = [one.show(m) if one else "-" for one, m in zip(spreads, MEASURES, strict=True)]
        above = [excess(results, cell, key) if cell.teacher != ONLINE else None for key in ("loss", "ce", "kl")]
        rows.append([*cell, str(len(results[name])), *shown, *(a.show(PERCENT, "+") if a else "-" for a in above)])
    return markdown(head, rows)


LEGEND = (
    "On held-out rows, mean ± sample standard deviation over seeds. loss: what the cell is trained on, with the "
    "teacher itself; CE: cross-entropy of thought and advisory, nats per token; advisory: of it alone; KL to and "
    "agreement with the teacher on the advisory; loss, %, CE, %, KL, %: above online of the same seed. start: the "
    "upcycled student before training."
)


def marks(results: Results) -> list[str]:
    """Lines that hold what is asked against what was found."""
    lines = []
    for name, cell in CELLS.items():
        for key in ("loss", "ce") if cell.teacher in HELD_TO_LIMIT else ():
            if found := excess(results, cell, key):
                about = f"{name}: held-out {key} over online, % (spread {100 * found.deviation:.2f})"
                lines.append(mark(about, 100 * found.mean, 100 * LIMIT))
    return lines


def plot(results: Results, path: Path) -> None:
    """KL above online by teacher: a dot for each seed, a bar at the mean; a panel for each objective."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, len(OBJECTIVES), squeeze=False)[0]
    for panel, objective in zip(panels, OBJECTIVES, strict=True):
        online = results.get(Cell(objective, ONLINE).name, {})
        for x, teacher in enumerate(TEACHERS[1:]):
            ours = results.get(Cell(objective, teacher).name, {})
            above = [one["kl"] - online[seed]["kl"] for seed, one in ours.items() if seed in online]
            panel.plot([x] * len(above), above, "o", color="tab:blue", markersize=4, alpha=0.7)
            panel.hlines(np.mean(above) if above else math.nan, x - 0.3, x + 0.3, color="black")
        panel.axhline(0, color="gray", linewidth=0.8)
        panel.set(title=objective, ylabel="held-out KL above online, nats")
        panel.set_xticks(range(len(TEACHERS) - 1), TEACHERS[1:], rotation=30, ha="right")
        panel.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------- the command


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each student")
    parser.add_argument("--from_teacher", action="store_true", help="students that begin as the teacher")
    parser.add_argument("--cells", help=f"names with semicolons between: {'; '.join(CELLS)}")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print what is finished, train nothing")
    args = parser.parse_args(given)
    args.cells = [name.strip() for name in args.cells.split(";")] if args.cells else list(CELLS)
    if unknown := [name for name in args.cells if name not in CELLS]:
        parser.error(f"--cells names {unknown[0]!r}; there are {'; '.join(CELLS)}.")
    return args


def run(given: Sequence[str] | None = None) -> None:
    """Train what is missing; print the table and draw the plot."""
    args = arguments(given)
    quiet()
    setting = replace(SETTINGS["real"], student=replace(SETTINGS["real"].student, steps=args.steps))
    study = Cached(setting, args.output)
    if args.from_teacher:
        study = FromTeacher(replace(setting, dense=setting.teacher), args.output)
    if not args.table:
        for cell, seed in study.wanted(args.cells, args.seeds):
            study.cell(cell, seed)
    found = study.results(args.cells, args.seeds)
    results = with_loss(found)
    if not results.keys() & CELLS.keys():
        raise SystemExit("error: no cell of this setting is finished; run without --table.")
    parts = [f"{study.about(found)}\n{study.about_cache()}", table(results), LEGEND]
    content: dict[str, Any] = {"setting": asdict(study.setting), "results": found}
    if not args.from_teacher:
        content["gradients"] = gradients = study.gradients()
        errors = [[name, f"{own['error']:.3f}", f"{own['cosine']:.3f}"] for name, own in gradients.items()]
        parts += ["\n".join(marks(results)), markdown(["teacher", "error of KL's gradient", "cosine"], errors)]
    text = "\n\n".join(parts)
    print(f"\n{text}")
    name = "cached_from_teacher" if args.from_teacher else "cached"
    (args.output / f"{name}.md").write_text(text + "\n", "utf-8")
    (args.output / f"{name}.json").write_text(json.dumps(content, indent=1), "utf-8")
    plot(results, args.output / f"{name}.png")


if __name__ == "__main__":
    run()
