"""Answers from a model: prompts in, thought and advisory out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from agri_moe.data.chat import Answer, Chat, render_scenario, usable_text
from agri_moe.models.causal import CausalModel

_OPEN, _CLOSE = "<think>", "</think>"
_PLACES = {"system": "\ue000system\ue001", "user": "\ue000user\ue001"}


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


class ModelTemplate:
    """A model's own chat template as the frame of its answers, thoughts in `<think>...</think>`.

    For a teacher that never saw our markers. As in `Chat`, no text can become a control token: the template is filled
    with placeholders, and what stands between two control tokens is tokenised as one piece with every added token
    split.

    Args:
        tokenizer: The model's own as it was published: a `Chat` changes the tokenizer that it is given.
        chat: A chat over the same vocabulary, for plain pieces and the default instruction.
        end_ids: Where the model ends its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.end_ids = list(end_ids)
        self.pad_id: int = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._frame = self._render(_PLACES)
        self._opened = self._frame.rstrip().endswith(_OPEN)  # some templates open the thought for the model
        special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._dropped = {token for token, text in special.items() if text not in (_OPEN, _CLOSE)}
        self._check()

    @classmethod
    def load(cls, model: PreTrainedModel, source: str, chat: Chat) -> "ModelTemplate":
        """The template that was published with a model; ValueError says why there is none to use."""
        tokenizer = AutoTokenizer.from_pretrained(source)
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        if not tokenizer.chat_template or ends is None:
            missing = "eos_token_id in its generation_config.json" if tokenizer.chat_template else "chat template"
            raise ValueError(f"--template model: {source} has no {missing}; add it there, or use --template own.")
        if tokenizer.chat_template == chat.chat_template:
            raise ValueError(f"--template model: the chat template of {source} is ours; use --template own.")
        return cls(tokenizer, chat, [ends] if isinstance(ends, int) else ends)

    def encode_prompt(self, scenario: str | Mapping[str, Any], system: str | None = None) -> list[int]:
        """The ids to generate from, up to and with the template's generation prompt; the user says our header too."""
        texts = {
            _PLACES["system"]: usable_text("system", system) or self.chat.format.default_system,
            _PLACES["user"]: f"{self.chat.format.scenario_header}\n{render_scenario(scenario)}",
        }
        added: dict[str, int] = self.tokenizer.get_added_vocab()
        longest_first = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
        ids: list[int] = []
        for piece in re.split(f"({longest_first})", self._frame) if added else [self._frame]:
            if piece in added:
                ids.append(added[piece])
            else:
                ids += self.chat.encode_text(re.sub("|".join(texts), lambda place: texts[place[0]], piece))
        return ids

    def parse(self, ids: Sequence[int]) -> Answer:
        """Splits what was generated at `</think>`; without one, an open thought is all there is, or there is none."""
        ids = list(ids)
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode([token for token in ids[:end] if token not in self._dropped])
        text = str(text).strip()
        if self._opened and not text.startswith(_OPEN):
            text = _OPEN + text
        thought, closed, advisory = text.partition(_CLOSE)
        if not closed and not thought.startswith(_OPEN):
            return Answer(None, text, end is not None)
        return Answer(thought.removeprefix(_OPEN).strip(), advisory.strip(), end is not None and bool(closed))

    def _render(self, texts: Mapping[str, str]) -> str:
        messages = [{"role": role, "content": text} for role, text in texts.items()]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(
                f"--template model: the chat template of {self.tokenizer.name_or_path} does not take a system and a "
                f"user message ({error}); use --template own."
            ) from error

    def _check(self) -> None:
        """Refuses a template whose prompts would not be the ids that a server of this model sees."""
        system, scenario = "विचार करें; think.", "फसल: धान (Paddy) 12.5 kg\n\n  पत्ती पीली"
        texts = {"system": system, "user": f"{self.chat.format.scenario_header}\n{scenario}"}
        served = self.tokenizer.encode(self._render(texts), add_special_tokens=False)
        if self.encode_prompt(scenario, system) != served:
            raise ValueError(
                f"--template model: the chat template of {self.tokenizer.name_or_path} changes the text that it is "
                "given, or its tokenizer the space around control tokens; use --template own."
            )


@torch.no_grad()
def sample(
    model: PreTrainedModel | CausalModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    **sampling: Any,
) -> Iterator[list[int]]:
    """Go on from prompts in batches, in order: the new token ids, up to and with the first that ends the text.

    Args:
        model: A causal model, on its device, in eval mode. If it is sharded, every rank must run as many batches.
        prompts: Token ids.
        end_ids: Generation stops at any of these.
        pad_id: Fills shorter prompts on the left.
        max_new_tokens: At most so many new tokens.
        batch_size: Prompts that run together.
        **sampling: How tokens are chosen, as `transformers` names it; what is not named comes from the model's
            generation config.
    """
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids),
            pad_token_id=pad_id,
            use_cache=True,
            **sampling,
        )
        for row in output[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in end_ids), len(row))
            yield row[: end + 1]


def generate(
    model: PreTrainedModel | CausalModel,
    chat: Chat | ModelTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    batch_size: int = 16,
) -> Iterator[Generated]:
    """Answer prompts in batches, in order.

    Args:
        model: As in `sample`.
        chat: What made the prompts and reads the answers.
        prompts: Token ids, each ending where the model goes on.
        max_new_tokens: The answer is cut off after so many tokens.
        temperature: 0 is greedy; otherwise samples at this temperature.
        batch_size: Prompts that run together, padded on the left.
    """
    end_ids = [chat.end_id] if isinstance(chat, Chat) else chat.end_ids
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    answers = sample(
        model,
        prompts,
        end_ids=end_ids,
        pad_id=chat.pad_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        **options,
    )
    for ids in answers:
        answer = chat.parse(ids)
        ended = bool(ids) and ids[-1] in end_ids
        yield Generated(answer.thought, answer.advisory, len(ids), "end" if ended else "length")
