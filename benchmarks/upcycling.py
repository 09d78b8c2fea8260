"""Continued pretraining: a dense model against what it is upcycled to, at equal tokens and at equal operations.

    python benchmarks/upcycling.py [--family qwen3|llama] [--arms dense,naive,...] [--seeds 3] [--output DIR]
    python benchmarks/upcycling.py --full_vocabulary         the main result at Qwen3's whole vocabulary
    python benchmarks/upcycling.py --table                   print what is there, train nothing

A small dense model is trained on one half of the real text (see real_text.py) until its held-out loss falls no
further. From there on all go on with the other half, in the same order and at the same learning rate:

    dense      the dense model itself
    naive      eight copies of each FFN, top-2, a random router (Komatsuzaki et al. 2023)
    jitter     the copies made unequal by 1% noise
    drop       half of each copy's neurons drawn anew (Nakamura et al. 2025, drop-upcycling)
    granular   each FFN cut in two: 16 experts of half the width, top-4 (He et al. 2024)
    scratch    the same mixture from random weights

The learning rate falls with the root of the step, so that every curve can be read at any step: the first table reads
them all after the same number of tokens, the second where they have spent the same floating-point operations (the dense
model, whose steps are cheaper, is trained for so much longer). Token ids are renumbered, see small_vocabulary.py.

A finished cell is a JSON file in DIR, as in ablation.py; started again, the script goes on.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from ablation import Plateau, build, quiet, qwen3, remember, result_file, trainer
from ablation_table import markdown
from loss_step import processor
from matplotlib.figure import Figure
from real_text import DATA, documents, write_documents
from small_vocabulary import read_cut, widen, write_small_tokenizer
from transformers import AutoModelForCausalLM

from agri_moe.cost import Matrices, work
from agri_moe.data.chat import DEFAULT_FORMAT, Chat
from agri_moe.data.text_data import TextDataModule
from agri_moe.models.base import LanguageModule
from agri_moe.models.experts import visits

OUTPUT = Path(__file__).parent / "output" / "upcycling"
OBJECTIVE = {"ce": {"weight": 1.0}, "balance": {"weight": 0.01}, "router_z": {"weight": 0.001}}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "naive": EXPERTS | {"jitter": 0.0},
    "jitter": EXPERTS | {"jitter": 0.01},
    "drop": EXPERTS | {"jitter": 0.0, "drop_ratio": 0.5},
    "granular": {"num_experts": 16, "num_experts_per_tok": 4, "granularity": 2, "jitter": 0.01},
    "scratch": EXPERTS,
}
MEASURES = ("ce", "balanced_perplexity", "router_entropy", "balance_score", "dead_experts")


@dataclass(frozen=True)
class Setting:
    """Everything that a table depends on, apart from arms and seeds."""

    family: str = "qwen3"
    width: int = 96
    inner: int = 384
    layers: int = 3
    block_size: int = 256
    tokens_per_batch: int = 2048
    dense_steps: int = 4000  # at most: it ends at its plateau
    dense_rate: float = 3e-3
    dense_check_every: int = 200
    steps: int = 400  # of the mixtures
    rate: float = 1e-3
    check_every: int = 100
    whole_vocabulary: bool = False


class Curve(lightning.Callback):
    """What every validation measured: step -> name -> value."""

    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep them."""
        metrics = trainer.callback_metrics.items()
        found = {name.removeprefix("val/"): float(value) for name, value in metrics if name.startswith("val/")}
        self.points[trainer.global_step] = found


