"""Layer-wise distillation: how well mixtures replicate the networks of trained models, in what memory, at what speed.

    python benchmarks/layerwise.py cells [--families qwen3,llama] [--cells half,quarter] [--steps 1500] [--output DIR]
    python benchmarks/layerwise.py memory        a sequential run at 4, 8 and 16 layers
    python benchmarks/layerwise.py throughput    a parallel step against the matrix products that it is made of

`cells`: small dense models trained on the real rows (a Qwen3, the teacher of ablation.py, until its validation loss falls no
further; a Llama for LLAMA_STEPS), then every mixture of 16 experts, top-2, for as many steps on the same rows in
the same order. Held out, by layer: relative error (norm of the error over norm of the answer), cosine, entropy of the
load. Beside it the best fixed subset of the network's own neurons of the same active size: of those that three rules
choose on training rows (norm of the weights; mean square of what a neuron adds; greedy removal under the neurons' full
covariance) the one with the least error on the held-out rows, layer by layer, which favours it. Perplexity on the
held-out rows, all tokens: the dense model's, the replaced model's, and that after a short end-to-end distillation of
the exported stock model from the dense one. Finished cells are JSON files in DIR, and are not made again; empty DIR
after changing the code.

`memory`: a process each; how far a run's highest resident size stands above the resident size with the dense model
alone, at growing numbers of layers.

`throughput`: forward, backward and optimizer at half width, interleaved with `torch.mm` at the shapes of the step (the
frozen pass without the head, and three times the active experts), as in step.py; with a malloc that keeps freed memory,
without which fresh pages for each layer's activations take a seventh of the time on a CPU.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import lightning
import torch
import torch.nn.functional as F
from ablation import SETTINGS, Ablation, Training, qwen3, remember, trainer
from jsonargparse import ArgumentParser
from measure import Cell, Product, Products, Step, apart, in_turns, keep_pages, mark, ratio, report, table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.synthetic import write_corpus
from agri_moe.models.causal import packed_mask
from agri_moe.models.ffn import find_ffns, put_in_place
from agri_moe.models.layerwise import LayerwiseModule
from agri_moe.models.moe import MoE, Replacement
from agri_moe.models.replaced import stock_model
from agri_moe.models.training import TrainingModule

OUTPUT = Path(__file__).parent / "output" / "layerwise"
DYNAMIC = {"every_n_steps": 250, "min_width": 16, "max_width": 384, "multiple_of": 8}
CHOICE = {"routing": "expert_choice", "capacity_factor": 1.0}
CELLS: dict[str, dict[str, Any]] = {
    "same": {"expert_width": 1.0},
    "half": {"expert_width": 0.5},
    "quarter": {"expert_width": 0.25},
    "half, expert choice": {"expert_width": 0.5, **CHOICE},
    "quarter, expert choice": {"expert_width": 0.25, **CHOICE},
    "half, from scratch": {"expert_width": 0.5, "init_from_dense": False},
    "quarter, from scratch": {"expert_width": 0.25, "init_from_dense": False},
    "quarter, dynamic": {"expert_width": 0.25, "reallocation": DYNAMIC},
}
"""Name of a cell -> options of the module."""
END_TO_END = ("half", "quarter")
"""Cells whose stock model is distilled from the dense one for a while."""
RATE = {"learning_rate": 5e-4, "balance_weight": 0.02, "optimizer": {"warmup_steps": 50}}

HELD_OUT_EVERY = 5
LLAMA_STEPS = 1200

Result = dict[str, Any]

# ---------------------------------------------------------------------- models and rows


def llama(width: int, layers: int, inner: int) -> dict[str, Any]:
    """Config of a small Llama of the shape of `qwen3`."""
    return qwen3(width, layers, inner) | {"model_type": "llama"}


def dense_model(family: str, output: Path) -> Path:
    """A small trained model: the ablation's teacher, or a Llama like it, for which fewer steps are enough."""
    ablation = Ablation(SETTINGS["real"], output)
    training: Training = SETTINGS["real"].teacher
    if family == "qwen3":
        return ablation.teacher()[0]
    return ablation.pretrained(family, replace(training, steps=LLAMA_STEPS, shape=llama(128, 6, 384)), 0)[0]


