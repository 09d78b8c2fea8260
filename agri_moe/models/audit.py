"""Auditing an upcycled checkpoint: is it whole, does it still compute the source, can its router learn?

Shapes: B batch, T sequence, N tokens, D model width, F expert width, E experts, G slices per copy, L layers,
V vocabulary.

Failures make a checkpoint unfit for training; warnings say what will not work as one might hope.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from agri_moe.data.chat import Chat
from agri_moe.models.checkpoint_files import (
    CONFIG,
    DTYPES,
    PROVENANCE,
    StoredTensor,
    checkpoint_folder,
    load_config,
    read_json,
    stored_tensors,
)
from agri_moe.models.text_loss import bits_per_byte
from agri_moe.models.upcycle import Target, UpcycleSpec, count_parameters, expected_tensors, is_moe, moe_rows
from agri_moe.trained import load_pretrained

# Both models are computed in float32 from the stored weights, so at jitter 0 only the order of additions
# differs: 1e-6 of the logits' standard deviation in two layers, 1e-5 in 28 (random weights, 0.6B shape).
TOLERANCE = 1e-3
# down_proj x G is exact in bf16 and f16 when G is a power of two; otherwise every weight is rounded once
# more, by up to 2^-9 of itself in bf16, which 28 layers add up to a few hundredths.
TOLERANCE_ROUNDED = 0.1
PROBE_ROWS, PROBE_TOKENS = 2, 32


@dataclass
class AuditReport:
    """What an audit found; `print` it, or read `ready`.

    Attributes:
        facts: Label and value, in the order of printing.
        warnings: Sentences about what will not work as one might hope.
        failures: Sentences about what makes the checkpoint unfit.
    """

    student: str
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def __str__(self) -> str:
        width = max((len(label) for label in self.facts), default=0)
        lines = [f"audit of {self.student}"]
        lines += [f"  {label:<{width}}  {value}" for label, value in self.facts.items()]
        lines += [f"  warning: {text}" for text in self.warnings]
        lines += [f"  FAILURE: {text}" for text in self.failures]
        lines.append("ready" if self.ready else f"not ready: {_count(len(self.failures), 'failure')}")
        return "\n".join(lines)


def audit(student: str | Path, source: str | Path | None = None, lines: Sequence[str] | None = None) -> AuditReport:
    """Check an upcycled checkpoint.

    Args:
        student: Folder or Hugging Face name of a Qwen3-MoE or Mixtral checkpoint in safetensors.
        source: The dense checkpoint that it came from; by default the one that `upcycle.json` names, if it is
            there.
        lines: Text on which student and source are compared in bits per byte, each in its own tokens.

    Returns:
        The report. It fails on names, shapes, dtypes, non-finite values, and, where the checkpoint was
        upcycled without jitter and drop, on logits that differ from the source.

    Raises:
        ValueError: When `student` or `source` is no checkpoint, or `student` no mixture of a known family.
    """
    folder = checkpoint_folder(student)
    config = load_config(folder, "student")
    if not is_moe(config) or config.model_type not in moe_rows():
        raise ValueError(f"{folder} holds a {config.model_type} model: audit reads {' and '.join(moe_rows())}.")
    origin = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    spec = UpcycleSpec(**origin["spec"]) if "spec" in origin else None
    dense = _find_source(source, origin)
    report = AuditReport(str(student))
    _describe(report, config, origin.get("spec", {}))
    try:
        tensors = stored_tensors(folder)
    except ValueError as error:
        report.failures.append(str(error))
        return report
    expected = expected_tensors(config)
    sound = _check_names(report, config, expected, tensors, origin.get("dtypes", []))
    identical = _check_values(report, expected, sound, spec.granularity if spec else 1)
    if report.failures:
        report.facts["logits"] = "not computed: the weights failed"
        return report
    # Of the tokens that the source knows: rows of new ones, if there are any, come after all others.
    known = min(map(int, origin.get("new_rows", ())), default=config.vocab_size)
    _check_logits(report, folder, config, dense, _tolerance(config, spec, identical), known)
    if dense is None and origin:
        report.warnings.append(f"the source {origin.get('source')} is not there: logits were not compared; give it.")
    if lines is not None:
        for name, model in (("student", folder), ("source", dense)):
            if model is not None:
                bits = bits_per_byte(_load(model), Chat.load(str(model)), lines)
                report.facts[f"text, {name}"] = f"{bits:.4f} bits per byte"
    return report


def _find_source(source: str | Path | None, origin: Mapping[str, Any]) -> Path | None:
    if source is not None:
        folder = checkpoint_folder(source)
        if is_moe(load_config(folder, "source")):
            raise ValueError(f"{source} is a mixture of experts: source is the dense model it came from.")
        return folder
    # A hub name in upcycle.json is not fetched: an audit that was not asked to should not download gigabytes.
    recorded = Path(str(origin.get("source", "")))
    return recorded if origin and (recorded / CONFIG).is_file() else None


def _describe(report: AuditReport, config: PreTrainedConfig, spec: Mapping[str, Any]) -> None:
    total, active = count_parameters(config)
    report.facts["model"] = config.architectures[0] if config.architectures else config.model_type
    report.facts["layers"] = str(config.num_hidden_layers)
    report.facts["experts"] = f"{config.num_local_experts}, {config.num_experts_per_tok} per token"
    report.facts["parameters"] = f"{total:,} in all, {active:,} active per token"
    if spec:
        report.facts["upcycled with"] = ", ".join(f"{key} {value}" for key, value in spec.items())
    if config.model_type == "qwen3_moe" and not config.norm_topk_prob:
        report.warnings.append(
            "norm_topk_prob is false: the weights of the chosen experts do not add up to 1, so copies of an "
            "FFN do not give its output; set it to true in config.json."
        )


# ---- the stored weights


def _check_names(
    report: AuditReport,
    config: PreTrainedConfig,
    expected: Mapping[str, Target],
    tensors: Mapping[str, StoredTensor],
    dtypes: list[str],
) -> dict[str, StoredTensor]:
    """Compare names, shapes and dtypes with the stock model; return the tensors that can be read."""
    counts = Counter(tensor.dtype for tensor in tensors.values()).most_common()
    report.facts["dtype"] = ", ".join(f"{dtype} ({_count(count, 'tensor')})" for dtype, count in counts)
    allowed = {name for name, dtype in DTYPES.items() if dtype == config.dtype} | set(dtypes) or {counts[0][0]}
    extra = tensors.keys() - expected.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    _fail(report, "missing", "is missing", expected.keys() - tensors.keys())
    _fail(report, "unexpected", f"is no tensor of {config.model_type}", extra)
    sound: dict[str, StoredTensor] = {}
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        shape = expected[name].shape
        if tensor.dtype not in allowed or tensor.dtype not in DTYPES:
            wrong[tensor.dtype].append(name)
        if tensor.shape != shape:
            report.failures.append(f"{name} has shape {list(tensor.shape)}: the config asks for {list(shape)}.")
        elif tensor.dtype in DTYPES:
            sound[name] = tensor
    for dtype, names in wrong.items():
        _fail(report, dtype, f"is stored as {dtype}: the config says {', '.join(sorted(allowed))}", names)
    return sound


def _fail(report: AuditReport, kind: str, what: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
        report.failures.append(f"{kind}: {listed[0]}{more} {what}.")


def _check_values(
    report: AuditReport, expected: Mapping[str, Target], sound: Mapping[str, StoredTensor], granularity: int
) -> bool:
    """Read every weight once: non-finite values, twins among the experts, idle routers, distances.

    Returns:
        Whether all copies of every FFN are identical.
    """
    layers: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, target in expected.items():
        if target.expert >= 0:
            layers[target.layer][target.part].append(name)
    compared: dict[int, Experts] = {}
    tied: list[int] = []
    total = sum(tensor.size for tensor in sound.values())
    with tqdm(total=total, desc="audit weights", unit="B", unit_scale=True) as progress:

        def read(name: str) -> Tensor:
            tensor = sound[name].read()
            _check_finite(report, name, tensor)
            progress.update(sound[name].size)
            return tensor

        for name, target in expected.items():
            if name in sound and target.expert < 0:
                weight = read(name)
                if target.part == "router" and _router_is_tied(weight, granularity):
                    tied.append(target.layer)
        for layer, parts in layers.items():
            names = [name for part in parts.values() for name in part]
            if sound.keys() >= set(names):
                compared[layer] = _compare_experts(list(parts.values()), read, granularity)
            else:
                for name in filter(sound.__contains__, names):
                    read(name)
    _describe_symmetry(report, compared, tied, granularity)
    return bool(compared) and all(experts.distinct == 1 for experts in compared.values())


def _describe_symmetry(report: AuditReport, compared: Mapping[int, Experts], tied: list[int], granularity: int) -> None:
    twins: dict[str, list[int]] = defaultdict(list)
    for layer, experts in compared.items():
        if experts.distinct < experts.copies:
            twins[_describe_twins(experts, granularity)].append(layer)
    report.warnings += [f"{_layers(where)}: {text}" for text, where in sorted(twins.items())]
    if tied:
        report.warnings.append(
            f"{_layers(sorted(tied))}: the router's rows are equal: every token ties, the same experts are "
            "chosen for all and the others stay idle; set router_std above 0."
        )
    if distances := [experts.distance for experts in compared.values()]:
        low, mean, high = min(distances), sum(distances) / len(distances), max(distances)
        report.facts["experts apart"] = (
            f"min {low:.4g}, mean {mean:.4g}, max {high:.4g} of a weight's norm, over layers"
        )


def _check_finite(report: AuditReport, name: str, tensor: Tensor) -> None:
    # One pass and no mask: the extremes are NaN or infinite exactly when a value is.
    low, high = (value.item() for value in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int((~torch.isfinite(tensor)).sum())
        report.failures.append(f"{name} holds {_count(count, 'value')} not finite (NaN or infinite).")


def _router_is_tied(weight_ED: Tensor, granularity: int) -> bool:
    rows = weight_ED[::granularity]  # slices of one copy share a row on purpose
    return len(rows) > 1 and bool((rows == rows[0]).all())


class Experts(NamedTuple):
    """How the experts of one layer differ."""

    distance: float  # root mean square distance of two experts over their norm: sqrt 2 times the jitter
    distinct: int
    copies: int


def _compare_experts(names: list[list[str]], read: Callable[[str], Tensor], granularity: int) -> Experts:
    """Compare slice by slice (the slices of one FFN differ by nature): expert e is slice e % G of copy e // G.

    Args:
        names: For gate, up and down, the names of all experts' tensors.
        read: Gives the tensor of a name.
        granularity: Slices per copy of the FFN.
    """
    copies = len(names[0]) // granularity
    twins: list[list[int]] = [[] for _ in range(copies)]  # per copy and tensor: the first copy that equals it
    spread = norm = 0.0
    for part in names:
        for g in range(granularity):
            weights = [read(name) for name in part[g::granularity]]
            mean = torch.zeros(weights[0].shape)
            for weight in weights:
                mean += weight
            mean /= copies
            for copy, weight in enumerate(weights):
                same = (first for first in range(copy) if torch.equal(weights[first], weight))
                twins[copy].append(next(same, copy))
                spread += float(torch.linalg.vector_norm(weight.float() - mean)) ** 2
                norm += float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
    # The mean over pairs of |a - b|^2 is 2 / (copies - 1) times the sum over experts of |a - mean|^2.
    distance = math.sqrt(2 * spread / (copies - 1) / (norm / copies)) if copies > 1 and norm > 0 else 0.0
    return Experts(distance, len({tuple(firsts) for firsts in twins}), copies)


def _describe_twins(experts: Experts, granularity: int) -> str:
    _, distinct, copies = experts
    what = "experts" if granularity == 1 else "copies of the FFN"
    remedy = "use jitter, drop_ratio or a balance term."
    if distinct == 1:
        return f"all {copies} {what} are identical: the router gets no gradient from the language-model loss; {remedy}"
    return (
        f"only {distinct} of {copies} {what} are distinct: among identical ones the router gets no gradient "
        f"from the language-model loss; {remedy}"
    )


# ---- logits


def _tolerance(config: PreTrainedConfig, spec: UpcycleSpec | None, identical: bool) -> float | None:
    """How far the logits may be from the source's, over their standard deviation; None where they must differ."""
    # Without upcycle.json, identical experts say the same: they are copies of one FFN.
    exact = spec.jitter == 0 and spec.drop_ratio == 0 if spec else identical
    if not exact:
        return None
    power_of_two = spec is None or spec.granularity.bit_count() == 1
    return TOLERANCE if power_of_two or config.dtype == torch.float32 else TOLERANCE_ROUNDED


