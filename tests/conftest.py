"""Small real things that many tests share: a corpus, dense and sparse checkpoints, a data module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
# Without it, the first test with a launcher of Lightning's (ddp on one device too) gives every later one in its process
# as many threads as there are cores: sums are split otherwise, and weights differ from those of another process.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus, small: train.parquet, validation.parquet, tokenizer/."""
    from agri_moe.data.synthetic import write_corpus

    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    write_corpus(folder, train_rows=120, validation_rows=24, seed=0, vocab_size=600)
    return folder


def _dense(folder: Path, corpus: Path, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    options = {
        "model_type": "qwen3",
        "vocab_size": 128 * (1 + (len(tokenizer) + 4) // 128),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A dense Qwen3 checkpoint with the corpus' tokenizer, markers not yet in it."""
    return _dense(tmp_path_factory.mktemp("dense") / "dense", corpus)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A wider and deeper dense checkpoint with the same tokenizer, and a chat template in Qwen3's form."""
    folder = _dense(tmp_path_factory.mktemp("teacher") / "teacher", corpus, hidden_size=48, num_hidden_layers=4)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message.role }}]\n"
        "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    return folder


@pytest.fixture(scope="session")
def chat(corpus: Path) -> Any:
    """The corpus' tokenizer with its markers."""
    from agri_moe.data.chat import Chat

    return Chat.load(str(corpus / "tokenizer"))


@pytest.fixture(scope="session")
def rows(chat: Any) -> list[Any]:
    """Twelve encoded rows."""
    import numpy as np

    from agri_moe.data.packing import PackedRow
    from agri_moe.data.synthetic import make_rows

    encoded = [chat.encode(row) for row in make_rows(12, seed=1, split="train")]
    return [PackedRow(i, np.array(e.input_ids), np.array(e.segment_ids)) for i, e in enumerate(encoded)]


def _rows(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """The data section of a small run."""
    return {
        "class_path": "agri_moe.data.chat_data.ChatDataModule",
        "init_args": {
            "train": str(corpus / "train.parquet"),
            "validation": str(corpus / "validation.parquet"),
            "tokenizer": str(corpus / "tokenizer"),
            "max_length": 512,
            "tokens_per_batch": 1024,
            "cache_dir": str(tmp_path / "cache"),
        },
    }


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """The logits of a few rows go through several blocks, as thousands of rows do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agri_moe.losses.logits.CPU_BLOCK_LOGITS", 64)
        yield


@pytest.fixture
def distill_config(tmp_path: Path, corpus: Path, dense: Path, teacher: Path) -> Path:
    """A complete config of a small distillation run, with its output in tmp_path."""
    import yaml

    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "agri_moe.models.distill.DistillModule",
            "init_args": {
                "student": {"source": str(dense), "upcycle": {"num_experts": 4, "num_experts_per_tok": 2}},
                "teacher": {"source": str(teacher), "dtype": "float32"},
                "objective": {
                    "ce": {"weight": 0.5},
                    "kl": {"weight": 1.0},
                    "cka": {"weight": 0.1, "sample_tokens": 64},
                },
                "learning_rate": 1e-2,
                "optimizer": {"warmup_steps": 2},
            },
        },
        "data": _rows(corpus, tmp_path),
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path),
            "max_steps": 6,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 12,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "agri_moe.callbacks.resume.Checkpoint", "init_args": {"every_n_steps": 2}},
                {"class_path": "agri_moe.callbacks.router.RouterMonitor", "init_args": {"every_n_steps": 1}},
                {"class_path": "agri_moe.callbacks.cka.CKAMonitor"},
                {
                    "class_path": "agri_moe.callbacks.samples.SampleAdvisories",
                    "init_args": {"rows": 2, "max_new_tokens": 8},
                },
                {"class_path": "agri_moe.callbacks.throughput.Throughput", "init_args": {"every_n_steps": 1}},
            ],
        },
    }
    path = tmp_path / "distill.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return path


@pytest.fixture
def layerwise_config(tmp_path: Path, corpus: Path, dense: Path) -> Any:
    """A complete config of a small layer-wise run; returns a function that writes it with changes."""

    import yaml

    def write(name: str = "layerwise.yaml", max_steps: int = 4, accumulate: int = 2, **model: Any) -> str:
        settings = {
            "seed_everything": 0,
            "model": {
                "class_path": "LayerwiseModule",
                "init_args": {
                    "source": str(dense),
                    "dtype": "float32",
                    "num_experts": 4,
                    "expert_width": 0.25,
                    "learning_rate": 3e-3,
                    "optimizer": {"warmup_steps": 1},
                }
                | model,
            },
            "data": _rows(corpus, tmp_path),
            "trainer": {
                "accelerator": "cpu",
                "default_root_dir": str(tmp_path),
                "max_steps": max_steps,
                "accumulate_grad_batches": accumulate,
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
                "check_val_every_n_epoch": None,
                "val_check_interval": 4,
                "limit_val_batches": 1,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [
                    {
                        "class_path": "agri_moe.callbacks.resume.Checkpoint",
                        "init_args": {"every_n_steps": 1, "keep": -1},
                    },
                    {"class_path": "agri_moe.callbacks.router.RouterMonitor", "init_args": {"every_n_steps": 1}},
                    {"class_path": "agri_moe.callbacks.throughput.Throughput", "init_args": {"every_n_steps": 1}},
                ],
            },
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if any weights are loaded."""

    def loaded(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", loaded)
    monkeypatch.setattr("agri_moe.models.source.load_upcycled", loaded)
