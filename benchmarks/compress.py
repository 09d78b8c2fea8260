"""Compression to a shared core against truncating each expert by itself, and what distillation from a cache regains.

    python benchmarks/compress.py [--sources scratch,upcycled,wide] [--output DIR]

Small MoEs are trained on the real rows (plant diseases, soil in English, XQuAD in Hindi; ids renumbered, see
small_vocabulary.py) until their validation loss no longer falls or their steps are spent: `scratch` from random
weights, its experts narrower than the model, as those of Qwen3-30B-A3B are; `upcycled` from a dense model, as this
package makes them; `wide` from random weights, with experts wider than the model. Each is compressed to at most a half
and a quarter of its experts' room, in several ways:

    own SVD           the three matrices of each expert truncated by themselves (Eckart and Young), of equal size
    own SVD, rows     the same in the metric of the expert's calibration tokens (as in SVD-LLM, arXiv 2403.07378)
    mean core         shared core from the weights, neurons in the order that they have
    matched core      the same, neurons matched first
    mean core, rows   fitted on calibration tokens, neurons not matched
    shared core       as `compress --calibration` does it: matched, fitted on calibration tokens

The calibration tokens are training rows. The last is then distilled from the answers of the MoE that it came from,
written to disk by `cache`. A finished cell is a JSON file, as in ablation.py; started again, the script goes on.
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from ablation import SETTINGS, Ablation, Training, Weights, build, quiet, qwen3, remember, trainer
from loss_step import processor
from measure import table
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from agri_moe.cli import main
from agri_moe.models import compress as compression
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.compress import Calibration, Experts, Tokens, covariance, expert_tokens, routing_weights
from agri_moe.models.shared_core import SharedCoreForCausalLM, multiplied_out, sparse_layers
from agri_moe.models.upcycle import write_moe_config

OUTPUT = Path(__file__).parent / "output" / "compress"
# Not cross-entropy: the sources have not seen the last of the rows, and a student that learned them would pass them.
OBJECTIVE = {"kl": {"weight": 1.0, "segments": ["thought", "assistant"]}, "ce": {"weight": 0.0}}
PRETRAINING = {"ce": {"weight": 1.0}, "balance": {"weight": 0.01}, "router_z": {"weight": 0.001}}


def mixture(experts: int, top_k: int, width: int) -> dict[str, Any]:
    """Config of a small Qwen3-MoE."""
    sizes = {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}
    return qwen3(128, 4, 384) | {"model_type": "qwen3_moe", "norm_topk_prob": True} | sizes


DENSE = Training(150, 3e-3, qwen3(128, 3, 96))  # what is upcycled
SOURCES = {
    "scratch": Training(1800, 2e-3, mixture(16, 4, 64), check_every=150, patience=2),
    "upcycled": Training(1200, 2e-3, DENSE.shape, check_every=150, patience=2),
    "wide": Training(1800, 2e-3, mixture(8, 2, 192), check_every=150, patience=2),
}
# Not samples: their noise stays when the student is as good as its teacher, and it begins very near. The best ids and
# the tail's mass have their minimum there too, without noise.
ANSWERS = ("--kind", "topk", "--k", "256")
# Little is to be learned, so noise must be less: large steps, no decay, and a rate that goes down to nothing.
DISTILLED: dict[str, Any] = {
    "steps": 500,
    "tokens_per_batch": 4096,
    "learning_rate": 5e-4,
    "optimizer": {"warmup_steps": 20, "weight_decay": 0.0, "final_learning_rate": 0.0},
}
CALIBRATION_TOKENS = 32768
SHARES = (0.5, 0.25)
WAYS = ("own SVD", "own SVD, rows", "mean core", "matched core", "mean core, rows", "shared core")


class Compression:
    """The cells of one source.

    Args:
        ablation: Rows and trainings.
        kind: scratch or upcycled.
    """

    def __init__(self, ablation: Ablation, kind: str) -> None:
        self.ablation = ablation
        self.kind = kind
        self.training = SOURCES[kind]
        self.folder = ablation.output / kind

    # ------------------------------------------------------------------ the source

    def source(self) -> dict[str, Any]:
        """Train the MoE once; how that went."""
        return remember(self.ablation.output, self.kind, {"training": asdict(self.training)}, self._train)

    def _train(self) -> dict[str, Any]:
        network: dict[str, Any] = {"config": self.training.shape}
        if self.kind == "upcycled":
            network = self.ablation.student(0)
        options = {"network": network, "objective": PRETRAINING}
        module, plateau = self.ablation.fit("pretrain.PretrainModule", options, self.training, 0)
        module.model.hf.load_state_dict(plateau.weights)
        module.model.hf.save_pretrained(self.folder)
        write_moe_config(self.folder)
        module.chat.save(self.folder)
        return {"curve": plateau.curve}

    @functools.cached_property
    def config(self) -> Any:
        """Of the source."""
        return load_config(str(self.folder), "source")

    def rank(self, share: float) -> int:
        """The largest rank of wrappers that takes at most this share of the experts' room."""
        experts, width, inner = self.config.num_experts, self.config.hidden_size, self.config.moe_intermediate_size
        return int((share * experts - 1) * 3 * width * inner / (4 * experts * width)) // 8 * 8

    def size(self, share: float) -> int:
        """Parameters of a layer's experts with a shared core of that rank."""
        experts, width, inner = self.config.num_experts, self.config.hidden_size, self.config.moe_intermediate_size
        return 3 * width * inner + 4 * experts * width * self.rank(share)

    # ------------------------------------------------------------------ ways to compress

    def compressed(self, way: str, share: float) -> Any:
        """A stock model with the experts as one of WAYS leaves them."""
        calibration = Calibration(self.ablation.corpus.train, {}, CALIBRATION_TOKENS, self.ablation.setting.max_length)
        if way.startswith("own SVD"):
            return self._truncated(share, calibration if way.endswith("rows") else None)
        rows = calibration if way.endswith("rows") or way == "shared core" else None
        return multiplied_out(self._core(way, share, rows))

    def _core(self, way: str, share: float, rows: Calibration | None) -> SharedCoreForCausalLM:
        unmatched: Callable[[Experts], Experts] = compression.balanced
        matching = unmatched if way.startswith("mean") else compression.matched
        with patch.object(compression, "matched", matching):
            return compression.compress(str(self.folder), self.rank(share), rows, "cpu")[0]

    @torch.no_grad()
    def _truncated(self, share: float, rows: Calibration | None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        inputs = None if rows is None else compression.layer_inputs(str(self.folder), rows, "cpu")
        for number, layer in enumerate(sparse_layers(model)):
            mlp, tokens = layer.mlp, None
            experts = Experts.of(mlp.experts.gate_up_proj, mlp.experts.down_proj)
            if inputs is not None:
                tokens = expert_tokens(inputs[number], routing_weights(mlp.gate, inputs[number]), seed=number)
            count, width, inner = len(experts.gate_EFD), *reversed(experts.gate_EFD.shape[1:])
            rank = self.size(share) // (3 * count * (width + inner))
            for e in range(count):
                gate, up, down = truncated(experts, e, rank, tokens[e] if tokens else None)
                mlp.experts.gate_up_proj[e] = torch.cat([gate, up])
                mlp.experts.down_proj[e] = down
        return model

    # ------------------------------------------------------------------ cells

    def cell(self, name: str, work: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """A result, remembered."""
        settings |= {"training": asdict(self.training), "calibration": CALIBRATION_TOKENS}
        return remember(self.ablation.output, f"{self.kind}_{name.replace(' ', '_')}", settings, work)

    def untouched(self) -> dict[str, Any]:
        """The source's losses."""
        return self.cell("source", lambda: self._score(AutoModelForCausalLM.from_pretrained(self.folder)))

    def way(self, way: str, share: float) -> dict[str, Any]:
        """The losses of one way."""
        return self.cell(f"{way} {share}", lambda: self._score(self.compressed(way, share)), share=share)

    def distilled(self, share: float) -> dict[str, Any]:
        """The losses of the shared core once it has learnt from the source's answers on disk."""
        settings = {"student": DISTILLED, "answers": ANSWERS, "objective": OBJECTIVE}
        return self.cell(f"distilled {share}", functools.partial(self._distil, share), share=share, **settings)

    def _score(self, model: Any) -> dict[str, Any]:
        options = {"network": {"source": str(self.folder), "upcycle": None}, "objective": PRETRAINING}
        module = build("pretrain.PretrainModule", options)
        scorer = trainer(callbacks=[Weights(model.state_dict())])
        scorer.validate(module, datamodule=self.ablation.data(0), verbose=False)
        return {key.removeprefix("val/"): float(value) for key, value in scorer.callback_metrics.items()}

    def _distil(self, share: float) -> dict[str, Any]:
        words = (self.kind, *(word for word in ANSWERS if not word.startswith("-")))
        student, answers = self.folder.with_name(f"{self.kind}_{share}"), self.folder.with_name("_".join(words))
        if not student.exists():
            rows = [*self.ablation.corpus.train]
            limits = ("--calibration_tokens", str(CALIBRATION_TOKENS), "--max_length", "1024", "--device", "cpu")
            chosen = ("--rank", str(self.rank(share)), "--calibration", json.dumps(rows), *limits)
            main(["compress", "--source", str(self.folder), "--output", str(student), *chosen])
        teacher = {"source": str(self.folder), "view": "same", "dtype": "float32"}
        options: dict[str, Any] = {"student": {"source": str(student)}, "objective": OBJECTIVE}
        self._cache(answers, options | {"teacher": teacher})
        options["teacher"] = {"cache": str(answers)}
        torch.manual_seed(0)
        module = build(
            "distill.DistillModule", options | {name: DISTILLED[name] for name in ("learning_rate", "optimizer")}
        )
        data = self.ablation.data(0)
        data.tokens_per_batch = DISTILLED["tokens_per_batch"]
        trainer(max_steps=DISTILLED["steps"], limit_val_batches=0).fit(module, datamodule=data)
        hf: Any = module.model.hf
        return self._score(multiplied_out(hf))

    def _cache(self, answers: Path, options: dict[str, Any]) -> None:
        """Ask the source once, with the product's own command."""
        if (answers / "manifest.json").exists():
            return
        setting, corpus = self.ablation.setting, self.ablation.corpus
        data = {
            "train": corpus.train,
            "validation": corpus.validation,
            "tokenizer": corpus.tokenizer,
            "format": asdict(corpus.format),
            "max_length": setting.max_length,
            "tokens_per_batch": setting.tokens_per_batch,
            "bad_rows": "skip",
        }
        config = {
            "model": {"class_path": "agri_moe.models.distill.DistillModule", "init_args": options},
            "data": {"class_path": "agri_moe.data.chat_data.ChatDataModule", "init_args": data},
            "trainer": {"accelerator": "cpu", "logger": False, "max_steps": 1},
        }
        path = answers.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config, allow_unicode=True))
        main(["cache", "--config", str(path), "--output", str(answers), *ANSWERS])