def _check_logits(
    report: AuditReport,
    folder: Path,
    config: PreTrainedConfig,
    dense: Path | None,
    tolerance: float | None,
    vocabulary: int,
) -> None:
    """Run the student, and the source if there is one, on seeded random ids below `vocabulary`, one at a time."""
    if dense is not None:
        vocabulary = min(vocabulary, load_config(dense, "source").vocab_size)
    ids_BT = torch.randint(vocabulary, (PROBE_ROWS, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    logits_NV, routes = _run(folder, ids_BT)
    if not bool(torch.isfinite(logits_NV).all()):
        report.failures.append("the logits on random token ids are not all finite.")
        return
    idle = {layer: _idle(router_NE, config.num_experts_per_tok) for layer, router_NE in enumerate(routes)}
    if any(idle.values()):
        report.warnings.append(
            f"{_layers([layer for layer, experts in idle.items() if experts])}: "
            f"{_count(sum(map(len, idle.values())), 'expert')} chosen by none of {ids_BT.numel()} random "
            "tokens: they may stay idle; watch the router's balance in training."
        )
    if dense is not None:
        source_NV, _ = _run(dense, ids_BT)
        _compare_logits(report, logits_NV[:, :vocabulary], source_NV[:, :vocabulary], tolerance)


def _compare_logits(report: AuditReport, logits_NV: Tensor, source_NV: Tensor, tolerance: float | None) -> None:
    largest = float((logits_NV - source_NV).abs().max())
    relative = largest / max(float(source_NV.std()), 1e-30)
    agree = float((logits_NV.argmax(-1) == source_NV.argmax(-1)).float().mean())
    report.facts["logits"] = (
        f"largest difference from the source {largest:.3g} ({relative:.2g} of their standard deviation), "
        f"KL {_kl(source_NV, logits_NV):.3g} nats, same first choice {agree:.1%}"
    )
    if tolerance is not None and not relative <= tolerance:
        report.failures.append(
            f"the logits differ from the source by {relative:.2g} of their standard deviation: with neither "
            f"jitter nor drop they should agree within {tolerance:g}."
        )


def _run(folder: Path, ids_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [N, V] of a checkpoint in float32 on the CPU, and each layer's router logits [N, E]."""
    model = _load(folder)
    routing = {"output_router_logits": True} if is_moe(model.config) else {}
    with torch.inference_mode():
        output = model(input_ids=ids_BT, use_cache=False, **routing)
    return output.logits.float().flatten(0, 1), list(getattr(output, "router_logits", None) or [])


def _load(folder: Path) -> PreTrainedModel:
    model = load_pretrained(folder, dtype="auto").eval()
    _compute_in_float32(model)
    return model


def _compute_in_float32(model: PreTrainedModel) -> None:
    """Compute in float32 whatever the stored dtype, with only one layer's weights in float32 at a time.

    In bf16 the weights of the chosen experts add up to 1 within 2^-8 only: rounding would hide faults.
    """
    stored: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, _: Any, __: Any) -> None:
        for parameter in module.parameters():
            parameter.data = stored.pop(parameter)

    backbone = model.base_model
    for unit in (backbone.embed_tokens, *backbone.layers, backbone.norm, model.get_output_embeddings()):
        unit.register_forward_pre_hook(widen)
        unit.register_forward_hook(restore)


def _idle(router_NE: Tensor, top_k: int) -> list[int]:
    chosen = set(router_NE.topk(top_k, dim=-1).indices.flatten().tolist())
    return [expert for expert in range(router_NE.shape[-1]) if expert not in chosen]


def _kl(source_NV: Tensor, student_NV: Tensor) -> float:
    """Mean over tokens of KL(source || student) in nats, in float64, row by row."""
    total = 0.0
    for source_V, student_V in zip(source_NV, student_NV, strict=True):
        source_log, student_log = source_V.double().log_softmax(-1), student_V.double().log_softmax(-1)
        total += float((source_log.exp() * (source_log - student_log)).sum())
    return total / len(source_NV)


# ---- words


def _layers(layers: list[int]) -> str:
    """`layer 3`, or `layers 0-27`, or `layers 0, 2-5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join("-".join(map(str, run)) for run in runs)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
