"""A whole training step on real rows: ours, TRL's GKDTrainer, and a plain step with padding and full logits.

    python benchmarks/step.py [--rows 6] [--micro_rows 2] [--repeats 5] [--profile]

What each of the three does stands in contestants.py. Tokens per second count tokens of rows, not padding. Memory is the
highest resident size of a process of its own, with interpreter, weights and optimizer; `above weights` leaves out what
was there before the first step.

Useful FLOPs of a step, 2 for a multiplication and addition, summed over its micro-batches:

    student  3 x 2 x [tokens x (attention projections + router + top-k experts) + supervised tokens x D V]
    teacher      2 x [tokens x (attention projections + FFN)                    + tokens with KL x D_t V]
    attention    2 x heads x head width x sum of squared row lengths, per layer; 3 x that for the student

that is, heads only where a loss looks, causal attention at half the square, nothing for padding. The share of matrix
throughput is useful FLOPs / seconds over the FLOPs / seconds of `torch.mm` at those very shapes, in turn with the
others (`products`). One large product (2,048 cubed) is shown beside it.
"""

import argparse
import json
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from contestants import CONTESTANTS, GKD, OURS, SUPERVISED, Ours, Setting, installed, parser, setting_of
from measure import Product, Products, Ratio, Step, apart, in_turns, mark, peak_mb, ratio, report, table
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, PreTrainedConfig

from agri_moe.data.packing import count_targets

PRODUCTS = "products"
LARGE = Product(2048, 2048, 2048, 4)

# ---------------------------------------------------------------------- useful FLOPs


def useful_products(setting: Setting) -> list[Product]:
    """The matrix products of a step that nothing could do without, see above; attention's own two are not here."""
    found: list[Product] = []
    for rows in setting.micro_batches:
        tokens = sum(len(row.input_ids) for row in rows)
        control = setting.corpus.control_ids
        counts = [count_targets(row.input_ids.tolist(), row.segment_ids.tolist(), control) for row in rows]
        labels, untaught = np.sum(counts, axis=0)[:, list(SUPERVISED)].sum(1).tolist()
        student, teacher = setting.student, setting.teacher
        body = _attention_products(student, tokens) + _expert_products(student, tokens)
        head = Product(labels, student.hidden_size, student.vocab_size, 1)
        found += [one for product in [*body, head] for one in product.with_gradients()]
        found += _attention_products(teacher, tokens)
        width, inner = teacher.hidden_size, teacher.intermediate_size
        found.append(Product(tokens, width, inner, 2 * teacher.num_hidden_layers))
        found.append(Product(tokens, inner, width, teacher.num_hidden_layers))
        found.append(Product(labels - untaught, width, teacher.vocab_size, 1))
    return found


def _attention_products(config: PreTrainedConfig, tokens: int) -> list[Product]:
    width, layers = config.hidden_size, config.num_hidden_layers
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return [
        Product(tokens, width, queries, layers),
        Product(tokens, width, keys, 2 * layers),
        Product(tokens, queries, width, layers),
    ]


def _expert_products(config: PreTrainedConfig, tokens: int) -> list[Product]:
    """Router and experts, the tokens spread evenly."""
    width, inner, layers = config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers
    experts = config.num_local_experts
    each = max(1, round(tokens * config.num_experts_per_tok / experts))
    return [
        Product(tokens, width, experts, layers),
        Product(each, width, 2 * inner, layers * experts),
        Product(each, inner, width, layers * experts),
    ]


def attention_flops(setting: Setting) -> int:
    """Scores and weighted values under a causal mask, student with its backward pass and teacher."""
    squares = sum(len(row.input_ids) ** 2 for rows in setting.micro_batches for row in rows)

    def forward(config: PreTrainedConfig) -> int:
        return 2 * squares * int(config.num_attention_heads * config.head_dim * config.num_hidden_layers)

    return 3 * forward(setting.student) + forward(setting.teacher)


def useful_flops(setting: Setting) -> int:
    """Of a whole step."""
    return sum(product.flops for product in useful_products(setting)) + attention_flops(setting)


def share(setting: Setting, products: Products, seconds_of_products: list[float], seconds: list[float]) -> Ratio:
    """Useful FLOPs per second over those of the products alone, round by round."""
    whole = useful_flops(setting) / products.flops
    return ratio([whole * alone for alone in seconds_of_products], seconds)


# ---------------------------------------------------------------------- where the time goes

PROFILE = ("part of our step", "ms", "share", "of it products", "dearest operators, ms")
RANGES = ("data", "teacher body", "student forward", "backward", "optimizer")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::_grouped_mm")


def profiled(ours: Ours, top: int = 5) -> tuple[list[list[str]], dict[str, float]]:
    """Rows of a table (see PROFILE) and milliseconds by part of one step."""
    cuda = ours.setting.device == "cuda"
    teacher: Any = ours.module.teacher
    ask = teacher.signal

    def ranged(*arguments: Any) -> Any:
        with record_function("teacher body"):
            return ask(*arguments)

    teacher.signal = ranged
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    ours.step()
    with profile(activities=activities, record_shapes=True) as found:
        ours.step()
    teacher.signal = ask
    widths = ours.setting.student.hidden_size, ours.setting.teacher.hidden_size
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in found.events() or []:
        if event.device_type.name != "CPU":  # a kernel, whose time its operator has too
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent:
            name = "between operators" if event.name in RANGES else event.name
            parts[_part(event, *widths)][name] += spent / 1000
    totals = {part: sum(operators.values()) for part, operators in parts.items()}
    whole = sum(totals.values())
    rows: list[list[str]] = []
    for part, total in sorted(totals.items(), key=lambda item: -item[1]):
        dearest = sorted(parts[part].items(), key=lambda item: -item[1])[:top]
        products = sum(ms for name, ms in parts[part].items() if name in _PRODUCTS)
        names = ", ".join(f"{name} {ms:,.0f}" for name, ms in dearest)
        rows.append([part, f"{total:,.0f}", f"{total / whole:.0%}", f"{products:,.0f}", names])
    return rows, totals


