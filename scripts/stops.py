"""How many of a model's answers end by themselves, where this package does not exist: plain transformers, one process.

    python scripts/stops.py --model advisor --input demo_output/corpus/validation.parquet --rows 100

Prints `100 of 100`; exit status 1 if an answer ran into the folder's max_new_tokens.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, cast

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def text(scenario: Any) -> str:
    """A scenario as the user's message: a struct one `key: value` line each."""
    if isinstance(scenario, str):
        return scenario
    return "\n".join(f"{key}: {value}" for key, value in scenario.items() if value is not None)


def stopped(folder: str, scenarios: Sequence[Any], batch_size: int = 50) -> list[bool]:
    """Whether each answer ended by itself, by nothing but the folder's own generation config and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ends: list[bool] = []
    for start in range(0, len(scenarios), batch_size):
        messages = [[{"role": "user", "content": text(s)}] for s in scenarios[start : start + batch_size]]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            written = model.generate(**prompt)[:, prompt["input_ids"].shape[1] :]
        ends += [tokenizer.eos_token_id in row for row in written.tolist()]
    return ends


if __name__ == "__main__":
    cast(Any, sys.modules)["agri_moe"] = None  # from here on, importing it fails
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    ends = stopped(options.model, pq.read_table(options.input)["scenario"].to_pylist()[: options.rows])
    print(f"{sum(ends)} of {len(ends)}")
    sys.exit(0 if all(ends) else 1)
