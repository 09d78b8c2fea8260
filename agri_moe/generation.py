"""Answers from a model: prompts in, thought and advisory out.

Shapes: B rows of a batch, T tokens so far, V vocabulary.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from agri_moe.data.chat import Answer, Chat, render_scenario, usable_text
from agri_moe.models.causal import CausalModel

Watch = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], None]
_OPEN, _CLOSE = "<think>", "</think>"
_PLACES = {"system": "\ue000system\ue001", "user": "\ue000user\ue001"}


class Generated(NamedTuple):
    """One answer.

    Attributes:
        thought: None where the model was not asked for one, or wrote none.
        advisory: Empty where it did not come to one.
        tokens: Generated, the end of text included.
        stop_reason: `end`, the model ended by itself; `thought_budget`, it did, but its thought was closed for it;
            `length`, cut off; `stopped` by whoever was reading. Empty while the answer is being written.
        seconds: Wall time of the row's batch divided by its rows, so that a file's rows add up to the time it took.
    """

    thought: str | None
    advisory: str
    tokens: int
    stop_reason: str
    seconds: float = 0.0

    def columns(self) -> dict[str, Any]:
        """As columns beside those of the row that was answered."""
        return {
            "generated_thought": self.thought,
            "generated_advisory": self.advisory,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "stop_reason": self.stop_reason,
        }


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Args:
        max_new_tokens: An answer is cut off after so many tokens.
        max_thought_tokens: A thought is closed after so many tokens, and the advisory begins; None leaves it open.
        temperature: 0 is greedy; otherwise samples at this temperature.
        top_p: Of sampling, the least set of tokens with this probability; None is what the model's
            generation_config.json says.
        top_k: Of sampling, so many of the most probable tokens, 0 all of them; None as with top_p.
        seed: Of sampling. The same rows in the same batches are answered in the same way.

    Raises:
        ValueError: If a value cannot be meant.
    """

    max_new_tokens: int = 512
    max_thought_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens is {self.max_new_tokens}: it must be at least 1.")
        if self.max_thought_tokens is not None and not 1 <= self.max_thought_tokens < self.max_new_tokens:
            raise ValueError(
                f"--max_thought_tokens is {self.max_thought_tokens}: it must be at least 1, and less than "
                f"--max_new_tokens ({self.max_new_tokens}), which the advisory needs too."
            )
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature:g}: it must be 0 (greedy) or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p is {self.top_p:g}: it must be above 0 and at most 1.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"--top_k is {self.top_k}: it must be at least 0, which is all tokens.")
        if self.temperature == 0 and (self.top_p, self.top_k) != (None, None):
            raise ValueError("--top_p and --top_k choose among sampled tokens: add --temperature above 0.")

    def options(self) -> dict[str, Any]:
        """As `transformers` names them."""
        if self.temperature == 0:
            return {"do_sample": False}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True} | {name: value for name, value in chosen.items() if value is not None}


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
        self.opened = self._frame.rstrip().endswith(_OPEN)  # some templates open the thought for the model
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
        if self.opened and not text.startswith(_OPEN):
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


@dataclass(frozen=True)
class ThoughtBudget:
    """Where thoughts end that do not end by themselves.

    Args:
        tokens: So many tokens into the answer.
        close_id: The token that ends a thought.
        closing: What is written there: that token with the space that training rows have around it.
        open_id: The token that must have been written for a thought to be open; None where the prompt opens it.
    """

    tokens: int
    close_id: int
    closing: tuple[int, ...]
    open_id: int | None = None

    @classmethod
    def of(cls, chat: Chat | ModelTemplate, tokens: int) -> "ThoughtBudget":
        """In the form of `chat`; ValueError if its thoughts do not end in a token of their own."""
        if isinstance(chat, Chat):
            close, space = chat.marker_ids["assistant"], chat.encode_text("\n")
            return cls(tokens, close, (*space, close, *space))
        added = chat.tokenizer.get_added_vocab()
        if missing := [tag for tag in (_OPEN, _CLOSE) if tag not in added]:
            raise ValueError(
                f"--max_thought_tokens: {chat.tokenizer.name_or_path} has no token {missing[0]}; leave it out."
            )
        space, after = chat.chat.encode_text("\n"), chat.chat.encode_text("\n\n")
        opens = None if chat.opened else added[_OPEN]
        return cls(tokens, added[_CLOSE], (*space, added[_CLOSE], *after), opens)

    def cut(self, new_ids: Sequence[int]) -> bool:
        """Whether an answer's thought was closed here, and not by the model."""
        before = new_ids[: self.tokens]
        opened = self.open_id is None or self.open_id in before
        return len(new_ids) > self.tokens and opened and self.close_id not in before


