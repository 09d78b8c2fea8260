"""What a run's folder tells: numbers, and sentences and warnings about them. Knows nothing of pictures or pages.

Shapes: L layers, E experts.

Nothing here imports torch: a report is read from files.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from agri_moe.runs import Run

Array = np.ndarray[Any, Any]

# Thresholds of the warnings: rules of thumb, chosen so that runs of the demo that learned well are not warned about.
COLLAPSED = 0.5
"""Balance of a layer below which it counts as collapsed: with 8 experts, as if sqrt(8) = 2.8 of them shared all."""
IDLE = 0.1
"""An expert with less than this part of the even share of its layer's assignments counts as idle; 0 is dead."""
UNDECIDED = 0.99
"""Normalised entropy of a router above which it has not learned to choose."""
LITTLE = 0.01
"""Share by which a loss must change to be said to have fallen or risen."""
LEARNED = 0.01
"""Normalised entropy that the routers must have lost to be said to have learned."""
SPIKE = 0.5
"""A training loss counts as a spike if it is half as much again, and half a nat, above the median before it ..."""
SPIKE_WINDOW = 10
"""... of so many entries."""
SPECIALIST = 0.1
"""Share of a topic, above an expert's mean share of all topics, below which it is no specialist."""
PAIRS = 12
"""Student layers up to which a sentence names the teacher layer most like each."""
WORSE = 0.05
"""Validation loss that ends by this share above its lowest value has begun to rise."""


class Curve(NamedTuple):
    """A logged value: optimizer steps, as the logger counts them, and what stood there."""

    steps: list[int]
    values: list[float]

    @property
    def first(self) -> float:
        """The earliest value."""
        return self.values[0]

    @property
    def last(self) -> float:
        """The latest value."""
        return self.values[-1]


class Sample(NamedTuple):
    """One scenario's answers."""

    scenario: str
    thought: str
    advisory: str
    teacher_thought: str | None  # None, as the advisory is, where the teacher was not asked
    teacher_advisory: str | None
    reference: str


class Row(NamedTuple):
    """One metric of the validation table; `before` only where validation ran before the first step."""

    metric: str
    meaning: str
    before: float | None
    after: float


@dataclass(frozen=True)
class Record:
    """Everything that a run has left of what it did, weights apart.

    Attributes:
        run: Its folder.
        config: The resolved config.
        status: run.json.
        curves: Logged scalars by their names; empty if the run did not log to TensorBoard.
        images: Logged pictures by their names, PNG, first one first.
        seconds: From the first to the last entry of each process that trained; None without TensorBoard's files.
        cka: Step -> `cka` [student layers, teacher layers], as CKAMonitor left them.
        routing: Step -> `load` [L, E], `normalized_entropy` and `balance` [L], and what it says of groups of rows, as
            RouterMonitor left them.
        attention: Step -> `share` [L], as AttentionMonitor left them.
        samples: Step -> answers, as SampleAdvisories left them.
        similarity: What `similarity` wrote into the run's folder; empty if it did not.
    """

    run: Run
    config: dict[str, Any]
    status: dict[str, Any]
    curves: dict[str, Curve]
    images: dict[str, list[bytes]]
    seconds: float | None
    cka: dict[int, dict[str, Array]]
    routing: dict[int, dict[str, Array]]
    attention: dict[int, dict[str, Array]]
    samples: dict[int, list[Sample]]
    similarity: dict[str, Array]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.run.folder.resolve().name

    def setting(self, key: str) -> Any:
        """A value of the config by its dotted key, classes looked through; None where it stands nowhere."""
        value: Any = self.config
        for part in key.split("."):
            if isinstance(value, Mapping) and "init_args" in value:
                value = value["init_args"]
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


# ---------------------------------------------------------------------- reading