class Rows(ChatDataModule):
    """The real rows, of which every HELD_OUT_EVERY-th batch is scored: the longest rows are packed first."""

    def val_dataloader(self) -> Any:
        """Those batches."""
        batches: Any = list(itertools.islice(super().val_dataloader(), 0, None, HELD_OUT_EVERY))
        return DataLoader(batches, batch_size=None)


def rows(output: Path, tokens_per_batch: int) -> ChatDataModule:
    """The real rows, in one order for all."""
    setting = SETTINGS["real"]
    corpus = Ablation(setting, output).corpus
    return Rows(
        train=corpus.train,
        validation=corpus.validation,
        tokenizer=corpus.tokenizer,
        format=corpus.format,
        max_length=setting.max_length,
        tokens_per_batch=tokens_per_batch,
        bad_rows="skip",
        cache_dir=str(output / "cache"),
    )


def build(module: str, options: Mapping[str, Any]) -> Any:
    """A module from the keys that a config file has under `model.init_args`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TrainingModule, "model")
    config = parser.parse_object({"model": {"class_path": f"agri_moe.models.{module}", "init_args": dict(options)}})
    return parser.instantiate(config).model


def layerwise(source: Path, cell: str) -> LayerwiseModule:
    """The module of a cell."""
    lightning.seed_everything(0, verbose=False)
    options = {"source": str(source), "dtype": "float32", **RATE, **CELLS[cell]}
    module: LayerwiseModule = build("layerwise.LayerwiseModule", options)
    return module


# ---------------------------------------------------------------------- the best fixed neurons


def fixed_neurons(h_NF: Tensor, down_FD: Tensor, reads_F: Tensor, count: int) -> dict[str, Tensor]:
    """Subsets of `count` neurons, by the rule that chose them on these activations."""
    covariance_FF = (h_NF.T @ h_NF / len(h_NF)) * (down_FD @ down_FD.T)
    kept_F = torch.ones(len(down_FD), dtype=torch.bool)
    removed_F = torch.zeros(len(down_FD))  # covariance of each neuron with all that are gone
    for _ in range(len(down_FD) - count):
        cost_F = (covariance_FF.diagonal() + 2 * removed_F).masked_fill(~kept_F, math.inf)
        worst = int(cost_F.argmin())
        kept_F[worst] = False
        removed_F += covariance_FF[:, worst]
    return {
        "norm of the weights": (reads_F * down_FD.norm(dim=1)).topk(count).indices,
        "what they add": covariance_FF.diagonal().topk(count).indices,
        "greedy": kept_F.nonzero()[:, 0],
    }


def fixed_errors(module: LayerwiseModule, data: ChatDataModule, count: int) -> list[float]:
    """By layer, the least held-out relative error of a fixed subset of the dense network's neurons."""
    layers = list(range(len(module.ffns)))

    def seen(batches: Any, limit: int) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in layers]
        for _, batch in zip(range(limit), batches, strict=False):
            batch = module.on_before_batch_transfer(batch, 0)
            for layer, (x, _) in enumerate(module._read(batch, layers)):
                found[layer].append(x)
        return [torch.cat(parts) for parts in found]

    chosen_on, held_out = seen(data.train_dataloader(), 16), seen(data.val_dataloader(), 10**6)
    errors = []
    for ffn, x, test in zip(module.ffns, chosen_on, held_out, strict=True):
        own = ffn.weights()
        reads_F = own["up_SD"].norm(dim=1) * (own["gate_SD"].norm(dim=1) if "gate_SD" in own else 1.0)
        h, y, down = ffn.neurons(test), ffn.answer(test), own["down_SD"]
        subsets = fixed_neurons(ffn.neurons(x), down, reads_F, count).values()
        errors.append(min(float((h[:, one] @ down[one] - y).norm() / y.norm()) for one in subsets))
    return errors


