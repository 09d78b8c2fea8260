"""What the model's answers to test rows are worth, in numbers: against references, against the truth, as text.

Knows texts only: nothing here imports torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agri_moe.data.synthetic import DIAGNOSES, all_actions, score
from agri_moe.reporting import METRICS
from agri_moe.tools.generate import devanagari_share, loops

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

Row = dict[str, Any]

RESAMPLES = 1000
"""Resamples of the rows behind an interval: what sacrebleu takes by default."""
WORDS = 4
"""Length of the word sequences whose repetition is counted: seq-rep-4 of Welleck et al. 2020 (Neural Text
Generation with Unlikelihood Training), which counts in tokens."""

MEANINGS = METRICS | {
    "chrf": "chrF of advisories against references, 0 to 100",
    "bleu": "BLEU of advisories against references, 0 to 100",
    "diagnosis": "share that name the right diagnosis and no other",
    "action": "share that name the right action and no other",
    "format": "share with a thought, an advisory and an end",
    "has_thought": "share that think first",
    "has_advisory": "share that close the thought and advise",
    "ended": "share that end by themselves",
    "devanagari": "share of an advisory's letters, if it has any text",
    "loops": "share with a line or sentence that comes four times",
    "repeated": f"share of sequences of {WORDS} words that stood before",
    "tokens": "tokens of an answer, thought and end included",
    "tokens_median": "the same, median",
    "tokens_p90": "the same, 90th percentile",
}


class Measure(NamedTuple):
    """One number of an evaluation."""

    value: float
    n: int  # how many of what `of` names it is taken over
    of: str  # rows, tokens, micro-batches
    interval: tuple[float, float] | None = None  # 95%, by a bootstrap over rows, where one was made


@dataclass(frozen=True)
class Evaluation:
    """What a test found.

    Attributes:
        measures: Name -> number.
        rows: The test rows with the model's answers and, under `scores`, what was found of each; none if none were
            written.
        signatures: Of chrF and BLEU: how sacrebleu took them.
    """

    measures: dict[str, Measure]
    rows: list[Row] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)

    @property
    def with_truth(self) -> int:
        """Answered rows that tell the right diagnosis and action."""
        return sum(row["scores"]["diagnosis"] is not None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; the rows are counted."""
        measures = {}
        for name, measure in self.measures.items():
            measures[name] = {"value": measure.value, "n": measure.n, "of": measure.of}
            if measure.interval is not None:
                measures[name]["interval_95"] = list(measure.interval)
        rows = {"answered": len(self.rows), "with_ground_truth": self.with_truth}
        return {"rows": rows, "signatures": self.signatures, "metrics": measures}


def score_answers(rows: Sequence[Row]) -> Evaluation:
    """Score answers.

    Args:
        rows: With the reference as `advisory`, the answer's `generated_thought`, `generated_advisory`, `tokens` and
            `stop_reason` and, of rows of the embedded corpus, the true `diagnosis` and `action`.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scored = [row | {"scores": score_answer(row)} for row in rows]
    answers, references = ([row[name] for row in rows] for name in ("generated_advisory", "advisory"))
    measures, signatures = {}, {}
    # `intl` splits at every script's punctuation, the danda too; the default, 13a, leaves it on the word before it.
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU(tokenize="intl"))):
        measures[name], signatures[name] = overlap(metric, answers, references)
    for name in scored[0]["scores"]:
        values = [float(value) for row in scored if (value := row["scores"][name]) is not None]
        if values:
            measures[name] = mean(values)
    tokens = np.array([row["tokens"] for row in rows])
    for name, quantile in (("tokens_median", 0.5), ("tokens_p90", 0.9)):
        measures[name] = Measure(float(np.quantile(tokens, quantile)), len(rows), "rows")
    return Evaluation(measures, scored, signatures)


def score_answer(row: Mapping[str, Any]) -> dict[str, float | bool | None]:
    """What can be told of one answer, see `MEANINGS`; None where it cannot be told."""
    thought, advisory = row["generated_thought"] or "", row["generated_advisory"]
    told = row.get("diagnosis") in DIAGNOSES and row.get("action") in all_actions()
    right = score(advisory, row) if told else None
    # The advisory begins where the thought is closed: without that there is none.
    parts = {"has_thought": bool(thought.strip()), "has_advisory": bool(advisory.strip())}
    parts["ended"] = row["stop_reason"] == "end"
    return {
        "diagnosis": right.diagnosis if right else None,
        "action": right.action if right else None,
        "format": all(parts.values()),
        **parts,
        "devanagari": devanagari_share(advisory) if advisory.strip() else None,
        "loops": loops(thought) or loops(advisory),
        "repeated": repeated((thought, advisory)),
        "tokens": row["tokens"],
    }


def repeated(texts: Iterable[str]) -> float:
    """Share of the sequences of `WORDS` words in texts that stood earlier in the same text; 0 if there are none."""
    sequences = distinct = 0
    for words in (text.split() for text in texts):
        found = [tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
        sequences += len(found)
        distinct += len(set(found))
    return 1 - distinct / sequences if sequences else 0.0


def mean(values: Sequence[float]) -> Measure:
    """The mean of one value for each row, with the percentiles of its bootstrap unless all are alike."""
    from scipy.stats import bootstrap

    if len(set(values)) < 2:
        return Measure(fmean(values), len(values), "rows")
    drawn = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=np.random.default_rng(0)
    )
    low, high = drawn.confidence_interval
    return Measure(fmean(values), len(values), "rows", (float(low), float(high)))


def overlap(metric: "Metric", answers: Sequence[str], references: Sequence[str]) -> tuple[Measure, str]:
    """A score of sacrebleu's over the whole corpus, one reference each, and its signature."""
    resamples = RESAMPLES if len(answers) > 1 else 1
    found = metric.corpus_score(answers, [references], n_bootstrap=resamples)
    signature = str(metric.get_signature())
    if resamples == 1:
        return Measure(found.score, len(answers), "rows"), signature
    told = json.loads(found.format(width=6, is_json=True, signature=signature))
    # It leaves out a mean of 0, which has all its resamples at 0.
    middle, half = told.get("confidence_mean", 0.0), told.get("confidence_var", 0.0)
    return Measure(found.score, len(answers), "rows", (middle - half, middle + half)), signature


def table(found: Evaluation) -> str:
    """The numbers as lines for a terminal, those of single layers left out."""
    lines = [("metric", "value", "95% interval", "over", "")]
    for name, measure in found.measures.items():
        if "/layer_" not in name:
            interval = "-" if measure.interval is None else " to ".join(f"{end:.4g}" for end in measure.interval)
            over = f"{measure.n:,} {measure.of}"
            lines.append((name, f"{measure.value:.4g}", interval, over, MEANINGS.get(name, "")))
    wide = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        f"{name:<{wide[0]}}  {value:>{wide[1]}}  {interval:>{wide[2]}}  {over:>{wide[3]}}  {meaning}".rstrip()
        for name, value, interval, over, meaning in lines
    ]
    if found.rows:
        without = len(found.rows) - found.with_truth
        if without:
            text.append(
                f"{without:,} of {len(found.rows):,} rows do not tell diagnosis and action; those are left out."
            )
        text += [f"{name}: {signature}" for name, signature in found.signatures.items()]
    return "\n".join(text)
