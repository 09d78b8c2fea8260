"""On-policy distillation: the student writes, the teacher scores what it wrote.

For a share of the optimizer steps the rows of the data give only their prompts. The student samples what follows, and
the divergence from the teacher is taken on that text, where the student will find itself when it is used (generalised
knowledge distillation, Agarwal et al. 2024, algorithm 1; `share` is their lambda). With `kl.divergence: jsd` it is
their generalised Jensen-Shannon divergence. No gradient flows through the sampling.

Shapes: B sequences, T tokens of the longest, as in `data/packing.py`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agri_moe.data.chat import Chat, Segment
from agri_moe.data.packing import SEGMENTS, PackedRow, StepTotals, collate, count_targets, pack
from agri_moe.data.rows import too_little_aligned
from agri_moe.data.teacher_view import TeacherView
from agri_moe.generation import sample
from agri_moe.models.causal import CausalModel

_STEPS = 0x0905  # sets the draws of steps apart from the other draws of the same seed


@dataclass
class OnPolicy:
    """How often the student's own samples take the place of the rows, and how they are drawn.

    A sample that is cut off before its advisory teaches only what `kl.segments` says of thoughts: by default nothing.
    Let `max_new_tokens` hold a thought and the beginning of an advisory, or add `thought` to `kl.segments`.

    Args:
        share: Share of the optimizer steps that are on-policy; 0 is off, 1 is every step.
        max_new_tokens: Samples are cut off after so many tokens. Their cost grows with it, one forward pass a token.
        temperature: Of the student's distribution that is sampled from; 1 is the distribution itself.
        rows: Of each micro-batch of an on-policy step, the first so many rows give their prompts; the others are left
            out of that step.
    """

    share: float = 0.0
    max_new_tokens: int = 128
    temperature: float = 1.0
    rows: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"model.on_policy.share must be in [0, 1], not {self.share}; 0 turns sampling off.")
        if self.temperature <= 0:
            raise ValueError(f"model.on_policy.temperature must be positive, not {self.temperature}.")
        if self.max_new_tokens < 1 or self.rows < 1:
            raise ValueError(
                "model.on_policy needs max_new_tokens >= 1 and rows >= 1, "
                f"not max_new_tokens={self.max_new_tokens}, rows={self.rows}."
            )


class Sampled(NamedTuple):
    """A micro-batch of the student's own text, and what it took to write."""

    batch: dict[str, Tensor]  # the batch contract, on the CPU
    seconds: float
    tokens: int  # generated, in all rows


class Prompt(NamedTuple):
    """What a row asks: its ids end where the model goes on."""

    row_id: int
    input_ids: list[int]
    segment_ids: list[int]


def check_on_policy(config: OnPolicy, strategy_is_sharded: bool) -> None:
    """Refuse what cannot be sampled from: outside its own forward, the weights of a sharded model are pieces."""
    if config.share > 0 and strategy_is_sharded:
        raise ValueError(
            f"model.on_policy.share is {config.share:g}, but a sharded student cannot write samples: "
            "use trainer.strategy ddp or one device, or set share: 0."
        )


def is_on_policy(share: float, step: int, seed: int) -> bool:
    """Whether an optimizer step is on-policy: the same on every rank, in every micro-batch and after a resume."""
    return bool(np.random.default_rng((seed, step, _STEPS)).random() < share)


def sample_batch(
    batch: dict[str, Tensor],
    model: CausalModel,
    chat: Chat,
    config: OnPolicy,
    max_length: int,
    teacher_view: TeacherView | None,
    seed: int,
    replicas: int = 1,
) -> Sampled:
    """The micro-batch that the student writes from the prompts of another.

    The totals of the step are not known before every rank has sampled, so they are filled with this micro-batch's own
    counts times `replicas`: each micro-batch takes the mean over its own tokens, and the step the mean of those means
    (a micro-batch without any counts as 0).

    Args:
        batch: A packed micro-batch, on any device.
        model: The student, not sharded. It writes in eval mode and is left in the mode it was in.
        chat: Tokenizer and markers.
        config: How to sample.
        max_length: Longest row and sequence; longer samples are cut off.
        teacher_view: None where the teacher reads the student's ids: then these are kept to the token. Otherwise the
            samples are read as text and encoded anew for both; those that have no advisory, or that the view refuses,
            are left out.
        seed: Of the sampling; the generator that training draws from is left as it was.
        replicas: World size times accumulated micro-batches: what the framework will divide the gradient by.
    """
    began = time.perf_counter()
    prompts = read_prompts(batch, chat, config.rows)
    with _writing(model.hf, seed):
        written = list(
            sample(
                model.hf,
                [prompt.input_ids for prompt in prompts],
                end_ids=[chat.end_id],
                pad_id=chat.pad_id,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.rows,
                do_sample=True,
                temperature=config.temperature,
                top_k=0,  # the student's own distribution, whatever its generation config would cut off
                top_p=1.0,
                repetition_penalty=1.0,
            )
        )
    rows = [
        as_written(chat, prompt, ids, max_length)
        if teacher_view is None
        else as_read(chat, prompt, ids, max_length, teacher_view)
        for prompt, ids in zip(prompts, written, strict=True)
    ]
    usable = [row for row in rows if row is not None]
    made = _collate(usable, chat, max_length, replicas, teacher_view is not None)
    return Sampled(made, time.perf_counter() - began, sum(map(len, written)))