def _part(event: Any, width: int, teacher_width: int) -> str:
    """Which part of the step an operator belongs to, by what it was called from."""
    in_loss, above = False, event
    while above is not None:
        if above.name in RANGES:
            break
        in_loss |= above.name == "_FusedCrossEntropyKL"
        if above.cpu_parent is None and above.name.startswith("autograd::engine"):
            return "backward"  # on CUDA it runs in a thread of its own
        above = above.cpu_parent
    if above is None:
        return "other"
    if not in_loss or above.name != "student forward":
        return str(above.name)
    if event.name not in _PRODUCTS:
        return "loss, passes over the logits"
    inner = {size for shape in event.input_shapes if len(shape) == 2 for size in shape}
    return "teacher head" if teacher_width in inner and width not in inner else "student head and its gradients"


# ---------------------------------------------------------------------- all of it


def about(setting: Setting) -> str:
    """One paragraph on models and rows."""
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(setting.student)
        teacher = sum(p.numel() for p in AutoModelForCausalLM.from_config(setting.teacher).parameters())
    total = sum(p.numel() for p in student.parameters())
    experts = sum(p.numel() for name, p in student.named_parameters() if ".experts." in name)
    active = total - experts + experts * setting.student.num_experts_per_tok // setting.student.num_local_experts
    padded = sum(len(rows) * max(len(row.input_ids) for row in rows) for rows in setting.micro_batches)
    supervised = int(setting.totals().targets[0][list(SUPERVISED)].sum())
    rows = sum(map(len, setting.micro_batches))
    return (
        f"Student {total / 1e6:,.0f}M parameters, {active / 1e6:,.0f}M active; teacher {teacher / 1e6:,.0f}M, "
        f"{teacher / active:.1f} x that; vocabulary {setting.student.vocab_size:,}; "
        f"{'bf16-mixed' if setting.mixed else 'float32'}. {rows} rows in {len(setting.micro_batches)} micro-batches, "
        f"{setting.tokens:,} tokens, {supervised:,} of them supervised, {padded:,} when padded. "
        f"{useful_flops(setting) / 1e9:,.0f} GFLOP useful.\n"
    )


def memory(setting: Setting, name: str) -> dict[str, float]:
    """Peak resident MB of this process, and the resident MB before its first step."""
    contestant = CONTESTANTS[name](setting, setting.new_teacher())
    return peak_mb(contestant.step)


def run(arguments: argparse.Namespace) -> None:
    """Measure everything and report it."""
    setting = setting_of(arguments)
    names = installed()
    peaks = {name: apart("--memory", name) for name in names}
    teacher = setting.new_teacher()
    made = {name: CONTESTANTS[name](setting, teacher) for name in names}
    products, large = Products(useful_products(setting)), Products([LARGE])
    steps: dict[str, Step] = {PRODUCTS: products, "large": large}
    seconds = in_turns(steps | {name: one.step for name, one in made.items()}, arguments.repeats)
    alone = seconds.pop(PRODUCTS)
    rates = {
        PRODUCTS: products.flops / statistics.median(alone),
        "large product": large.flops / statistics.median(seconds.pop("large")),
    }
    found = {
        name: {
            "seconds": values,
            "tokens_per_second": setting.tokens / statistics.median(values),
            "to_ours": ratio(values, seconds[OURS]),
            "share": share(setting, products, alone, values),
            "memory": peaks[name],
        }
        for name, values in seconds.items()
    }
    text = [about(setting), lines(found), ""]
    text += [f"{name}: {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items()]
    text += ["", *marks(found)]
    result = {"arguments": vars(arguments), "about": about(setting), "useful_flops": useful_flops(setting)}
    result |= {"flops_per_second": rates, "contestants": found}
    if arguments.profile:
        parts, result["profile_ms"] = profiled(made[OURS])
        text += ["", table(PROFILE, parts)]
    report("step", "\n".join(text), result)


def lines(found: dict[str, dict[str, Any]]) -> str:
    """The contestants, a line each."""
    rows: list[list[str | float]] = []
    for name, one in found.items():
        peak, before = one["memory"]["peak"], one["memory"]["before"]
        rows.append([name, statistics.median(one["seconds"]), f"{one['tokens_per_second']:,.0f}", str(one["to_ours"]),
                     str(one["share"]), f"{peak:,.0f}", f"{peak - before:,.0f}",
                     peak / found[OURS]["memory"]["peak"]])  # fmt: skip
    head = ("", "seconds", "tokens/s", "time x ours", "share", "peak MB", "above weights", "peak x ours")
    return table(head, rows)


def marks(found: dict[str, dict[str, Any]]) -> list[str]:
    """The pass marks, and what could not be held against them."""
    held = [mark("share of matrix throughput", found[OURS]["share"].median, 0.7, at_least=True)]
    if GKD not in found:
        return [*held, f"Left out: {GKD}, trl is not installed (make bench installs it)."]
    less = found[OURS]["memory"]["peak"] / found[GKD]["memory"]["peak"]
    held.append(mark("tokens/s over GKDTrainer's", found[GKD]["to_ours"].median, 2.0, at_least=True))
    return [*held, mark("peak memory over GKDTrainer's", less, 0.5)]


def main() -> None:
    options = parser(__doc__ or "", rows=6, micro_rows=2)
    options.add_argument("--profile", action="store_true", help="also print where our step's time goes")
    options.add_argument("--memory", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(json.dumps(memory(setting_of(arguments), arguments.memory)))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