class _CloseThoughts(LogitsProcessor):
    """Leaves open thoughts nothing but their closing once the budget is spent; other rows stay as they are."""

    def __init__(self, budget: ThoughtBudget, prompt_tokens: int) -> None:
        self.budget = budget
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after the tokens [B, T], prompts included."""
        budget, end = self.budget, self.prompt_tokens + self.budget.tokens
        place = input_ids.shape[1] - end
        if not 0 <= place < len(budget.closing):
            return scores
        before_BT = input_ids[:, self.prompt_tokens : end]
        open_B = (before_BT != budget.close_id).all(1)
        if budget.open_id is not None:
            open_B &= (before_BT == budget.open_id).any(1)
        forced_V = torch.full_like(scores[0], -torch.inf)
        forced_V[budget.closing[place]] = 0
        return torch.where(open_B[:, None], forced_V, scores)


@torch.no_grad()
def sample(
    model: PreTrainedModel | CausalModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    budget: ThoughtBudget | None = None,
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
        budget: Where thoughts are closed; None leaves them open.
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
            logits_processor=LogitsProcessorList([_CloseThoughts(budget, width)] if budget else []),
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
    batch_size: int = 16,
    first_row: int = 0,
    watch: Watch | None = None,
    **decoding: Any,
) -> Iterator[Generated]:
    """Answer prompts in batches, in order.

    Args:
        model: As in `sample`.
        chat: What made the prompts and reads the answers.
        prompts: Token ids, each ending where the model goes on.
        batch_size: Prompts that run together, padded on the left.
        first_row: Number of the first prompt among all that are answered, in as many calls as one likes; what is
            sampled hangs on it and on the seed.
        watch: Told of each batch, its prompts and the ids written after them, before its first answer is given.
        **decoding: Fields of `Decoding`.
    """
    writer = _Writer(model, chat, Decoding(**decoding))
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        began = time.perf_counter()
        written = writer.write(batch, first_row + start)
        seconds = (time.perf_counter() - began) / len(batch)
        if watch is not None:
            watch(batch, written)
        for ids in written:
            yield writer.read(ids)._replace(seconds=seconds)


def stream(
    model: PreTrainedModel | CausalModel,
    chat: Chat | ModelTemplate,
    prompt: Sequence[int],
    *,
    worker: Executor,
    stop: Event | None = None,
    watch: Watch | None = None,
    **decoding: Any,
) -> Iterator[Generated]:
    """Answer one prompt: the answer so far as often as it has grown, and at last the whole.

    No answer but the last has a stop reason, and none ends in half a letter: a Devanagari letter is several bytes,
    which may be several tokens. The model stops at its next token once `stop` is set, or this iterator is closed.

    Args:
        model: As in `sample`.
        chat: What made the prompt and reads the answer.
        prompt: Token ids, ending where the model goes on.
        worker: Runs the model. One with a single thread lets several streams take turns.
        stop: Set it to stop the model.
        watch: Told of the prompt and the ids written after it, as in `generate`.
        **decoding: Fields of `Decoding`.
    """
    writer, stop = _Writer(model, chat, Decoding(**decoding)), stop or Event()
    news: SimpleQueue[list[int] | None] = SimpleQueue()
    hooks = {"streamer": _Listener(news), "stopping_criteria": StoppingCriteriaList([_Stopped(stop)])}
    began = time.perf_counter()
    writing = worker.submit(writer.write, [prompt], 0, **hooks)
    writing.add_done_callback(lambda _: news.put(None))
    try:
        yield from _grown(news, writer)
        ids = _result(writing)
        if watch is not None:
            watch([prompt], [ids])
        yield writer.read(ids, stop.is_set())._replace(seconds=time.perf_counter() - began)
    finally:
        stop.set()
        writing.cancel()


class _Writer:
    """Writes tokens after prompts, and reads them as answers."""

    def __init__(self, model: PreTrainedModel | CausalModel, chat: Chat | ModelTemplate, decoding: Decoding) -> None:
        self.model, self.chat, self.decoding = model, chat, decoding
        self.end_ids = [chat.end_id] if isinstance(chat, Chat) else chat.end_ids
        allowed = decoding.max_thought_tokens
        self.budget = None if allowed is None else ThoughtBudget.of(chat, allowed)

    def write(self, prompts: Sequence[Sequence[int]], row: int, **hooks: Any) -> list[list[int]]:
        """New ids of one batch, whose first prompt has the number `row`."""
        with _seeded(f"{self.decoding.seed}/{row}", self.model.device):
            return list(
                sample(
                    self.model,
                    prompts,
                    end_ids=self.end_ids,
                    pad_id=self.chat.pad_id,
                    max_new_tokens=self.decoding.max_new_tokens,
                    batch_size=len(prompts),
                    budget=self.budget,
                    **self.decoding.options(),
                    **hooks,
                )
            )

    def read(self, ids: Sequence[int], stopped: bool = False) -> Generated:
        """The whole answer."""
        thought, advisory, _ = self.chat.parse(ids)
        cut = self.budget is not None and self.budget.cut(ids)
        if ids and ids[-1] in self.end_ids:
            reason = "thought_budget" if cut else "end"
        else:
            reason = "stopped" if stopped and len(ids) < self.decoding.max_new_tokens else "length"
            advisory = _whole_letters(advisory)
        if thought is not None and (cut or not advisory):
            thought = _whole_letters(thought)
        return Generated(thought, advisory, len(ids), reason)

    def read_so_far(self, ids: Sequence[int]) -> Generated:
        """The answer as far as it goes."""
        return self.read(ids)._replace(stop_reason="")


def _whole_letters(text: str) -> str:
    """Text that may have been cut off between two bytes of a letter, without the first of them."""
    return text.rstrip("\ufffd").rstrip()


@contextmanager
def _seeded(seed: str, device: torch.device) -> Iterator[None]:
    """A generator of its own for what is sampled."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(seed).getrandbits(63))
        yield


def _grown(news: "SimpleQueue[list[int] | None]", writer: _Writer) -> Iterator[Generated]:
    """The answer so far, whenever there are new tokens: one or, if the reader was slow, several; until None comes."""
    ids: list[int] = []
    while True:
        came = [news.get()]
        while not news.empty():
            came.append(news.get())
        ids += [token for tokens in came if tokens is not None for token in tokens]
        if came[-1] is None:
            return
        yield writer.read_so_far(ids)


def _result(writing: "Future[list[list[int]]]") -> list[int]:
    (ids,) = writing.result()
    return ids


class _Listener(BaseStreamer):
    """Hands new tokens on as they are chosen."""

    def __init__(self, news: "SimpleQueue[list[int] | None]") -> None:
        self.news = news
        self.at_prompt = True

    def put(self, value: Tensor) -> None:
        """What `generate` has: the prompt first, which is no news."""
        if not self.at_prompt:
            self.news.put(value.tolist())
        self.at_prompt = False

    def end(self) -> None:
        """Nothing: the end is told when the worker is done."""


class _Stopped(StoppingCriteria):
    """Stops all rows once someone has asked for it."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """[B], whether each row ends here."""
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)