class Continued:
    """The trainings of one setting.

    Args:
        setting: Models and steps.
        output: Folder of results and models.
    """

    def __init__(self, setting: Setting, output: Path) -> None:
        self.setting, self.output = setting, output
        self.files = write_documents(output / "text")
        self.small = output / "small_tokenizer"
        if not self.small.exists():
            partial = self.small.with_name("small_tokenizer.partial")
            partial.mkdir(parents=True, exist_ok=True)
            texts = [document["text"] for part in self.files for document in documents(part)]
            write_small_tokenizer(DATA / "qwen3-0.6b", partial, texts, DEFAULT_FORMAT)
            partial.rename(self.small)
        self.tokenizer = DATA / "qwen3-0.6b" if setting.whole_vocabulary else self.small

    def shape(self) -> dict[str, Any]:
        """Config of the dense model."""
        setting = self.setting
        config = qwen3(setting.width, setting.layers, setting.inner)
        return config | {"model_type": setting.family, "head_dim": 32}

    def data(self, seed: int, train: Path) -> TextDataModule:
        """The documents of a file in the order of a seed."""
        return TextDataModule(
            tokenizer=str(self.tokenizer),
            train=str(train),
            validation=str(self.files["validation"]),
            block_size=self.setting.block_size,
            tokens_per_batch=self.setting.tokens_per_batch,
            seed=seed,
            cache_dir=str(self.output / "cache"),
            group_by="domain",
        )

    def fit(
        self,
        network: dict[str, Any],
        data: TextDataModule,
        callback: lightning.Callback,
        *,
        rate: float,
        steps: int,
        every: int,
        seed: int,
    ) -> LanguageModule:
        """Train one model."""
        lightning.seed_everything(seed, verbose=False)
        settings = {"learning_rate": rate, "optimizer": {"warmup_steps": 30, "schedule": "inverse_sqrt"}}
        module = build("pretrain.PretrainModule", {"network": network, "objective": OBJECTIVE} | settings)
        checks = {"val_check_interval": every, "check_val_every_n_epoch": None}
        trainer(max_steps=steps, callbacks=[callback], **checks).fit(module, datamodule=data)
        return module

    # ------------------------------------------------------------------ the dense model

    def dense(self) -> tuple[Path, dict[str, Any]]:
        """The dense model at its plateau: its folder, and how its training went."""
        small = Continued(replace(self.setting, whole_vocabulary=False), self.output)
        folder, result = small.plateau()
        if not self.setting.whole_vocabulary:
            return folder, result
        whole = folder.with_name(folder.name + "_whole")
        if not whole.exists():
            partial = whole.with_name(whole.name + ".partial")
            chat = Chat.load(str(self.tokenizer))
            widen(folder, partial, chat, 151_936, read_cut(self.small).unseen)
            partial.rename(whole)
        return whole, result

    def plateau(self) -> tuple[Path, dict[str, Any]]:
        """The dense model of the small vocabulary."""
        setting = self.setting
        keys = ("block_size", "tokens_per_batch", "dense_steps", "dense_rate", "dense_check_every")
        config = {key: getattr(setting, key) for key in keys} | {"shape": self.shape()}
        folder = self.output / f"dense_{setting.family}"

        def train() -> dict[str, Any]:
            plateau = Plateau(patience=2)
            rate, steps, every = setting.dense_rate, setting.dense_steps, setting.dense_check_every
            network = {"config": self.shape()}
            module = self.fit(
                network, self.data(0, self.files["first"]), plateau, rate=rate, steps=steps, every=every, seed=0
            )
            module.model.hf.load_state_dict(plateau.weights)
            module.model.hf.save_pretrained(folder)
            module.chat.save(folder)
            return {
                "curve": plateau.curve,
                "steps": module.trainer.global_step,
                "vocabulary": len(module.chat.tokenizer),
            }

        return folder, remember(self.output, folder.name, config, train)

    # ------------------------------------------------------------------ cells

    def network(self, arm: str, seed: int) -> dict[str, Any]:
        """The model that an arm begins with, as a config names it."""
        source = str(self.dense()[0])
        spec = ARMS[arm]
        if spec is None:
            return {"source": source, "upcycle": None}
        if arm == "scratch":
            sparse = {"model_type": {"qwen3": "qwen3_moe", "llama": "mixtral"}[self.setting.family]}
            widths = {"moe_intermediate_size": self.setting.inner, "norm_topk_prob": True}
            return {"config": self.shape() | sparse | widths | EXPERTS | {"num_local_experts": 8}}
        return {"source": source, "upcycle": spec | {"seed": seed}}

    def cell(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm from one seed, and keep its curve."""
        self.dense()  # not in the cell's own time

        def train() -> dict[str, Any]:
            curve = Curve()
            steps, every = self.setting.steps, self.setting.check_every
            if arm == "dense":  # as long as the mixtures' operations would last it, to the next check
                steps = math.ceil(steps * self.ratio() / every) * every
            network, rate = self.network(arm, seed), self.setting.rate
            self.fit(
                network, self.data(seed, self.files["second"]), curve, rate=rate, steps=steps, every=every, seed=seed
            )
            return {"curve": curve.points}

        return remember(self.output, f"{self.setting.family}_{arm}_{seed}", self.config(arm, seed), train)

    def ratio(self) -> float:
        """Operations of a step of a mixture over those of a step of the dense model."""
        return self.operations("naive") / self.operations("dense")

    def operations(self, arm: str) -> float:
        """Floating-point operations of a training step for one token (see agri_moe/cost.py)."""
        module = build("pretrain.PretrainModule", {"network": self.network(arm, 0), "objective": OBJECTIVE})
        config = module.model_config.hf_config(module.model_key, Chat.load(str(self.tokenizer)))
        with torch.device("meta"):
            layers = AutoModelForCausalLM.from_config(config).model.layers
        top_k, experts = getattr(config, "num_experts_per_tok", 0), getattr(config, "num_experts", 0)
        named = layers.named_parameters("model.layers")
        body = round(sum(p.numel() * visits(name, top_k, experts) for name, p in named if p.ndim > 1))
        attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
        matrices = Matrices(body, body, attention, config.vocab_size * config.hidden_size, True)
        length = self.setting.block_size
        return work(
            *(matrices, None, None), length=length, teacher_length=0, supervised=1.0, taught=0.0, recompute=False
        ).total

    def config(self, arm: str, seed: int) -> dict[str, Any]:
        """What the result of a cell depends on."""
        return {"setting": asdict(self.setting), "arm": ARMS[arm], "seed": seed, "objective": OBJECTIVE}

    def results(self, arms: Sequence[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
        """What is finished: arm -> results, seed by seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for arm in arms:
            names = [(f"{self.setting.family}_{arm}_{seed}", self.config(arm, seed)) for seed in range(seeds)]
            files = [path for name, config in names if (path := result_file(self.output, name, config)).exists()]
            if files:
                found[arm] = [json.loads(path.read_text("utf-8"))["result"] for path in files]
        return found


# ---------------------------------------------------------------------- the tables


def at_tokens(setting: Setting, results: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, float]]]:
    """Every arm after as many steps."""
    return {arm: [found["curve"][str(setting.steps)] for found in cells] for arm, cells in results.items()}