def read_record(folder: Path) -> Record:
    """Read a run's folder.

    Raises:
        ValueError: If it is none.
    """
    import yaml

    run = Run(folder)
    if not run.config.is_file():
        raise ValueError(f"--run {folder} is no run's folder: name one that holds config.yaml, as fit leaves it.")
    curves, images, seconds = _read_events(folder)
    similarity = folder / "similarity" / "similarity.npz"
    return Record(
        run=run,
        config=yaml.safe_load(run.config.read_text("utf-8")),
        status=run.read(),
        curves=curves,
        images=images,
        seconds=seconds,
        cka=_snapshots(folder / "cka"),
        routing=_routed(_snapshots(folder / "routing")),
        attention=_snapshots(folder / "attention"),
        samples={_step(p): parse_samples(p) for p in sorted((folder / "samples").glob("step=*.md"))},
        similarity=dict(np.load(similarity)) if similarity.exists() else {},
    )


def _read_events(folder: Path) -> tuple[dict[str, Curve], dict[str, list[bytes]], float | None]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return {}, {}, None
    seconds = 0.0
    for file in files:
        times = [event.wall_time for event in EventFileLoader(str(file)).Load()]
        seconds += max(times) - min(times)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        entries = events.Scalars(tag)
        curves[tag] = Curve([e.step for e in entries], [e.value for e in entries])
    images = {tag: [e.encoded_image_string for e in events.Images(tag)] for tag in events.Tags()["images"]}
    return curves, images, seconds


def _snapshots(folder: Path) -> dict[int, dict[str, Array]]:
    return {_step(path): dict(np.load(path)) for path in sorted(folder.glob("step=*.npz"))}


def _routed(by_step: dict[int, dict[str, Array]]) -> dict[int, dict[str, Array]]:
    """Balance and entropy that are NaN, not 0, for layers through which no token went: only some are in training."""
    for arrays in by_step.values():
        unseen = ~np.isfinite(arrays["load"]).all(1)
        for name in ("balance", "normalized_entropy"):
            arrays[name][unseen] = np.nan
    return by_step


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def parse_samples(path: Path) -> list[Sample]:
    """The answers in a file of `SampleAdvisories`.

    Raises:
        ValueError: If it is none.
    """
    answer = r"\*\*विचार\*\* (.*?)\n\n\*\*सलाह\*\* (.*?)\n\n"
    layout = re.compile(
        rf"\*\*स्थिति\*\* (.*?)\n\n{answer}(?:\*\*शिक्षक \(teacher\)\*\* {answer})?\*\*संदर्भ \(reference\)\*\* (.*)",
        re.DOTALL,
    )
    found = []
    for block in re.split(r"\n---\n\n(?=\*\*स्थिति\*\* )", path.read_text("utf-8")):  # models draw lines too
        match = layout.fullmatch(block.strip())
        if match is None:
            raise ValueError(f"{path} is no file that SampleAdvisories wrote; take it out of the run's folder.")
        found.append(Sample(*(text and text.strip() for text in match.groups())))
    return found


def done(name: str, step: int) -> int:
    """Optimizer steps done at an entry of the logger, which counts from 0; validation at 0 is before the first."""
    return 0 if step == 0 and name.startswith("val/") else step + 1


# ---------------------------------------------------------------------- facts


def introduction(record: Record) -> str:
    """What this is about, for someone who has never seen a run."""
    experts, chosen = _experts(record)
    if str(record.config["model"].get("class_path")).endswith("LayerwiseModule"):
        return (
            f"In each layer of a frozen dense model, a mixture of {experts} experts, {chosen} of which read a token, "
            "was trained to give what the layer's feed-forward network gives."
        )
    text = "A language model"
    if experts:
        text += f" that is a mixture of {experts} experts in each layer, {chosen} of which read a token,"
    text += " was trained"
    if record.setting("model.teacher"):
        text += " to answer as the rows do and as a frozen, larger model, the teacher, would"
    if str(record.config["data"].get("class_path")).endswith("ChatDataModule"):
        text += ". It reads a scenario (स्थिति), writes down a thought (विचार) and then an advisory (सलाह)"
    return f"{text}."


