"""The real shapes on one GPU: Qwen3-14B teaches Qwen3-0.6B with 8 experts; ours, TRL's GKDTrainer, a plain step.

    python benchmarks/gpu.py                              one H100 (80 GB) or H200
    python benchmarks/gpu.py --fp8                        with an fp8 teacher beside the bf16 one (needs torchao)
    python benchmarks/gpu.py --device cpu --tiny          the same code on tiny models, to see that it runs

Weights are random and made on the device; nothing is downloaded. Student bf16-mixed over float32 weights, teacher bf16,
packed sequences of 2,048 tokens, activations recomputed; CE, KL and CKA as configs/distill.yaml has them, but nothing
frozen. The rows are random tokens at the lengths of the real rows, so that no file is needed. Contestants, useful FLOPs
and the share of matrix throughput are those of step.py, with `torch.mm` in bf16; the contestants come one after the
other, since together they would not fit. Memory is the allocator's peak over a step. One that runs out of memory is
said to; a peer is then measured on fewer rows (`--peer_rows`), with its own number of tokens.

A synchronisation is a place where the host waits for the device, as torch.cuda.set_sync_debug_mode counts them in one
step of ours, optimizer and clipping included.
"""

import argparse
import gc
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from contestants import CONTESTANTS, GKD, OURS, Ours, Setting, in_micro_batches, installed, qwen3, random_rows
from measure import Products, in_turns, mark, report, table
from step import LARGE, PROFILE, about, profiled, share, useful_flops, useful_products
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from agri_moe.losses import token_statistics
from agri_moe.models.upcycle import UpcycleSpec, moe_config
from agri_moe.objective import Objective
from agri_moe.terms import CKA, KL, CrossEntropy

FP8_CAPABILITY = (8, 9)


def real_shape(width: int, layers: int, inner: int, heads: int, tied: bool) -> PreTrainedConfig:
    """A Qwen3 of the hub: heads of 128, 8 key-value heads."""
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def setting_of(arguments: argparse.Namespace, rows: int) -> Setting:
    """Real shapes, or tiny ones, with so many rows to the one micro-batch of a step."""
    if arguments.tiny:
        teacher, dense = qwen3(1024, 128, 3), qwen3(1024, 64, 2)
    else:  # huggingface.co/Qwen/Qwen3-14B and Qwen3-0.6B, config.json
        teacher = real_shape(5120, 40, 17_408, 40, tied=False)
        dense = real_shape(1024, 28, 3072, 16, tied=True)
    corpus = random_rows(rows, arguments.max_length, 0, teacher.vocab_size)
    return Setting(
        student=moe_config(dense, UpcycleSpec(num_experts=8, num_experts_per_tok=2)),
        teacher=teacher,
        micro_batches=in_micro_batches(corpus, rows),
        corpus=corpus,
        max_length=arguments.max_length,
        device=arguments.device,
        mixed=True,
        gradient_checkpointing=True,
    )


def objective() -> Objective:
    """That of configs/distill.yaml, with the divergence on thought and advisory, as the peers have it."""
    kl = KL(weight=1.0, segments=["thought", "assistant"])
    return Objective(ce=CrossEntropy(weight=0.5), kl=kl, cka=CKA(weight=0.1))


def release() -> None:
    """Give the memory of what has just been dropped back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------- one contestant


def measured(setting: Setting, step: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Seconds of every round, tokens per second, useful FLOPs per second and the peak; or that memory ran out."""
    try:
        products = Products(useful_products(setting), torch.bfloat16, setting.device)
        large = Products([LARGE], torch.bfloat16, setting.device)
        seconds = in_turns({"step": step, "products": products, "large": large}, repeats)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    median = statistics.median(seconds["step"])
    return {
        "seconds": seconds["step"],
        "tokens": setting.tokens,
        "tokens_per_second": setting.tokens / median,
        "useful_flops_per_second": useful_flops(setting) / median,
        "products_flops_per_second": products.flops / statistics.median(seconds["products"]),
        "large_product_flops_per_second": large.flops / statistics.median(seconds["large"]),
        "share": share(setting, products, seconds["products"], seconds["step"]),
    }


def contest(name: str, setting: Setting, teacher: PreTrainedModel, repeats: int) -> dict[str, Any]:
    """One contestant, alone on the device with the teacher."""
    release()
    try:
        made = Ours(setting, teacher, objective=objective()) if name == OURS else CONTESTANTS[name](setting, teacher)
        made.step()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    release()
    made.step()
    peak = torch.cuda.max_memory_allocated() / 1e6 if setting.device == "cuda" else None
    found = measured(setting, made.step, repeats) | {"peak_mb": peak}
    if name == OURS:
        found["synchronisations"] = synchronisations(made.step) if setting.device == "cuda" else "no GPU"
        parts, found["profile_ms"] = profiled(made)
        found["profile"] = table(PROFILE, parts)
    return found