def at_operations(
    setting: Setting, results: dict[str, list[dict[str, Any]]], ratio: float
) -> dict[str, list[dict[str, float]]]:
    """Every arm where it has spent the mixtures' operations: the dense one between two of its checks."""
    read = at_tokens(setting, results)
    if "dense" in results:
        read["dense"] = [between(found["curve"], setting.steps * ratio) for found in results["dense"]]
    return read


def between(curve: dict[str, dict[str, float]], step: float) -> dict[str, float]:
    """A curve read at a step, on the straight line between the checks around it."""
    before, after = max(int(s) for s in curve if int(s) <= step), min(int(s) for s in curve if int(s) >= step)
    share = (step - before) / max(after - before, 1)
    low, high = curve[str(before)], curve[str(after)]
    return {name: low[name] + share * (high[name] - low[name]) for name in low}


def table(read: dict[str, list[dict[str, float]]]) -> str:
    """Mean and spread over the seeds, and the loss against the dense model of the same seed."""
    rows = []
    for arm, cells in read.items():
        row = [arm, shown([cell["ce"] for cell in cells])]
        pairs = [cell["ce"] / dense["ce"] - 1 for cell, dense in zip(cells, read.get("dense", []), strict=False)]
        row.append(shown([100 * pair for pair in pairs], 1, "+") + " %" if pairs and arm != "dense" else "")
        for name in MEASURES[1:]:
            row.append(shown([cell[name] for cell in cells], 2) if name in cells[0] else "")
        rows.append(row)
    head = ("arm", "held-out loss", "against dense", "balanced perplexity", "router entropy", "balance", "dead experts")
    return markdown(head, rows)