def facts(record: Record) -> list[tuple[str, str]]:
    """What was trained, on what, where and for how long: names and values, what is not known left out."""
    status, ranks = record.status, record.status.get("ranks", 1)
    planned = record.setting("trainer.max_steps")
    steps = status.get("steps") or max((done(n, c.steps[-1]) for n, c in record.curves.items()), default=0)
    lines = [
        ("Model", _model(record)),
        ("Parameters", _parameters(status.get("parameters"))),
        ("Teacher", _teacher(record)),
        ("Objective", objective(record)),
        ("Training rows", _listed(record.setting("data.train"))),
        ("Validation rows", _listed(record.setting("data.validation"))),
        ("Steps", f"{steps:,}" + (f" of {planned:,} planned" if planned and planned > 0 else "")),
        ("State", str(status.get("status", ""))),
        ("Learning rate", str(record.setting("model.learning_rate") or "")),
        ("Frozen", _listed(record.setting("model.freeze"))),
        ("Machine", f"{ranks} x {status['device']}" if "device" in status else ""),
        ("Precision", str(record.setting("trainer.precision") or "32-true")),
        ("Time and cost", _cost(record, ranks)),
    ]
    return [(name, value) for name, value in lines if value]


def _model(record: Record) -> str:
    keys = ("model.student.source", "model.network.source", "model.source")
    text = str(next((source for key in keys if (source := record.setting(key))), "random weights"))
    experts, chosen = _experts(record)
    return f"{text}; {experts} experts per layer, {chosen} per token" if experts else text


def _experts(record: Record) -> tuple[int, int]:
    """Experts of a layer, and how many a token visits; 0 of a dense model, or where neither log nor config tells."""
    found = record.status.get("experts") or {}
    experts = found.get("per_layer") or record.setting("model.num_experts") or 0
    return experts, found.get("per_token") or record.setting("model.num_experts_per_tok") or 0


def _parameters(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return ""
    return f"{counts['total']:,} in all, {counts['active']:,} active for one token, {counts['trained']:,} trained"


def _teacher(record: Record) -> str:
    teacher = record.setting("model.teacher")
    if not teacher:
        return "none"
    if teacher.get("cache"):
        return f"its answers on disk, {teacher['cache']}"
    return f"{teacher['source']}, frozen, reads the {teacher.get('view') or 'same'} view, {teacher.get('dtype')}"


def objective(record: Record) -> str:
    """The terms that weigh something."""
    terms: dict[str, Any] = record.setting("model.objective") or {}
    nested = {f"anchor.{name}": term for name, term in (terms.get("anchor") or {}).items()}
    weights = {
        name: term["weight"]
        for name, term in (terms | nested).items()
        if isinstance(term, Mapping) and term.get("weight")
    }
    return " + ".join(f"{weight} {name}" for name, weight in weights.items())


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _cost(record: Record, ranks: int) -> str:
    if record.seconds is None:
        return ""
    hours = record.seconds / 3600
    text = f"{hours:.2f} h" if hours >= 1 else f"{record.seconds / 60:.1f} min"
    text += f" with validation, {hours * ranks:.2f} device-hours"
    rate = record.curves.get("throughput/tokens_per_second")
    return text + (f"; {median(rate.values):,.0f} tokens per second while training" if rate else "")


# ---------------------------------------------------------------------- validation

METRICS = {
    "ce": "cross-entropy, nats per token",
    "loss_thought": "cross-entropy on the thought",
    "loss_assistant": "cross-entropy on the advisory",
    "kl": "divergence from the teacher, nats per token",
    "agreement": "share of tokens for which student and teacher put the same first",
    "cka": "1 - CKA with the teacher's layers, mean over the pairs compared",
    "hidden": "distance from the teacher's residual streams",
    "attention": "divergence from the teacher's attention",
    "attention_to_thought": "share of the advisory's attention that is on the thought",
    "diversity": "CKA between the experts of a layer; 1: copies of each other",
    "router_entropy": "1: the routers are undecided; 0: certain",
    "balance_score": "1: all experts get equally much; 0: one gets all",
    "dead_experts": "share of the experts that got no token",
    "balance": "balance loss; 1 when all experts get equally much",
    "router_z": "router z-loss: mean square of the routers' log partition",
    "aligned": "share of the answers that the teacher's view has tokens for",
    "perplexity": "exp of the cross-entropy",
    "perplexity_thought": "the same on the thought",
    "perplexity_assistant": "the same on the advisory",
    "bits_per_byte": "cross-entropy by bytes of text: models with other tokenizers can be compared in it",
    "bits_per_byte_thought": "the same on the thought",
    "bits_per_byte_assistant": "the same on the advisory",
    "balanced_perplexity": "perplexity, times exp(beta (1 - balance_score)), beta being model.balance_beta",
    "group_information": "what an expert tells of the group of a token's row, nats; 0: nothing",
    "mse": "mean square of what the mixtures' outputs differ by from the networks'",
    "relative_error": "norm of the differences over the norm of the networks' outputs",
    "cosine": "mean cosine of the two outputs; 1: alike",
    "ce_dense": "cross-entropy of the dense model",
    "perplexity_dense": "its perplexity",
}


def evaluation(record: Record) -> list[Row]:
    """The validation table: as the run began, where it was validated then, and as it ended."""
    rows = []
    for name, curve in record.curves.items():
        if name.startswith("val/") and "/layer_" not in name:
            before = curve.first if curve.steps[0] == 0 and len(curve.steps) > 1 else None
            metric = name.removeprefix("val/")
            meaning = "cross-entropy on this group of rows" if metric.startswith("ce/") else METRICS.get(metric, "")
            rows.append(Row(metric, meaning, before, curve.last))
    order = list(METRICS)
    return sorted(rows, key=lambda row: order.index(row.metric) if row.metric in order else len(order))


class Tested(NamedTuple):
    """What `test` wrote into a run's folder."""

    checkpoint: str  # file name
    rows: list[tuple[str, str, str, str]]  # metric, value, 95% interval or nothing, what it is taken over


def tested(record: Record) -> Tested | None:
    """Numbers of the newest `test` of a run, those of single layers left out; None if there was none."""
    path = record.run.folder / "evaluation.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8"))
    rows = [
        (
            name,
            f"{measure['value']:.4g}",
            " to ".join(f"{end:.4g}" for end in measure.get("interval_95", ())),
            f"{measure['n']:,} {measure['of']}",
        )
        for name, measure in found["metrics"].items()
        if "/layer_" not in name
    ]
    return Tested(Path(found["checkpoint"]).name, rows)