def synchronisations(step: Callable[[], object]) -> dict[str, int]:
    """File and line of each place where the host waited for the device in one step -> how often."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return dict(Counter(places).most_common())


# ---------------------------------------------------------------------- fp8


def fp8_refused(device: str) -> str:
    """Why there can be no fp8 teacher here; empty if there can."""
    if not find_spec("torchao"):
        return "torchao is not installed (pip install -c constraints.txt -e '.[lowbit]')"
    if device != "cuda":
        return "fp8 products need a GPU"
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return "this GPU has no fp8 products (compute capability below 8.9)"
    return ""


def to_fp8(teacher: PreTrainedModel) -> None:
    """Every linear layer but the head in fp8, weights and activations, a scale for each row; in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(teacher, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)


@torch.no_grad()
def hidden_of(teacher: PreTrainedModel, setting: Setting) -> torch.Tensor:
    """Final hidden states of the first row."""
    ids_1T = torch.from_numpy(setting.corpus.rows[0].input_ids)[None].to(setting.device)
    hidden: torch.Tensor = teacher.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    return hidden


def kl_of_fp8(before_ND: torch.Tensor, after_ND: torch.Tensor, head_VD: torch.Tensor) -> float:
    """Mean KL(bf16 teacher || fp8 teacher) in nats per token; on random weights, which are harder than trained ones."""
    targets_N = torch.zeros(len(before_ND), dtype=torch.int64, device=before_ND.device)
    return float(token_statistics(after_ND, head_VD, targets_N, before_ND, head_VD).kl_M.mean())


# ---------------------------------------------------------------------- all of it


def run(arguments: argparse.Namespace) -> None:
    """Measure everything and report it."""
    setting, peers = setting_of(arguments, arguments.rows), setting_of(arguments, arguments.peer_rows)
    teacher = setting.new_teacher()
    found = {name: contest(name, setting, teacher, arguments.repeats) for name in installed()}
    for name in [name for name, one in found.items() if "out_of_memory" in one and name != OURS]:
        found[f"{name}, {arguments.peer_rows} rows"] = contest(name, peers, teacher, arguments.repeats)
    text = [about(setting)]
    if arguments.fp8:
        if refused := fp8_refused(arguments.device):
            text.append(f"fp8 teacher left out: {refused}.\n")
        else:
            before_ND = hidden_of(teacher, setting)
            to_fp8(teacher)
            fp8 = contest(OURS, setting, teacher, arguments.repeats)
            fp8["kl_to_bf16"] = kl_of_fp8(before_ND, hidden_of(teacher, setting), teacher.lm_head.weight)
            text.append(f"fp8 teacher: KL to the bf16 one {fp8['kl_to_bf16']:.4f} nats per token, random weights.\n")
            found["ours, fp8 teacher"] = fp8
    rows = [[name, *_cells(one)] for name, one in found.items()]
    text.append(table(("", "seconds", "tokens/s", "GB", "TFLOP/s useful", "share", "large product"), rows))
    if GKD not in found:
        text.append(f"\nLeft out: {GKD}, trl is not installed (pip install -c constraints.txt -e '.[bench]').")
    mine = found[OURS]
    if "share" in mine:
        text += ["", mark("share of matrix throughput", mine["share"].median, 0.5, at_least=True)]
        text += [f"Synchronisations in a step: {mine['synchronisations']}", "", mine["profile"]]
    report("gpu", "\n".join(text), {"arguments": vars(arguments), "contestants": found}, arguments.device)


def _cells(one: dict[str, Any]) -> list[str]:
    if "out_of_memory" in one:
        return ["out of memory", *["-"] * 5]
    return [
        f"{statistics.median(one['seconds']):.3f}",
        f"{one['tokens_per_second']:,.0f}",
        f"{one['peak_mb'] / 1e3:,.1f}" if one["peak_mb"] else "-",
        f"{one['useful_flops_per_second'] / 1e12:,.1f}",
        str(one["share"]),
        f"{one['large_product_flops_per_second'] / 1e12:,.0f} TFLOP/s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows")
    parser.add_argument("--rows", type=int, default=48, help="of a step: about 16,000 tokens, as distill.yaml has it")
    parser.add_argument("--peer_rows", type=int, default=4, help="for peers that run out of memory at --rows")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fp8", action="store_true", help="also with an fp8 teacher, by torchao")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu --tiny runs the same code on tiny models.")
    run(arguments)


if __name__ == "__main__":
    main()
