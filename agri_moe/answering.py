"""Answers to many scenarios, kept on disk batch by batch, so that a killed run goes on where it was.

answers.parquet.partial/
    answers_of.json      whose answers these are: model, rows and options; answers to anything else are not mixed in
    000000000.json       the answers to a batch, by the number of its first row
    000000000.npz        which experts served it, where that was asked
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from agri_moe.data.chat import Chat
from agri_moe.data.logit_cache import teacher_fingerprint
from agri_moe.expert_use import ExpertUse, expert_layers, expert_use
from agri_moe.generation import Decoding, Generated, ModelTemplate, generate
from agri_moe.models.causal import start_rows
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.routing import kept_routing
from agri_moe.models.upcycle import is_moe
from agri_moe.runs import MARKER, replace_text
from agri_moe.trained import load_trained

HEADER = "answers_of.json"
NO_EXPERTS = (
    "--utilisation: {} has no experts that tokens choose (it is dense, or its experts choose), so there is nothing to "
    "tell; leave it out."
)


@dataclass(frozen=True)
class Asked:
    """Which model answers what, and how; fields are as `agri_moe.tools.generate` says.

    Args:
        systems: Instruction of each row; None is the chat format's own.
        utilisation: Whether it is told which experts serve prompts and answers.
    """

    model: str
    rows: Sequence[Mapping[str, Any]]
    systems: Sequence[str | None]
    template: str
    decoding: Decoding
    batch_size: int
    device: str
    utilisation: bool = False

    def header(self) -> dict[str, Any]:
        """What the answers depend on, by the names of the options; model and rows as hashes.

        Raises:
            ValueError: If there is no such model.
        """
        rows = hashlib.sha256()
        for row, system in zip(self.rows, self.systems, strict=True):
            rows.update(json.dumps([row["scenario"], system], ensure_ascii=False, default=str).encode())
        named = {"model": _fingerprint(self.model), "input": rows.hexdigest(), "template": self.template}
        more = {"utilisation": True} if self.utilisation else {}  # answers are the same without
        return named | asdict(self.decoding) | {"batch_size": self.batch_size} | more

    def prompts(self, frame: Chat | ModelTemplate) -> list[list[int]]:
        """The ids to go on from, row by row."""
        return [
            frame.encode_prompt(row["scenario"], system) for row, system in zip(self.rows, self.systems, strict=True)
        ]


def load(
    model: str, template: str, device: str, utilisation: bool = False
) -> tuple[PreTrainedModel, Chat, Chat | ModelTemplate]:
    """The model on its device, the chat format that came with it, and the form in which it is asked."""
    if utilisation and Path(model).suffix != ".ckpt" and not is_moe(load_config(model, "--model")):
        raise ValueError(NO_EXPERTS.format(model))
    network, chat = load_trained(model, "--model")
    if utilisation and (not expert_layers(network) or kept_routing(network) == "expert_choice"):
        raise ValueError(NO_EXPERTS.format(model))
    start_rows(network, chat.new_marker_pieces)  # none in a model of ours, all in a teacher that never saw the markers
    frame = ModelTemplate.load(network, model, chat) if template == "model" else chat
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device), chat, frame


class Answers(NamedTuple):
    """All answers in order, the chat format that came with the model, and which experts served, where asked."""

    results: list[Generated]
    chat: Chat
    use: ExpertUse | None


def answer_rows(asked: Asked, parts: "Parts") -> Answers:
    """Have the model answer what is not answered yet."""
    network, chat, frame = load(asked.model, asked.template, asked.device, asked.utilisation)
    prompts = asked.prompts(frame)
    results: list[Generated] = []
    with tqdm(total=len(prompts), desc="answers", unit="row") as progress:
        for start in range(0, len(prompts), asked.batch_size):
            batch = prompts[start : start + asked.batch_size]
            options = asdict(asked.decoding) | {"batch_size": asked.batch_size, "first_row": start}
            if asked.utilisation:
                options["watch"] = partial(parts.keep_use, start, network)
            results += parts.kept(start, generate(network, frame, batch, **options))
            progress.update(len(batch))
    return Answers(results, chat, parts.use() if asked.utilisation else None)


@dataclass(frozen=True)
class Parts:
    """Answers on disk, a file for each batch.

    Args:
        folder: HEADER in it says what they are answers to.
    """

    folder: Path

    @classmethod
    @contextmanager
    def of(cls, asked: Asked, folder: Path) -> "Iterator[Parts]":
        """Those of this run, and no one else's meanwhile; the folder is gone at the end, unless that is an error.

        Raises:
            ValueError: If it holds the answers of a run with other options, or of one that is still writing.
        """
        header = asked.header()
        folder.mkdir(parents=True, exist_ok=True)
        parts, handle = cls(folder), os.open(folder, os.O_RDONLY)
        try:
            parts._claim(header, handle)
            yield parts
            shutil.rmtree(folder)
        finally:
            os.close(handle)

    def kept(self, start: int, answers: Iterable[Generated]) -> list[Generated]:
        """The answers of the batch that begins with row `start`, taken from `answers` where they are not there yet."""
        path = self.folder / f"{start:09d}.json"
        if not path.is_file():
            replace_text(path, json.dumps([answer._asdict() for answer in answers], ensure_ascii=False) + "\n")
        return [Generated(**answer) for answer in json.loads(path.read_text("utf-8"))]

    def keep_use(
        self, start: int, model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> None:
        """Note which experts serve the batch that begins with row `start`; before its answers, which make it count."""
        expert_use(model, prompts, answers).save(self.folder / f"{start:09d}.npz")

    def use(self) -> ExpertUse:
        """Which experts served, over all batches."""
        return ExpertUse.add(ExpertUse.read(path) for path in sorted(self.folder.glob("*.npz")))

    def _claim(self, header: Mapping[str, Any], handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which the system drops when a process is killed
        except BlockingIOError as error:
            raise ValueError(f"{self.folder} is being written by another run: wait for it.") from error
        path = self.folder / HEADER
        if not path.is_file():
            replace_text(path, json.dumps(header, ensure_ascii=False, indent=1) + "\n")
        before = json.loads(path.read_text("utf-8"))
        if different := [name for name, value in header.items() if before.get(name) != value]:
            raise ValueError(
                f"{self.folder} holds the answers of a run with another --{different[0]}: give the options of that "
                "run to go on with it, name another --output, or remove the folder."
            )


def _fingerprint(model: str) -> str:
    """Names a model in a moment, by samples of its content or by the checksums of a run's checkpoint."""
    if Path(model).suffix != ".ckpt":
        load_config(model, "--model")
        return teacher_fingerprint(model)
    marker = Path(model + MARKER)
    return hashlib.sha256(marker.read_bytes() if marker.is_file() else b"").hexdigest()