# ---------------------------------------------------------------------- sentences


def say_losses(record: Record) -> list[str]:
    """What became of the losses."""
    said = []
    for name, what in (("val/ce", "Cross-entropy on the validation rows"), ("val/kl", "Divergence from the teacher")):
        if (curve := record.curves.get(name)) is None:
            continue
        if len(curve.values) == 1:
            said.append(f"{what} is {curve.last:.4g} nats per token; it was measured once.")
            continue
        lowest = int(np.argmin(curve.values))
        first, last, least = (done(name, curve.steps[i]) for i in (0, -1, lowest))
        if abs(curve.last - curve.first) < LITTLE * abs(curve.first):
            said.append(
                f"{what} hardly changed: {curve.first:.4g} nats per token at step {first:,}, {curve.last:.4g} at step "
                f"{last:,}."
            )
            continue
        verb = "fell" if curve.last < curve.first else "rose"
        said.append(
            f"{what} {verb} from {curve.first:.4g} nats per token (step {first:,}) to {curve.last:.4g} (step {last:,})"
            + ("." if least == last else f"; it was lowest at step {least:,}.")
        )
    if (curve := record.curves.get("val/agreement")) is not None:
        said.append(f"Student and teacher put the same token first at {curve.last:.1%} of the tokens compared.")
    return said


def say_cka(record: Record) -> list[str]:
    """How alike the layers have become."""
    steps = list(record.cka)
    now = record.cka[steps[-1]]["cka"]
    said = []
    if len(steps) > 1:
        before = record.cka[steps[0]]["cka"]
        said.append(
            f"A student layer and the teacher layer most like it had a CKA of {before.max(1).mean():.2f} on the mean "
            f"at step {steps[0]:,}, and have {now.max(1).mean():.2f} at step {steps[-1]:,} (1: the same up to rotation "
            "and scale; 0: unrelated)."
        )
    else:
        said.append(
            f"A student layer and the teacher layer most like it have a CKA of {now.max(1).mean():.2f} on the mean."
        )
    if len(now) <= PAIRS:
        pairs = ", ".join(f"{student} with {teacher}" for student, teacher in enumerate(now.argmax(1).tolist()))
        said.append(f"Most alike are, student layer with teacher layer: {pairs}.")
    return said


