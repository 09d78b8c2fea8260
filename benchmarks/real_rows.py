"""Upcycling and distillation on real rows, with Qwen3's real tokenizer and vocabulary of 151,936.

    python benchmarks/real_rows.py [--steps 40] [--seeds 2]

Rows: plant diseases, soil (English) and XQuAD (Hindi), from the folder named by AGRI_MOE_DATA. Trains a small Qwen3
teacher and a smaller dense one from random weights, upcycles the dense one, distils, and prints validation loss per
segment before and after. Short on purpose: most of the time goes into the heads.
"""

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from agri_moe.cli import main
from agri_moe.models.base import parameter_counts

DATA = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUTPUT = Path(__file__).parent / "output" / "real_rows"
COLUMNS = ("loss_thought", "loss_assistant", "ce", "kl", "agreement", "balance_score")


def config(module: str, options: dict[str, Any], seed: int, steps: int, folder: Path) -> Path:
    """Write one run's config."""
    names = ("plant_disease", "soil", "hindi_qa")
    content = {
        "seed_everything": seed,
        "model": {
            "class_path": f"agri_moe.models.{module}",
            "init_args": options | {"optimizer": {"warmup_steps": 10}},
        },
        "data": {
            "class_path": "agri_moe.data.chat_data.ChatDataModule",
            "init_args": {
                "train": [str(DATA / f"{name}_train.parquet") for name in names],
                "validation": [str(DATA / f"{name}_val.parquet") for name in names],
                "tokenizer": str(DATA / "qwen3-0.6b"),
                "max_length": 2048,
                "tokens_per_batch": 4096,
                "bad_rows": "skip",  # some of XQuAD's passages are longer than 2,048 tokens
                "seed": seed,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "max_steps": steps,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 16,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": steps,
            "enable_model_summary": False,
        },
    }
    path = folder / f"{module.split('.')[0]}_{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def qwen3(width: int, layers: int) -> dict[str, Any]:
    """A small Qwen3 at the real vocabulary."""
    shape = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "head_dim": 32,
    }
    heads = {
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": True,
    }
    return {"model_type": "qwen3", "vocab_size": 151_936} | shape | heads


def fit(path: Path, folder: Path, name: str) -> float:
    """Train and export; seconds of training."""
    started = time.perf_counter()
    main(["fit", "--config", str(path)])
    seconds = time.perf_counter() - started
    main(["export", "--run_root", str(folder), "--output", str(folder / name), "--dtype", "float32"])
    return seconds


def score(path: Path, source: Path) -> dict[str, Any]:
    """Validation of a model folder, against the teacher."""
    student = f"--model.student={{source: {source}, upcycle: null}}"
    cli = main(["validate", "--config", str(path), "--ckpt_path", "source", student])
    assert cli is not None
    metrics = cli.trainer.callback_metrics
    values = {name: float(metrics[f"val/{name}"]) for name in COLUMNS if f"val/{name}" in metrics}
    total, active, _ = parameter_counts(cli.model.model)
    return values | {"total": total, "active": active}


def one_seed(seed: int, steps: int) -> list[dict[str, Any]]:
    """Teacher, dense, upcycled and distilled model of one seed."""
    folder = OUTPUT / f"seed{seed}"
    folder.mkdir(parents=True)
    seconds = {}
    for name, shape in (("teacher", qwen3(256, 4)), ("dense", qwen3(128, 4))):
        options = {"network": {"config": shape}, "learning_rate": 2e-3}
        seconds[name] = fit(config("pretrain.PretrainModule", options, seed, steps, folder), folder, name)
    upcycled = folder / "upcycled"
    main(["upcycle", "--source", str(folder / "dense"), "--output", str(upcycled), "--num_experts", "8"])
    main(["audit", "--student", str(upcycled)])
    options = {
        "student": {"source": str(upcycled)},
        "teacher": {"source": str(folder / "teacher"), "dtype": "float32"},
        "objective": {"ce": {"weight": 0.5}, "kl": {"weight": 1.0}, "cka": {"weight": 0.1}},
        "learning_rate": 2e-3,
    }
    path = config("distill.DistillModule", options, seed, steps, folder)
    seconds["distilled"] = fit(path, folder, "distilled")
    return [
        {"seed": seed, "model": name, "seconds": seconds.get(name, 0.0)} | score(path, folder / name)
        for name in ("teacher", "dense", "upcycled", "distilled")
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = ("seed", "model", *COLUMNS, "total", "active", "seconds")
    lines = ["  ".join(f"{h:>14}" for h in head)]
    for row in rows:
        cells = [row.get(h, "-") for h in head]
        lines.append("  ".join(f"{c:>14.4f}" if isinstance(c, float) else f"{c:>14}" for c in cells))
    return "\n".join(lines)


def run() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each of the three trainings")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real rows.")
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    rows = [row for seed in range(args.seeds) for row in one_seed(seed, args.steps)]
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{args.steps} steps of up to 4,096 tokens each; losses in nats per token\n\n{table(rows)}")
    (OUTPUT / "result.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run()