# ---------------------------------------------------------------------- cells


@torch.inference_mode()
def text_loss(model: PreTrainedModel, data: ChatDataModule) -> float:
    """Nats per held-out token."""
    total = count = 0.0
    for batch in data.val_dataloader():
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=packed_mask(model.config, batch["position_ids"]),
            use_cache=False,
        ).logits.flatten(0, 1)
        there = batch["target_segments"].flatten() > 0
        total += float(F.cross_entropy(logits[there], batch["target_ids"].flatten()[there], reduction="sum"))
        count += int(there.sum())
    return total / count


def scored(module: LayerwiseModule, data: ChatDataModule) -> Result:
    """What validation says, by layer and in all."""
    validator = trainer()
    validator.validate(module, datamodule=data, verbose=False)
    values = {key.removeprefix("val/"): float(value) for key, value in validator.callback_metrics.items()}
    names = ("relative_error", "cosine", "balance_score")
    by_layer = {name: [values[f"{name}/layer_{layer:02d}"] for layer in module.indices] for name in names}
    return by_layer | {"ce": values["ce"], "ce_dense": values["ce_dense"]}


def active(module: LayerwiseModule, data: ChatDataModule) -> float:
    """Neurons that a held-out token passes through, mean over layers."""
    batch = module.on_before_batch_transfer(next(iter(data.val_dataloader())), 0)
    found = []
    with torch.no_grad():
        for moe, (x, _) in zip(module.layers, module._read(batch, module.indices), strict=True):
            assert isinstance(moe, MoE)
            load = moe.eval()(x).assignment.load_E
            found.append(float((load * torch.tensor(moe.widths)).sum()) / len(x))
    return statistics.fmean(found)


def as_stock(module: LayerwiseModule, folder: Path) -> Path:
    """The trained layers as a stock model's folder."""
    blocks = {ffn.name: Replacement(moe) for ffn, moe in zip(module.ffns, module.layers, strict=True)}  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(module.source, dtype=torch.float32)
    model.load_state_dict(module.dense.state_dict())  # with the rows of new markers
    put_in_place(model, blocks, find_ffns(model, "cell"))
    stock_model(model, "cell").save_pretrained(folder)
    module.chat.save(folder)  # without it, the markers' rows would be taken for untrained ones
    return folder


def distilled(stock: Path, source: Path, data: ChatDataModule, steps: int) -> float:
    """The stock model's held-out loss after so many steps under the dense model's eye."""
    everything = ["system", "user", "thought", "assistant"]
    terms = {"ce": {"weight": 0.0, "segments": everything}, "kl": {"weight": 1.0, "segments": everything}}
    options = {
        "student": {"source": str(stock)},
        "teacher": {"source": str(source), "view": "same", "dtype": "float32"},
        "objective": terms,
        "learning_rate": 2e-4,
        "optimizer": {"warmup_steps": 20},
    }
    lightning.seed_everything(0, verbose=False)
    module = build("distill.DistillModule", options)
    trainer(max_steps=steps, limit_val_batches=0).fit(module, datamodule=data)
    return text_loss(module.model.hf.eval(), data)


def cell_result(family: str, cell: str, output: Path, steps: int, end_steps: int, tokens: int) -> Result:
    """Train and score a cell, unless that has been done."""
    source = dense_model(family, output)
    config = {
        "source": source.name, "options": CELLS[cell], "rate": RATE, "steps": steps, "tokens": tokens,
        "end_steps": end_steps if cell in END_TO_END else 0,
    }  # fmt: skip

    def work() -> Result:
        data = rows(output, tokens)
        module = layerwise(source, cell)
        start = scored(module, data)
        trainer(max_steps=steps, limit_val_batches=0).fit(module, datamodule=data)
        result: Result = {
            "start": start,
            "end": scored(module, data),
            "active": active(module, data),
            "history": module.history,
        }
        width = module.ffns[0].width
        count = min(round(2 * CELLS[cell]["expert_width"] * width), width)
        result["fixed"] = fixed_errors(module, data, count) if count < width else [0.0] * len(module.ffns)
        if cell in END_TO_END and end_steps:
            with tempfile.TemporaryDirectory() as folder:
                result["ce_distilled"] = distilled(as_stock(module, Path(folder)), source, data, end_steps)
        return result

    return remember(output, f"{family}_{cell.replace(', ', '_').replace(' ', '_')}", config, work)