def say_routing(record: Record) -> list[str]:
    """How the routers spread the tokens."""
    steps = list(record.routing)
    now = record.routing[steps[-1]]
    load_LE, balance_L = now["load"], now["balance"]
    layer = int(np.nanargmin(balance_L))
    busiest = int(load_LE[layer].argmax())
    said = [
        f"Least even is layer {layer}, with a balance of {balance_L[layer]:.3f}: its busiest expert, number {busiest}, "
        f"takes {load_LE[layer, busiest]:.1%} of the assignments (even would be {1 / load_LE.shape[1]:.1%})."
    ]
    entropy = np.nanmean(now["normalized_entropy"])
    if len(steps) > 1:
        before = np.nanmean(record.routing[steps[0]]["normalized_entropy"])
        said.append(
            f"The routers' entropy went from {before:.3f} to {entropy:.3f} of what total indecision would give: "
            + ("they have learned to tell tokens apart." if before - entropy > LEARNED else "they have hardly changed.")
        )
    return said


def say_attention(record: Record) -> list[str]:
    """How much the advisory looks at the thought."""
    steps = list(record.attention)
    share = record.attention[steps[-1]]["share"]
    if len(steps) == 1:
        return [f"Of the attention of the positions that write the advisory, {share.mean():.1%} is on the thought."]
    before = record.attention[steps[0]]["share"]
    return [
        f"Of the attention of the positions that write the advisory, {before.mean():.1%} was on the thought before "
        f"training and {share.mean():.1%} is now, mean over layers; most in layer {int(share.argmax())} "
        f"({share.max():.1%})."
    ]


def say_experts(similarity: Mapping[str, Array]) -> list[str]:
    """How alike the experts of a layer are."""
    matrices = similarity["experts"]
    means = [_off_diagonal(matrix) for matrix in matrices]
    return [
        f"Two experts of one layer have outputs with a CKA of {np.mean(means):.2f} on the mean (copies have 1); least "
        f"alike are those of layer {int(np.argmin(means))} ({min(means):.2f}), most those of layer "
        f"{int(np.argmax(means))} ({max(means):.2f})."
    ]


def say_topics(similarity: Mapping[str, Array]) -> list[str]:
    """Which expert has made which topic its own."""
    layers = similarity["expert_layers"].tolist()
    return _say_specialist(similarity["load_by_group"], similarity["groups"].tolist(), layers)


def say_groups(by_step: Mapping[int, Mapping[str, Array]]) -> list[str]:
    """Which expert has made which group of the validation rows its own; step -> what `Record.routing` has of groups."""
    steps = list(by_step)
    now, before = by_step[steps[-1]], by_step[steps[0]]
    said = _say_specialist(now["load_by_group"], now["groups"].tolist(), list(range(len(now["load_by_group"]))))
    most = np.log(min(now["load_by_group"].shape[1:]))
    text = f"What an expert tells of the group of a token's row is {now['mutual_information'].mean():.4f} nats"
    if len(steps) > 1:
        text += f", and was {before['mutual_information'].mean():.4f} at step {steps[0]:,}"
    return [*said, f"{text}, mean over layers; {most:.2f} would tell it wholly."]


def _say_specialist(load_LGE: Array, groups: Sequence[str], layers: Sequence[int]) -> list[str]:
    # Against what the expert gets of all topics: a busy expert is no specialist.
    above_LGE = load_LGE - load_LGE.mean(1, keepdims=True)
    layer, group, expert = map(int, np.unravel_index(int(above_LGE.argmax()), above_LGE.shape))
    said = [
        f"Experts of layer {layers[layer]} differ most: expert {expert} gets {load_LGE[layer, group, expert]:.0%} of "
        f"{groups[group]}, and {load_LGE[layer, :, expert].mean():.0%} of a topic on the mean."
    ]
    if above_LGE.max() < SPECIALIST:
        said.append("That is little: the experts hardly tell these topics apart.")
    return said


