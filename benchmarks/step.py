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
from measure import Product, Products, Step, apart, in_turns, mark, peak_mb, ratio, report, table
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
        by_segment, untaught = np.sum(counts, axis=0)[:, list(SUPERVISED)].sum(1).tolist()
        student, teacher = setting.student, setting.teacher
        body = _attention_products(student, tokens) + _expert_products(student, tokens)
        head = Product(by_segment, student.hidden_size, student.vocab_size, 1)
        found += [one for product in [*body, head] for one in product.with_gradients()]
        found += _attention_products(teacher, tokens)
        width, inner = teacher.hidden_size, teacher.intermediate_size
        found.append(Product(tokens, width, inner, 2 * teacher.num_hidden_layers))
        found.append(Product(tokens, inner, width, teacher.num_hidden_layers))
        found.append(Product(by_segment - untaught, width, teacher.vocab_size, 1))
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


# ---------------------------------------------------------------------- where the time goes

RANGES = ("data", "teacher body", "student forward", "backward", "optimizer")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::_grouped_mm")


def profiled(ours: Ours, top: int = 5) -> tuple[list[list[str | float]], dict[str, float]]:
    """Rows of a table and milliseconds by part of one step: each part's share and its dearest operators."""
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
    rows: list[list[str | float]] = []
    for part, total in sorted(totals.items(), key=lambda item: -item[1]):
        dearest = sorted(parts[part].items(), key=lambda item: -item[1])[:top]
        rows.append([part, total, f"{total / whole:.0%}", ", ".join(f"{name} {ms:,.0f}" for name, ms in dearest)])
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

    rates = {name: statistics.median(one.flops / s for s in seconds.pop(name))
             for name, one in ((PRODUCTS, products), ("large", large))}  # fmt: skip
    flops = useful_flops(setting)
    rows: list[list[str | float]] = []
    result: dict[str, Any] = {"arguments": vars(arguments), "about": about(setting), "useful_flops": flops}
    result |= {"products_flops_per_second": rates[PRODUCTS], "large_product_flops_per_second": rates["large"]}
    for name, values in seconds.items():
        median = statistics.median(values)
        share = flops / median / rates[PRODUCTS]
        peak, above = peaks[name]["peak"], peaks[name]["peak"] - peaks[name]["before"]
        speed = ratio(values, seconds[OURS])
        rows.append([name, median, f"{setting.tokens / median:,.0f}", str(speed), f"{share:.0%}", f"{peak:,.0f}",
                     f"{above:,.0f}", peak / peaks[OURS]["peak"]])  # fmt: skip
        result[name] = {"seconds": values, "to_ours": speed, "tokens_per_second": setting.tokens / median,
                        "share_of_products": share, "memory": peaks[name]}  # fmt: skip
    head = ("", "seconds", "tokens/s", "time x ours", "share", "peak MB", "above weights", "memory x ours")
    text = [about(setting), table(head, rows), ""]
    text.append(f"Matrix throughput: {rates[PRODUCTS] / 1e9:,.0f} GFLOP/s at the step's own shapes, "
                f"{rates['large'] / 1e9:,.0f} at 2,048 cubed.")  # fmt: skip
    text += [f"Left out: {GKD}, trl is not installed."] * (GKD not in names)
    text.append(mark("share of matrix throughput", result[OURS]["share_of_products"], 0.7, at_least=True))
    if GKD in names:
        speed_up, less = result[GKD]["to_ours"].median, peaks[OURS]["peak"] / peaks[GKD]["peak"]
        text += [mark("tokens/s over GKDTrainer's", speed_up, 2.0, at_least=True)]
        text += [mark("peak memory over GKDTrainer's", less, 0.5)]
    if arguments.profile:
        parts, result["profile_ms"] = profiled(made[OURS])
        text += ["", table(("part of our step", "ms", "share", "dearest operators, ms"), parts)]
    report("step", "\n".join(text), result)


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