HEAD = (
    "model", "cell", "active", "fixed", "start", "error", "of fixed, worst", "cosine, worst", "entropy, worst",
    "ppl dense", "ppl start", "ppl", "ppl distilled",
)  # fmt: skip


def row(family: str, cell: str, result: Result) -> list[str]:
    """One line of the table: means over layers, and the worst layer where it says so."""
    start, end, fixed = result["start"], result["end"], result["fixed"]
    shares = [e / f for e, f in zip(end["relative_error"], fixed, strict=True) if f]
    return [
        family, cell, f"{result['active']:.0f}", f"{statistics.fmean(fixed):.3f}",
        f"{statistics.fmean(start['relative_error']):.3f}", f"{statistics.fmean(end['relative_error']):.3f}",
        f"{max(shares):.2f}" if shares else "-", f"{min(end['cosine']):.4f}", f"{min(end['balance_score']):.3f}",
        *(f"{math.exp(loss):.2f}" for loss in (end["ce_dense"], start["ce"], end["ce"])),
        f"{math.exp(result['ce_distilled']):.2f}" if "ce_distilled" in result else "-",
    ]  # fmt: skip


def marks(family: str, results: Mapping[str, Result]) -> list[str]:
    """The pass marks that these cells decide."""
    lines = []
    if half := results.get("half"):
        lines.append(
            mark(f"{family}: half width untrained, worst cosine", min(half["start"]["cosine"]), 0.99999, at_least=True)
        )
    if quarter := results.get("quarter"):
        end = quarter["end"]
        shares = [e / f for e, f in zip(end["relative_error"], quarter["fixed"], strict=True)]
        lines.append(
            mark(f"{family}: quarter width, error over the best fixed neurons', worst layer", max(shares), 0.7)
        )
        lines.append(mark(f"{family}: quarter width, worst cosine", min(end["cosine"]), 0.95, at_least=True))
        lines.append(mark(f"{family}: quarter width, worst entropy", min(end["balance_score"]), 0.9, at_least=True))
        if dynamic := results.get("quarter, dynamic"):
            means = [statistics.fmean(one["end"]["relative_error"]) for one in (dynamic, quarter)]
            lines.append(mark(f"{family}: dynamic over static error", means[0] / means[1], 1.0))
    return lines


def cells(arguments: argparse.Namespace) -> None:
    """Make what is not there yet, and print the table."""
    output = Path(arguments.output)
    lines, passes, results = [], [], {}
    for family in arguments.families.split(","):
        found = {
            cell: cell_result(family, cell, output, arguments.steps, arguments.end_steps, arguments.tokens)
            for cell in (arguments.cells.split(";") if arguments.cells else CELLS)
        }
        lines += [row(family, cell, result) for cell, result in found.items()]
        passes += marks(family, found)
        results[family] = found
    text = table(HEAD, lines) + "\n\n" + "\n".join(passes)
    report("layerwise_cells", text, {"results": results})


# ---------------------------------------------------------------------- memory

MEMORY_SHAPE = {"width": 256, "inner": 1024}
MEMORY_LAYERS = (4, 8, 16)