def shown(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± sample standard deviation."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(setting: Setting, results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out loss over steps, a line for each arm: the mean of its seeds, and their range."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, cells in results.items():
        steps = [int(step) for step in cells[0]["curve"]]
        losses = [[cell["curve"][str(step)]["ce"] for cell in cells] for step in steps]
        line = axes.plot(steps, [statistics.fmean(values) for values in losses], marker=".", label=arm)[0]
        axes.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=line.get_color(), alpha=0.2)
    axes.axvline(setting.steps, color="grey", linewidth=0.8)
    axes.set(xlabel=f"steps of {setting.tokens_per_batch:,} tokens", ylabel="held-out loss, nats per token")
    shown_losses = [
        p["ce"] for arm, cells in results.items() if arm != "scratch" for c in cells for p in c["curve"].values()
    ]
    if shown_losses:
        axes.set_ylim(min(shown_losses) - 0.02, max(shown_losses) + 0.05)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def report(continued: Continued, arms: Sequence[str], seeds: int) -> str:
    """Both tables, and what they were made of."""
    setting, results = continued.setting, continued.results(arms, seeds)
    _folder, training = continued.dense()
    ratio = continued.ratio()
    curve = ", ".join(f"{loss:.3f} at {step}" for step, loss in training["curve"][-5:])
    seconds = sum(cell["seconds"] for cells in results.values() for cell in cells) / 60
    cut = read_cut(continued.small)
    ids = "Qwen3's whole vocabulary" if setting.whole_vocabulary else f"{cut.kept:,} of {cut.whole:,} ids, renumbered"
    lines = [
        f"{setting.family}: {setting.layers} layers of {setting.width}, FFN {setting.inner}; {ids}. Dense model: "
        f"{training['steps']:,} steps of {setting.tokens_per_batch:,} tokens; its held-out loss: {curve}.",
        f"{setting.steps} steps; a mixture's step takes {ratio:.2f} x the operations of the dense model's. "
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; {seconds:.0f} minutes.",
        "",
        f"At equal tokens (all after {setting.steps} steps):",
        "",
        table(at_tokens(setting, results)),
        "",
        f"At equal operations (dense after {setting.steps * ratio:.0f} steps):",
        "",
        table(at_operations(setting, results, ratio)),
    ]
    name = f"{setting.family}{'_whole' * setting.whole_vocabulary}"
    plot(setting, results, continued.output / f"{name}.png")
    text = "\n".join(lines)
    (continued.output / f"{name}.md").write_text(text + "\n", "utf-8")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("qwen3", "llama"), default="qwen3")
    parser.add_argument("--arms", help=f"names with commas between: {','.join(ARMS)}")
    parser.add_argument("--seeds", type=int, help="3, or 1 with --full_vocabulary")
    parser.add_argument("--steps", type=int, help="optimizer steps of each mixture")
    parser.add_argument("--full_vocabulary", action="store_true", help="dense, jitter and drop at 151,936 ids")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print what is finished, train nothing")
    args = parser.parse_args()
    main_result = ["dense", "jitter", "drop"]
    args.arms = args.arms.split(",") if args.arms else main_result if args.full_vocabulary else list(ARMS)
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"--arms names {unknown[0]!r}; there are {', '.join(ARMS)}.")
    args.seeds = args.seeds or (1 if args.full_vocabulary else 3)
    return args


def run() -> None:
    """Train what is missing; print the tables and draw the curves."""
    args = arguments()
    quiet()
    setting = Setting(family=args.family, whole_vocabulary=args.full_vocabulary)
    if args.full_vocabulary:  # where a step costs thirty times as much
        setting = replace(setting, steps=60, check_every=20)
    if args.steps:
        setting = replace(setting, steps=args.steps)
    continued = Continued(setting, args.output)
    if not args.table:
        for seed in range(args.seeds):
            for arm in args.arms:
                continued.cell(arm, seed)
    print(report(continued, args.arms, args.seeds))


if __name__ == "__main__":
    run()
