"""A program that `export` runs on its own: does a folder load where this package does not exist?

    python -P reload_check.py FOLDER EXPECTED

EXPECTED is a safetensors file of what the exported model gave: `prompt` [1, T] of token ids, `logits` [1, T, V],
`written` [1, T + new] of the greedy answer. Exit status 1, and one line for each difference, if the folder gives
anything else.
"""

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def differences(folder: Path, expected: Path) -> list[str]:
    """What plain transformers gives otherwise than the exported model did."""
    with safe_open(expected, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        prompt_BT, logits_BTV, written_BT = (file.get_tensor(name) for name in ("prompt", "logits", "written"))
    torch.set_num_threads(facts["threads"])  # else sums are split otherwise
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoded = tokenizer.apply_chat_template(facts["messages"], add_generation_prompt=True, return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    with torch.inference_mode():
        same = {
            "the chat template gives other token ids": encoded["input_ids"] == prompt_BT[0].tolist(),
            "the logits differ": torch.equal(model(prompt_BT).logits, logits_BTV),
            "the greedy answer differs": torch.equal(_answer(model, prompt_BT, facts["limits"]), written_BT),
        }
    return [text for text, holds in same.items() if not holds]


def _answer(model: Any, prompt_BT: torch.Tensor, limits: dict[str, Any]) -> torch.Tensor:
    return cast(torch.Tensor, model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **limits))


if __name__ == "__main__":
    cast(Any, sys.modules)["agri_moe"] = None  # from here on, importing it fails
    found = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(found))
    sys.exit(1 if found else 0)