def random_run(
    folder: Path, mode: str, layers: int, shape: Mapping[str, int], tokens: int
) -> tuple[LayerwiseModule, ChatDataModule]:
    """A module over a model with random weights, and rows of the embedded corpus; everything lies in `folder`."""
    if not (folder / "model").exists():
        write_corpus(folder / "corpus", train_rows=120, validation_rows=8, vocab_size=600)
        config = qwen3(shape["width"], layers, shape["inner"]) | {"vocab_size": 768}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        model.save_pretrained(folder / "model")
    options = {
        "source": str(folder / "model"),
        "dtype": "float32",
        "expert_width": 0.5,
        "mode": mode,
        "optimizer": {"warmup_steps": 1},
    }
    data = ChatDataModule(
        tokenizer=str(folder / "corpus" / "tokenizer"),
        train=str(folder / "corpus" / "train.parquet"),
        validation=str(folder / "corpus" / "validation.parquet"),
        max_length=512,
        tokens_per_batch=tokens,
        cache_dir=str(folder / "cache"),
    )
    return build("layerwise.LayerwiseModule", options), data


def sequential_mb(layers: int) -> dict[str, float]:
    """How far a run of two steps a layer rises above the dense model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module, data = random_run(folder, "sequential", layers, MEMORY_SHAPE, 1024)
        loop = lightning.Trainer(
            accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False, max_steps=2,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
            callbacks=[watch := Peak()],
        )  # fmt: skip
        loop.fit(module, datamodule=data)
        return {
            "above": watch.peak - watch.before,
            "moe": sum(p.numel() for p in module.layers.parameters()) * 16 / 1e6,
        }


class Peak(lightning.Callback):
    """Resident size when the dense model is there, and the highest after that."""

    before = peak = math.nan

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before the first layer begins: callbacks come before the module."""
        from measure import forget_peak, resident_mb

        self.before = resident_mb("VmRSS")
        forget_peak()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """After the last one."""
        from measure import resident_mb

        self.peak = resident_mb("VmHWM")


def memory(arguments: argparse.Namespace) -> None:
    """One process for each number of layers."""
    if arguments.layers:
        print(json.dumps(sequential_mb(arguments.layers)))
        return
    found = {layers: apart("--layers", str(layers)) for layers in MEMORY_LAYERS}
    lines = [[layers, one["above"], one["moe"]] for layers, one in found.items()]
    first, last = (found[layers]["above"] for layers in (MEMORY_LAYERS[0], MEMORY_LAYERS[-1]))
    head = ("layers", "MB above the dense model", "MB of one mixture with gradients and moments")
    text = table(head, lines) + "\n\n" + mark("16 layers over 4", last / first, 1.1)
    report("layerwise_memory", text, {"found": found})


# ---------------------------------------------------------------------- throughput

STEP_SHAPE = {"width": 512, "inner": 2048}
STEP_LAYERS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "half width": {},
    "gumbel noise": {"router_noise": "gumbel"},
    "dropping": {"drop_tokens": True},
    "expert choice": {"routing": "expert_choice", "capacity_factor": 1.0},
    "no cosine": {"cosine_weight": 0.0},
    "judged for reallocation": {"reallocation": {"min_width": 64}},
    "unequal widths": {"reallocation": {"min_width": 64}},
}
"""Name -> what differs from the first."""


def step_products(module: LayerwiseModule, tokens: int) -> list[Product]:
    """The frozen pass without the head, and router and active experts three times."""
    config, layers = module.dense.config, len(module.ffns)
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
    frozen = [
        Product(tokens, width, queries, layers), Product(tokens, width, keys, 2 * layers),
        Product(tokens, queries, width, layers), Product(tokens, width, inner, 2 * layers),
        Product(tokens, inner, width, layers),
    ]  # fmt: skip
    experts, top_k = module.num_experts, module.rule.top_k
    expert = inner // 2
    each = tokens * top_k // experts
    learned = [
        Product(tokens, width, experts, layers), Product(each, width, 2 * expert, layers * experts),
        Product(each, expert, width, layers * experts),
    ]  # fmt: skip
    return frozen + [one for product in learned for one in product.with_gradients()]