def truncated(experts: Experts, e: int, rank: int, tokens: Tokens | None) -> list[Tensor]:
    """Gate, up and down of an expert, each the nearest of a rank; in the metric of its tokens, if there are any."""
    gate, up, down = experts.gate_EFD[e], experts.up_EFD[e], experts.down_EDF[e]
    read, hidden = None, None
    if tokens is not None:
        read = torch.linalg.cholesky(covariance(tokens))
        neurons = silu(tokens.x_nD @ gate.T) * (tokens.x_nD @ up.T)
        hidden = torch.linalg.cholesky(covariance(Tokens(neurons, tokens.counts_n)))
    return [nearest(gate, rank, read), nearest(up, rank, read), nearest(down, rank, hidden)]


def nearest(weight: Tensor, rank: int, root: Tensor | None) -> Tensor:
    """The matrix of a rank that is nearest to `weight` in |(weight - x) root|."""
    seen = weight if root is None else weight @ root
    basis = torch.linalg.svd(seen, full_matrices=False).U[:, :rank]
    return basis @ (basis.T @ weight)


def report(cells: Compression, shares: tuple[float, ...]) -> str:
    """A table of losses above the source's."""
    base, training = cells.untouched(), cells.source()
    curve = ", ".join(f"{loss:.3f} at {step}" for step, loss in training["curve"][-4:])
    lines = [f"{cells.kind}: validation loss {base['ce']:.4f} on all rows (training: {curve})"]
    rows = []
    for share in shares:
        start = cells.way("shared core", share)["ce"] - base["ce"]
        results = {way: cells.way(way, share)["ce"] - base["ce"] for way in WAYS}
        results["shared core, distilled"] = cells.distilled(share)["ce"] - base["ce"]
        size = cells.size(share) / (3 * cells.config.num_experts * cells.config.hidden_size)
        room = size / cells.config.moe_intermediate_size
        rows += [[f"{room:.0%}", way, f"{loss:+.4f}"] for way, loss in results.items()]
        regained = 1 - results["shared core, distilled"] / start
        lines.append(
            f"{room:.0%} of the room, rank {cells.rank(share)}: distillation regains {regained:.0%} of the loss."
        )
    return "\n".join([*lines, "", table(["experts' room", "way", "loss above the source's"], rows)])


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default=",".join(SOURCES), help="which MoEs, with commas between")
    parser.add_argument("--steps", type=int, help="of the distillation")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    quiet()
    if arguments.steps:
        DISTILLED["steps"] = arguments.steps
    ablation = Ablation(replace(SETTINGS["real"], dense=DENSE), arguments.output)
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {ablation.corpus.about}")
    for kind in arguments.sources.split(","):
        cells = Compression(ablation, kind)
        cells.source()
        print(f"\n{report(cells, SHARES)}", flush=True)


if __name__ == "__main__":
    run()
