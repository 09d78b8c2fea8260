"""The main job on embedded data, offline: a teacher's knowledge moves into a sparse student.

    make demo

Each step is an ordinary command, printed before it runs. What it writes lies in demo_output/. The rows come from a
small grammar of Hindi crop advisory: demonstration data, not advice.
"""

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from agri_moe.cli import main
from agri_moe.data.chat import render_scenario
from agri_moe.data.synthetic import NOTICE, score
from agri_moe.models.base import parameter_counts

OUTPUT = Path("demo_output")
VALIDATION = OUTPUT / "corpus" / "validation.parquet"
NAMES = ("teacher", "dense", "upcycled", "control", "distilled")


class Result(NamedTuple):
    """One line of the table."""

    name: str
    metrics: dict[str, float]
    diagnosis: np.ndarray[Any, Any]  # right or not, per held-out row
    action: np.ndarray[Any, Any]
    total: int
    active: int


def step(title: str, *args: str) -> Any:
    """Say what comes, show the command, run it."""
    print(f"\n=== {title}\n$ python main.py {' '.join(args)}", flush=True)
    return main(args)


def train(name: str, title: str) -> Path:
    """Train one model from its config and export it as a Hugging Face folder; the run's folder."""
    cli = step(title, "fit", "--config", f"configs/demo/{name}.yaml")
    step(
        f"Export it as {name}",
        "export",
        "--run_root",
        str(OUTPUT),
        "--output",
        str(OUTPUT / name),
        "--dtype",
        "float32",
    )
    return cli.run.folder


def measure(name: str) -> Result:
    """Score a model's distribution against rows and teacher, and its written answers against the ground truth."""
    folder, answers = OUTPUT / name, OUTPUT / f"answers_{name}.parquet"
    cli = step(
        f"Validate {name}",
        *("validate", "--config", "configs/demo/distilled.yaml", "--ckpt_path", "source"),
        *(f"--model.student={{source: {folder}, upcycle: null}}", "--trainer.callbacks=[]"),
    )
    step(
        f"Let {name} answer",
        "generate",
        "--model",
        str(folder),
        "--input",
        str(VALIDATION),
        "--output",
        str(answers),
        "--max_new_tokens",
        "160",
        "--batch_size",
        "120",
    )
    rows = pq.read_table(answers).to_pylist()
    scores = [score(row["generated_advisory"], row) for row in rows]
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    total, active, _ = parameter_counts(cli.model.model)
    right = np.array([s.diagnosis for s in scores]), np.array([s.action for s in scores])
    return Result(name, metrics, *right, total, active)


def paired_interval(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> tuple[float, float]:
    """95% interval of mean(a) - mean(b) in points, by a paired bootstrap over rows."""
    difference = a.astype(float) - b.astype(float)
    draws = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return 100 * low, 100 * high


def report(results: list[Result]) -> None:
    """Print one table, and what it says."""
    head = (
        "model",
        "thought",
        "advisory",
        "diagnosis",
        "action",
        "KL",
        "agree",
        "entropy",
        "balance",
        "total",
        "active",
    )
    print("\n" + "  ".join(f"{h:>9}" for h in head))
    for r in results:
        m = r.metrics
        cells = [
            f"{m['val/loss_thought']:.3f}",
            f"{m['val/loss_assistant']:.3f}",
            f"{r.diagnosis.mean():.1%}",
            f"{r.action.mean():.1%}",
            f"{m['val/kl']:.4f}",
            f"{m['val/agreement']:.1%}",
            f"{m['val/router_entropy']:.3f}" if "val/router_entropy" in m else "-",
            f"{m['val/balance_score']:.3f}" if "val/balance_score" in m else "-",
            f"{r.total / 1e6:.2f}M",
            f"{r.active / 1e6:.2f}M",
        ]
        print("  ".join(f"{c:>9}" for c in [r.name, *cells]))
    print(
        f"\nOn {len(results[0].diagnosis)} held-out rows. thought, advisory: loss in nats per token; KL to and "
        "agreement with the teacher on the advisory; entropy and balance: 1 is undecided, 1 is even."
    )
    by_name = {r.name: r for r in results}
    distilled, before, control = (
        by_name["distilled"].diagnosis,
        by_name["upcycled"].diagnosis,
        by_name["control"].diagnosis,
    )
    for what, other in (("before distillation", before), ("the control without a teacher", control)):
        low, high = paired_interval(distilled, other)
        gap = 100 * (distilled.mean() - other.mean())
        print(f"Right diagnoses, distilled against {what}: {gap:+.1f} points (95% interval {low:+.1f} to {high:+.1f}).")


def show_answers(count: int = 5) -> None:
    """Print some scenarios with the distilled student's answers."""
    for row in pq.read_table(OUTPUT / "answers_distilled.parquet").to_pylist()[:count]:
        scenario = render_scenario(row["scenario"]).replace("\n", "; ")
        print(f"\nस्थिति: {scenario}\nविचार: {row['generated_thought']}\nसलाह: {row['generated_advisory']}")


def write_reports(distilled: Path, control: Path) -> None:
    """A page about the distillation, with its experts by crop, and one that compares it with the control."""
    step(
        "Compare layers and experts",
        *("similarity", "--source", str(OUTPUT / "distilled"), "--target", str(OUTPUT / "teacher")),
        *("--data", str(VALIDATION), "--group_by", "scenario.फसल", "--output", str(distilled / "similarity")),
    )
    checkpoint = max((distilled / "checkpoints").glob("*.ckpt"))
    step(
        "Score what it answers",
        *("test", "--config", "configs/demo/distilled.yaml", "--ckpt_path", str(checkpoint)),
        *("--model.max_new_tokens=160", "--data.tokens_per_batch=30720"),  # 120 answers at a time
    )
    step("Write the report", "report", "--run", str(distilled))
    step(
        "Compare it with the control",
        *("report", "--run", str(distilled), "--run", str(control), "--output", str(OUTPUT / "comparison")),
    )


def demo() -> None:
    """Corpus, teacher, dense model, upcycling, distillation, a control without a teacher, and the table."""
    started = time.perf_counter()
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    print(NOTICE)
    step("Write the corpus", "corpus", "--output", str(OUTPUT / "corpus"))
    step("Look at it as the model will", "preview", "--config", "configs/demo/distilled.yaml", "--rows", "1")
    train("teacher", "Train a small teacher")
    train("dense", "Train a smaller dense model, briefly")
    step(
        "Make it sparse",
        "upcycle",
        "--source",
        str(OUTPUT / "dense"),
        "--output",
        str(OUTPUT / "upcycled"),
        "--num_experts",
        "4",
    )
    step("Audit it", "audit", "--student", str(OUTPUT / "upcycled"))
    distilled = train("distilled", "Distil the teacher into it")
    control = train("control", "Train the same student for as many steps without the teacher")
    results = [measure(name) for name in NAMES]
    show_answers()
    write_reports(distilled, control)
    report(results)
    print(f"\nThe whole demo took {(time.perf_counter() - started) / 60:.1f} minutes. Where to look next:")
    print(f"  {distilled}/report/index.html     the run on one page, with pictures; open it in a browser")
    print(f"  {OUTPUT}/comparison/index.html     distilled and control side by side")
    print(f"  tensorboard --logdir {OUTPUT}/lightning_logs     curves, router heat maps, CKA, sample advisories")
    print(f"  python main.py generate --model {OUTPUT}/distilled --scenario '...'")
    print("  configs/demo/distilled.yaml, configs/distill.yaml   change them, point them at your own rows and models")
    print(NOTICE)


if __name__ == "__main__":
    demo()