class Steps(lightning.Callback):
    """Hands the first micro-batch on, with everything in place, and ends the run."""

    def __init__(self, then: Callable[[LayerwiseModule, Any], None]) -> None:
        self.then = then

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hand on."""
        assert isinstance(pl_module, LayerwiseModule)
        self.then(pl_module, batch)
        trainer.should_stop = True


def one_step(
    folder: Path, name: str, tokens: int, layers: int, shape: Mapping[str, int]
) -> tuple[LayerwiseModule, Any, Step]:
    """A module in training, its micro-batch, and what does a whole step."""
    _, data = random_run(folder, "parallel", layers, shape, tokens)
    made: dict[str, Any] = {}
    module: LayerwiseModule = build(
        "layerwise.LayerwiseModule",
        {"source": str(folder / "model"), "dtype": "float32", "expert_width": 0.5, **OPTIONS[name]},
    )
    keep = Steps(lambda _, batch: made.update(batch=batch))
    trainer(max_steps=1, limit_val_batches=0, callbacks=[keep]).fit(module, datamodule=data)
    if name == "unequal widths":
        for moe in module.layers:
            assert isinstance(moe, MoE)
            half = [width // 64 * 48 + width // 64 * 32 * (e % 2) for e, width in enumerate(moe.widths)]
            moe.set_widths(half)
    optimizer = module.optimizer_config.build([{"params": list(module.parameters()), "lr": 1e-5, "weight_decay": 0.1}])
    batch = made["batch"]

    def run() -> None:
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        module._sums.clear()
        module._judged.clear()

    return module, batch, run


def throughput(arguments: argparse.Namespace) -> None:
    """Every option's step in turns, and the products."""
    names = list(OPTIONS)
    with tempfile.TemporaryDirectory() as name:
        made = {one: one_step(Path(name), one, arguments.step_tokens, STEP_LAYERS, STEP_SHAPE) for one in names}
        module, batch, _ = made[names[0]]
        tokens = len(batch["positions"])
        products = Products(step_products(module, tokens))
        steps: dict[str, Step] = {"products": products} | {one: step for one, (_, _, step) in made.items()}
        seconds = in_turns(steps, arguments.repeats)
    alone = seconds["products"]
    rate = products.flops / statistics.median(alone) / 1e9
    lines: list[list[Cell]] = []
    for one in names:
        taken = seconds[one]
        lines.append([one, statistics.median(taken), str(ratio(taken, alone)), str(ratio(taken, seconds[names[0]]))])
    about = (
        f"{STEP_LAYERS} layers, D {STEP_SHAPE['width']}, F {STEP_SHAPE['inner']}, 16 experts of F/2, top-2, {tokens:,} "
        f"tokens, float32, AdamW; {products.flops / 1e9:,.0f} GFLOP at {rate:,.0f} GFLOP/s.\n"
    )
    head = ("step", "seconds", "over its products", f"over {names[0]}")
    first = ratio(seconds[names[0]], alone).median
    text = "\n".join([about, table(head, lines), "", mark("step over its products", first, 1.3)])
    report("layerwise_throughput", text, {"seconds": seconds, "flops": products.flops, "tokens": tokens})


def main(given: Sequence[str] | None = None) -> None:
    """Parse and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cells", "memory", "throughput"))
    parser.add_argument("--families", default="qwen3,llama", help="of cells, with commas between")
    parser.add_argument("--cells", default="", help="with semicolons between; all by default")
    parser.add_argument("--steps", type=int, default=1500, help="of each cell")
    parser.add_argument("--end_steps", type=int, default=150, help="of the end-to-end distillation")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step of cells")
    parser.add_argument("--output", default=str(OUTPUT), help="folder of cells")
    parser.add_argument("--layers", type=int, default=0, help="of memory: one process' number")
    parser.add_argument("--step_tokens", type=int, default=4096, help="of throughput")
    parser.add_argument("--repeats", type=int, default=5, help="of throughput")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(given)
    if arguments.part == "throughput":
        keep_pages()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    {"cells": cells, "memory": memory, "throughput": throughput}[arguments.part](arguments)


if __name__ == "__main__":
    main()
