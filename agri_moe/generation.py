"""Answers from a model: prompts in, thought and advisory out."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from agri_moe.data.chat import Chat


class Generated(NamedTuple):
    """One answer."""

    thought: str | None
    advisory: str
    tokens: int  # generated, the end of text included
    stop_reason: str  # "end" (the model ended by itself) or "length"

    def columns(self) -> dict[str, Any]:
        """As columns beside those of the row that was answered."""
        return {
            "generated_thought": self.thought,
            "generated_advisory": self.advisory,
            "tokens": self.tokens,
            "stop_reason": self.stop_reason,
        }


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    batch_size: int = 16,
) -> Iterator[Generated]:
    """Answer prompts in batches, in order.

    Args:
        model: A Hugging Face causal model, on its device, in eval mode.
        chat: The tokenizer and its markers.
        prompts: Token ids, each ending where the model goes on.
        max_new_tokens: The answer is cut off after so many tokens.
        temperature: 0 is greedy; otherwise samples at this temperature.
        batch_size: Prompts that run together, padded on the left.
    """
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[chat.pad_id] * (width - len(p)) + list(p) for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=chat.end_id,
            pad_token_id=chat.pad_id,
            use_cache=True,
            **sampling,
        )
        for row in output[:, width:].tolist():
            ended = chat.end_id in row
            answer_ids = row[: row.index(chat.end_id) + 1] if ended else row
            answer = chat.parse(answer_ids)
            yield Generated(answer.thought, answer.advisory, len(answer_ids), "end" if ended else "length")
