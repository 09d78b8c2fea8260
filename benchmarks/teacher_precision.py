"""What a teacher says in bfloat16 and in float8, against float32, on real rows.

    python benchmarks/teacher_precision.py --teacher FOLDER --data ROWS [--tokenizer FOLDER] [--rows 64]

For each type of `model.teacher.dtype`: mean KL in nats per token from the float32 teacher at the tokens of thought and
advisory, the share of them at which the most probable token is the same, and the bytes of the weights. `float8` needs
torchao (`pip install torchao`), and `float8_dynamic` a GPU besides (`--device cuda`).
"""

import argparse
import os
from typing import get_args

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from measure import OUTPUT, report, table

from agri_moe.data.chat import Segment
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.losses import TokenStatistics, token_statistics
from agri_moe.models.causal import CausalModel
from agri_moe.models.source import ModelConfig
from agri_moe.teacher import Dtype, TeacherConfig


def load(config: TeacherConfig, data: ChatDataModule, device: str) -> CausalModel:
    """The teacher as `DistillModule` loads it."""
    options = ModelConfig(config.source)
    hf = options.load("model.teacher", data.chat, config.torch_dtype, config.quantization())
    return CausalModel(hf).eval().to(device)


@torch.no_grad()
def compare(reference: CausalModel, other: CausalModel, rows: list[dict[str, np.ndarray]], device: str) -> list[float]:
    """Mean KL, and share of agreement, over the supervised tokens of some rows."""
    seen: list[TokenStatistics] = []
    for row in rows:
        ids, segments = (torch.tensor(np.array(row[name]), device=device) for name in ("input_ids", "segment_ids"))
        batch = {"input_ids": ids[None], "position_ids": torch.arange(len(ids), device=device)[None]}
        positions = (segments[1:] >= Segment.THOUGHT).nonzero()[:, 0]
        (theirs, their_head), (ours, our_head) = (
            model(batch, positions, lambda hidden, head: (hidden, head)).read for model in (reference, other)
        )
        seen.append(token_statistics(ours.float(), our_head.float(), ids[1:][positions], theirs, their_head))
    kl = torch.cat([one.kl_M for one in seen])
    return [kl.mean().item(), torch.cat([one.agree_M for one in seen]).float().mean().item()]


def megabytes(model: CausalModel) -> float:
    """Of the weights; a float8 tensor gives itself out for one of bfloat16."""
    size = 0
    for weight in model.parameters():
        parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
        size += sum(getattr(weight, part).nbytes for part in parts) if parts else weight.nbytes
    return size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a Hugging Face folder")
    parser.add_argument("--data", nargs="+", required=True, help="files of rows")
    parser.add_argument("--tokenizer", help="a folder; the teacher's own by default")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    data = ChatDataModule(
        tokenizer=arguments.tokenizer or arguments.teacher,
        train=arguments.data,
        validation_share=0.0,
        max_length=arguments.max_length,
        bad_rows="skip",
        cache_dir=str(OUTPUT / "cache"),
    )
    every = data.rows("train").table
    chosen = np.random.default_rng(0).permutation(len(every))[: arguments.rows].tolist()
    rows = [every[i] for i in chosen]
    reference = load(TeacherConfig(arguments.teacher, dtype="float32"), data, arguments.device)
    found, left_out = [], []
    for dtype in get_args(Dtype):
        config = TeacherConfig(arguments.teacher, dtype=dtype)
        try:
            config.check()
        except ValueError as refused:
            left_out.append(str(refused))
            continue
        model = load(config, data, arguments.device)
        kl, agreement = compare(reference, model, rows, arguments.device)
        found.append([dtype, f"{kl:.6f}", f"{agreement:.2%}", f"{megabytes(model):,.1f}"])
    text = [table(["type", "KL", "agreement", "MB"], found), *(f"Left out: {reason}" for reason in left_out)]
    report("teacher_precision", "\n".join(text), {"rows": found, "teacher": arguments.teacher}, arguments.device)


if __name__ == "__main__":
    main()