def read_prompts(batch: dict[str, Tensor], chat: Chat, rows: int) -> list[Prompt]:
    """The prompts of the first rows of a packed micro-batch; rows of plain text have none."""
    names = ("input_ids", "segment_ids", "row_ids", "position_ids")
    ids_BT, segments_BT, row_ids_BT, positions_BT = (batch[name].cpu().numpy() for name in names)
    asked = np.isin(segments_BT, (Segment.SYSTEM, Segment.USER))
    # Text never becomes a control token, so this marker in a prompt is the one that the model goes on from. A newline
    # after it that merged with the answer's first token is part of the answer: it is put back.
    goes_on = asked & np.isin(ids_BT, (chat.marker_ids["thought"], chat.marker_ids["assistant"]))
    newline = chat.encode_text("\n")
    prompts = []
    for b, last in np.argwhere(goes_on)[:rows].tolist():
        own = slice(last - int(positions_BT[b, last]), last + 1)
        prompts.append(
            Prompt(
                int(row_ids_BT[b, last]),
                [*ids_BT[b, own].tolist(), *newline],
                [*segments_BT[b, own].tolist(), *[int(Segment.USER)] * len(newline)],
            )
        )
    return prompts


def as_written(chat: Chat, prompt: Prompt, ids: Sequence[int], max_length: int) -> PackedRow:
    """The row that a prompt and the ids sampled after it make, segments as `Chat.encode` gives them."""
    assert len(prompt.input_ids) <= max_length, "its row, which is longer, was packed into a sequence"
    ids = list(ids)[: max_length - len(prompt.input_ids)]
    marker = chat.marker_ids["assistant"]
    thought = 0
    if chat.marker_ids["thought"] in prompt.input_ids:
        thought = ids.index(marker) + 1 if marker in ids else len(ids)
    segments = [int(Segment.THOUGHT)] * thought + [int(Segment.ASSISTANT)] * (len(ids) - thought)
    return PackedRow(
        prompt.row_id, np.array([*prompt.input_ids, *ids]), np.array([*prompt.segment_ids, *segments], dtype=np.int64)
    )


def as_read(chat: Chat, prompt: Prompt, ids: Sequence[int], max_length: int, view: TeacherView) -> PackedRow | None:
    """The row that the sampled text makes, encoded for student and teacher; None if it makes none, or too long a one.

    A sample cut off in its advisory is taken to end there: the positions that the student came to are the same, and
    the end marker, a control token, is no target of the divergence.
    """
    answer = chat.parse(ids, thought=chat.marker_ids["thought"] in prompt.input_ids)
    row = {**read_texts(chat, prompt.input_ids), "thought": answer.thought, "advisory": answer.advisory}
    try:
        encoded = chat.encode(row)
        teacher = view.encode(chat, row)
    except ValueError:  # no advisory yet, or none that the teacher's template takes
        return None
    if len(encoded.input_ids) > max_length or too_little_aligned(teacher.aligned, teacher.answer, view.min_aligned):
        return None
    return PackedRow(prompt.row_id, *map(np.array, (*encoded, teacher.input_ids, teacher.tokens)))


def read_texts(chat: Chat, prompt_ids: Sequence[int]) -> dict[str, str]:
    """System and scenario of a prompt, as they were before `Chat.encode_prompt`."""
    user = list(prompt_ids).index(chat.marker_ids["user"])
    end = next(i for i in range(user + 1, len(prompt_ids)) if prompt_ids[i] in chat.control_ids)
    system, scenario = (
        chat.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        for ids in (prompt_ids[1:user], prompt_ids[user + 1 : end])
    )
    # Each stands between two newlines, the scenario after its header.
    return {"system": system[1:-1], "scenario": scenario[1:-1].removeprefix(f"{chat.format.scenario_header}\n")}


def _collate(rows: list[PackedRow], chat: Chat, max_length: int, replicas: int, teacher: bool) -> dict[str, Tensor]:
    counts = [
        count_targets(
            row.input_ids.tolist(),
            row.segment_ids.tolist(),
            chat.control_ids,
            None if row.teacher_tokens is None else row.teacher_tokens.tolist(),
        )
        for row in rows
    ]
    targets = np.sum(counts, axis=0) if counts else np.zeros((2, SEGMENTS), np.int64)
    lengths = [len(row.input_ids) for row in rows]
    totals = StepTotals(targets * replicas, sum(lengths) * replicas, replicas)
    sequences = [[rows[i] for i in chosen] for chosen in pack(lengths, max_length)]
    return collate(sequences, totals, max_length, chat.pad_id, teacher)


@contextmanager
def _writing(hf: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode and a generator of its own while the student writes.

    Eval mode also switches activation checkpointing off, under which transformers would not use its cache.
    """
    training = hf.training
    hf.eval()
    try:
        with torch.random.fork_rng([hf.device] if hf.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        hf.train(training)