def _off_diagonal(matrix: Array) -> float:
    experts = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / max(experts * (experts - 1), 1))


# ---------------------------------------------------------------------- warnings


def warnings(record: Record) -> list[str]:
    """What a reader should know before believing the rest; thresholds stand at the top of this file."""
    return [*_ended(record), *_losses(record), *_routers(record)]


def _ended(record: Record) -> list[str]:
    if record.status.get("status") == "finished":
        return []
    return ["The run has not finished: what follows is how it stood when this page was made."]


def _losses(record: Record) -> list[str]:
    said = []
    for name, curve in record.curves.items():
        broken = [step for step, value in zip(*curve, strict=True) if not math.isfinite(value)]
        if name.startswith(("train/", "val/")) and broken:
            said.append(f"{name} is not finite at {len(broken)} entries, first at step {done(name, broken[0]):,}.")
    skipped = record.curves.get("train/skipped_steps")
    if skipped is not None and skipped.last:
        first = next(step for step, value in zip(*skipped, strict=True) if value)
        said.append(
            f"{skipped.last:.0f} steps were left out, the first by step {done('train/skipped_steps', first):,}, "
            "because their loss or gradient was not finite or jumped; the run's output names their rows."
        )
    if (training := record.curves.get("train/ce")) is not None:
        said += [
            f"Loss spike: train/ce jumped to {value:.3g} at step {done('train/ce', step):,}, from a median of "
            f"{usual:.3g} before."
            for step, value, usual in spikes(training)
        ]
    for name in ("val/ce", "val/kl"):
        if (held_out := record.curves.get(name)) is None or len(held_out.values) < 2:
            continue
        at = int(np.argmin(held_out.values))
        if held_out.last > (1 + WORSE) * held_out.values[at]:
            said.append(
                f"{name} ends at {held_out.last:.4g}, above the {held_out.values[at]:.4g} of step "
                f"{done(name, held_out.steps[at]):,}: later training made it worse."
            )
    return said


def spikes(curve: Curve) -> list[tuple[int, float, float]]:
    """Step, value and the median before it, of each value that jumped (see `SPIKE`)."""
    found = []
    for i in range(SPIKE_WINDOW, len(curve.values)):
        usual = median(curve.values[i - SPIKE_WINDOW : i])
        if curve.values[i] - usual > max(SPIKE, SPIKE * usual):
            found.append((curve.steps[i], curve.values[i], usual))
    return found


def _routers(record: Record) -> list[str]:
    if not record.routing:
        return []
    now = record.routing[max(record.routing)]
    load_LE = now["load"]
    even = 1 / load_LE.shape[1]
    said = []
    for layer, balance in enumerate(now["balance"]):
        if balance < COLLAPSED:
            said.append(
                f"Collapsed layer: the balance of layer {layer} is {balance:.2f} (below {COLLAPSED}); raise "
                "model.objective.balance.weight."
            )
    for kind, below_LE in (("Dead", load_LE == 0), ("Idle", (load_LE > 0) & (load_LE < IDLE * even))):
        for layer in np.flatnonzero(below_LE.any(1)).tolist():
            numbers = ", ".join(map(str, np.flatnonzero(below_LE[layer]).tolist()))
            share = "no" if kind == "Dead" else f"less than {IDLE * even:.1%} of the"
            said.append(f"{kind} experts: of layer {layer}, number {numbers} took {share} assignments.")
    undecided = np.flatnonzero(now["normalized_entropy"] > UNDECIDED).tolist()
    if undecided and load_LE.shape[1] > 1:
        said.append(
            f"Undecided routers: in layer{'s' if len(undecided) > 1 else ''} {', '.join(map(str, undecided))} the "
            f"entropy is above {UNDECIDED}; they have not learned to tell tokens apart."
        )
    return said
