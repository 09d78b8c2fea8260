"""A frozen teacher asked about every row of an experiment, its answers written to disk (`data/logit_cache.py`).

Rows are cut into shards in their order, whatever the number of processes; each shard is one file, made by one process
in the same micro-batches every time. So a cache that was interrupted, or written by another number of processes, ends
with the same bytes, as far as the device's own arithmetic repeats itself.

Shapes: M positions at which the teacher is asked, R of them at a time, D width, V the teacher's vocabulary, W the
shared prefix of the two vocabularies, K tokens of an answer.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from agri_moe.data.chat import Segment
from agri_moe.data.logit_cache import (
    MANIFEST,
    TOKENIZER,
    UNFINISHED,
    Answers,
    Header,
    Kind,
    finish,
    read_manifest,
    row_keys,
    shard_name,
    teacher_fingerprint,
    template_fingerprint,
    tokenizer_fingerprint,
    write_shard,
)
from agri_moe.data.packing import SEGMENTS, MicroBatch, PackedRows, StepTotals, pack
from agri_moe.data.rows import Rows
from agri_moe.losses import Merged, entropy, log_probabilities, most_probable, sampled_counts
from agri_moe.models.causal import NOTHING, CausalModel
from agri_moe.models.checkpoint_files import load_config
from agri_moe.models.distill import TEACHER, DistillModule, head_rows
from agri_moe.models.source import ModelConfig
from agri_moe.objective import Objective
from agri_moe.planning import read_config
from agri_moe.runs import replace_text
from agri_moe.teacher import OnlineTeacher
from agri_moe.terms import KL, CrossEntropy, SegmentName

# Tokens kept in one shard: at 64 a position, 131,072 positions, some 13 MB. What a kill can cost.
SHARD_TOKENS = 1 << 23
_NO_TOTALS = StepTotals(np.zeros((2, SEGMENTS), np.int64), 0, 0)
# A collective of ranks that end far apart must not time out.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Asked:
    """What is asked of the teacher.

    Args:
        kind: See `agri_moe.tools.cache`.
        tokens: k, or draws.
        segments: None is what the config's objective compares.
        seed: Of the draws.
    """

    kind: Kind
    tokens: int
    segments: Sequence[SegmentName] | None
    seed: int


class Part(NamedTuple):
    """Some rows of a split, for one file."""

    number: int
    rows: Rows
    chosen: np.ndarray[Any, np.dtype[np.int64]]
    keys: np.ndarray[Any, np.dtype[np.uint64]]
    positions: int


def write_cache(fit: Sequence[str], output: str, asked: Asked) -> None:
    """Write a cache, or go on writing it.

    Args:
        fit: Options of `fit`, which tell the teacher and the rows.
        output: Folder.
        asked: What is kept of the answers.

    Raises:
        ValueError: If the options name no teacher, or `output` holds something else.
    """
    module, data = _experiment(fit)
    folder = Path(output)
    _check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _process_group() as ranks, ranks.alone(folder):
        scribe = Scribe(module, data, asked, folder, ranks)
        if scribe.begin():
            scribe.write()
            ranks.wait()
            if ranks.rank == 0:
                finish(folder, scribe.header, len(scribe.parts))
        if ranks.rank == 0:
            _report(folder, read_manifest(folder))


def _check_output(folder: Path) -> None:
    """Refuse a folder that holds something else; one that a killed process has left is gone on with."""
    if (folder / MANIFEST).is_file() or (folder / UNFINISHED).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(path.suffix != ".partial" for path in folder.iterdir()):
        raise ValueError(f"--output {folder} holds something else than a cache; name another folder.")


def _experiment(fit: Sequence[str]) -> tuple[DistillModule, Any]:
    """The module and the rows that options of `fit` describe."""
    experiment = read_config(fit)
    module, data = experiment.model, experiment.datamodule
    if not isinstance(module, DistillModule) or not module.uses_teacher or module.teacher_config is None:
        raise ValueError("cache needs a config that trains with a teacher, by DistillModule and a term that asks one.")
    if module.teacher_config.source is None:
        raise ValueError("model.teacher.source is missing: it names the model whose answers are to be written.")
    if getattr(data, "streaming", False):
        raise ValueError("data.streaming is true: set it to false for cache, which has to know the rows beforehand.")
    module.teacher_config.cache = None  # it is about to be written
    data.check()
    module.check(data.chat)
    return module, data


# ---- processes


class Ranks(NamedTuple):
    """The processes that share the rows out, as torchrun starts them."""

    rank: int
    world_size: int
    device: torch.device

    def wait(self) -> None:
        """For all others."""
        if self.world_size > 1:
            distributed.barrier()

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Keep a second run out of the folder; the system drops the lock of a killed process."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            if self.rank == 0:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(f"--output {folder} is being written by another run: wait for it.") from error
            yield
        finally:
            os.close(handle)


@contextmanager
def _process_group() -> Iterator[Ranks]:
    """This process among those that torchrun has started; alone without it."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, world_size, device)
    finally:
        distributed.destroy_process_group()


# ---- the work


class Scribe:
    """Writes down what a teacher says.

    Args:
        module: Checked; its teacher is loaded when the first shard is made.
        data: With the rows.
        asked: What is kept of the answers.
        folder: Where to.
        ranks: Who else writes.
    """

    def __init__(self, module: DistillModule, data: Any, asked: Asked, folder: Path, ranks: Ranks):
        assert module.teacher_config is not None, "checked by `_experiment`"
        self.module, self.data, self.asked, self.folder, self.ranks = module, data, asked, folder, ranks
        self.teacher_config, self.source = module.teacher_config, str(module.teacher_config.source)
        names = dict.fromkeys(name for objective in module.objectives for name in objective.kl.segments)
        self.segments: list[SegmentName] = list(asked.segments or names)
        self.objective = Objective(ce=CrossEntropy(segments=self.segments), kl=KL(1.0, segments=self.segments))
        data.teacher_view = module.teacher_view
        self.merged = module.merged_of(data.chat)

    # ------------------------------------------------------------------ what is to be written

    def begin(self) -> bool:
        """Say what the folder is to hold; False if it holds all of it already.

        Raises:
            ValueError: If it holds another cache.
        """
        if self.ranks.rank == 0:
            _ = self.parts  # tokenised once; the others find the rows on disk
        self.ranks.wait()
        for path in (self.folder / MANIFEST, self.folder / UNFINISHED):
            if path.is_file():
                other = self.header.difference(json.loads(path.read_text("utf-8")))
                if other is not None:
                    raise ValueError(f"--output {self.folder} holds a cache with another {other}; name another folder.")
                return path.name == UNFINISHED
        self.ranks.wait()  # until all have looked
        if self.ranks.rank == 0:
            replace_text(self.folder / UNFINISHED, json.dumps(asdict(self.header), indent=1) + "\n")
        return True

    @cached_property
    def header(self) -> Header:
        """What the cache is of."""
        rows = hashlib.sha256(b"".join(part.keys.tobytes() for part in self.parts))
        return Header(
            kind=self.asked.kind,
            tokens=self.tokens,
            seed=self.asked.seed if self.asked.kind == "sampled" else 0,
            vocabulary=self.vocabulary,
            segments=list(self.segments),
            view=self.teacher_config.view or "same",
            teacher=teacher_fingerprint(self.source),
            teacher_source=self.source,
            dtype=self.teacher_config.dtype,
            tokenizer=tokenizer_fingerprint(self.data.chat),
            template=template_fingerprint(self.data.chat),
            rows=rows.hexdigest(),
        )

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that teacher and student share."""
        chat = self.data.chat
        if self.merged is not None:
            return self.merged.width
        return min(head_rows(self.source, load_config(self.source, TEACHER), chat), self.module.vocabulary(chat))

    @property
    def tokens(self) -> int:
        """Tokens of an answer, or draws."""
        return min(self.asked.tokens, self.vocabulary) if self.asked.kind == "topk" else self.asked.tokens

    @cached_property
    def parts(self) -> list[Part]:
        """The rows of all splits, equal ones once, cut into shards of about one size."""
        names = ["train", "validation"]
        if getattr(self.data, "test", None) is not None:
            names.append("test")
        segments = [int(Segment[name.upper()]) for name in dict.fromkeys(self.segments)]
        room = max(1, SHARD_TOKENS // self.tokens)
        parts: list[Part] = []
        seen = np.zeros(0, np.uint64)
        for rows in (self.data.rows(name) for name in names):
            keys, first = np.unique(row_keys(rows.table), return_index=True)
            chosen = np.sort(first[~np.isin(keys, seen)])
            seen = np.union1d(seen, keys)
            positions = (rows.counts[:, 0] - rows.counts[:, 1])[:, segments].sum(1)
            shard = (positions[chosen].cumsum() - positions[chosen]) // room
            for own in (chosen[shard == one] for one in np.unique(shard)):
                keys_of_own = row_keys(rows.table.select(own))
                parts.append(Part(len(parts), rows, own, keys_of_own, int(positions[own].sum())))
        return parts

    # ------------------------------------------------------------------ writing

    def write(self) -> None:
        """Make this process's shards, those that are there already left as they are."""
        if self.ranks.rank == 0 and self.module.own_view(self.data.chat) is not None:
            AutoTokenizer.from_pretrained(self.source, trust_remote_code=False).save_pretrained(self.folder / TOKENIZER)
        own = self.parts[self.ranks.rank :: self.ranks.world_size]
        total, quiet = sum(part.positions for part in own), self.ranks.rank > 0
        progress = tqdm(total=total, desc=f"cache {self.folder.name}", unit=" positions", disable=quiet)
        # One shard is compressed and written while the teacher reads the next.
        with progress, ThreadPoolExecutor(max_workers=1) as writer:
            writing: Future[None] | None = None
            for part in own:
                path = self.folder / shard_name(part.number)
                if path.is_file():
                    progress.update(part.positions)
                    continue
                answers = list(self._answers(part, progress))
                if writing is not None:
                    writing.result()
                writing = writer.submit(write_shard, path, self.asked.kind, answers, self.merged is not None)
            if writing is not None:
                writing.result()

    @cached_property
    def teacher(self) -> OnlineTeacher:
        """The model itself."""
        config = ModelConfig(self.source, attn_implementation=self.module.student_config.attn_implementation)
        asked = self.teacher_config
        chat = self.module.teacher_chat(self.data.chat)
        hf = config.load("model.teacher", chat, asked.torch_dtype, asked.quantization())
        teacher = OnlineTeacher(CausalModel(hf), None if self.merged is None else self.merged.width)
        teacher.to(self.ranks.device)
        return teacher

    def _answers(self, part: Part, progress: Any) -> Iterator[tuple[int, Answers]]:
        """The answers to the rows of a shard, by key, in the order of the rows."""
        chat, longest = self.data.chat, getattr(self.data, "max_length", None) or self.data.block_size
        packed = PackedRows(part.rows.table, longest, chat.pad_id)
        sequences = [part.chosen[rows].tolist() for rows in pack(part.rows.lengths[part.chosen], longest)]
        generator = torch.Generator(self.ranks.device).manual_seed(hash((self.asked.seed, part.number)))
        at_a_time = max(1, self.data.tokens_per_batch // longest)
        answers: dict[int, Answers] = {}
        for start in range(0, len(sequences), at_a_time):
            batch = packed[MicroBatch(sequences[start : start + at_a_time], _NO_TOTALS)]
            answers |= (found := dict(self._ask(batch, generator)))
            progress.update(sum(len(row.positions_N) for row in found.values()))
        nothing = Answers.none(self.asked.kind, self.merged is not None)
        for key, row in zip(part.keys.tolist(), part.chosen.tolist(), strict=True):
            yield key, answers.get(row, nothing)

    def _ask(self, batch: dict[str, Tensor], generator: torch.Generator) -> Iterator[tuple[int, Answers]]:
        """The answers to a micro-batch's rows, by their number in it; without those at which nothing is asked."""
        batch |= self.objective.select(batch, sorted(self.data.chat.control_ids), self.merged)
        at = batch["positions"][: len(batch["kl_targets"])]
        rows, places = (batch[name].flatten()[at].numpy() for name in ("row_ids", "position_ids"))
        if not len(rows):
            return
        signal = self.teacher.signal({name: tensor.to(self.ranks.device) for name, tensor in batch.items()}, NOTHING)
        assert signal.hidden_MD is not None, "a teacher that is there answers with its hidden states"
        assert signal.head_VD is not None, "and the head to them"
        chunks = log_probabilities(signal.hidden_MD, signal.head_VD[: self.vocabulary])
        kept, done = [], 0
        for log_p_RW in chunks:
            now = slice(done, done := done + len(log_p_RW))
            merged = None if signal.merged is None else signal.merged.rows(now)
            kept.append(_kept(log_p_RW, self.asked.kind, self.tokens, generator, merged))
        fields = [None if some[0] is None else np.concatenate(some) for some in zip(*kept, strict=True)]
        answers = Answers._make([places, *fields])
        if not np.isfinite(answers.entropy_N).all():
            bad = int(rows[~np.isfinite(answers.entropy_N)][0])
            raise ValueError(
                f"model.teacher.source {self.source} says NaN of row {bad}: try another model.teacher.dtype."
            )
        bounds = np.flatnonzero(np.diff(rows, prepend=-1, append=-1))
        for start, end in pairwise(bounds.tolist()):
            yield int(rows[start]), answers.select(slice(start, end))


def _kept(
    log_p_RW: Tensor, kind: Kind, tokens: int, generator: torch.Generator, merged: Merged | None
) -> tuple[Any, ...]:
    """The fields of `Answers` after its positions, in their order."""
    log_probs = counts = log_tail = whole = None
    if kind == "topk":
        ids, log_probs, log_tail = most_probable(log_p_RW, tokens)
        top = ids[:, 0]
    else:
        ids, counts = sampled_counts(log_p_RW, tokens, generator)
        top = log_p_RW.argmax(-1)
    if merged is not None:
        first_R = log_p_RW.gather(1, merged.next_first_M[:, None]).squeeze(1)
        whole = (first_R + merged.rest_M).where(merged.begin_M < merged.end_M, 0.0)
    fields = (ids, log_probs, counts, log_tail, entropy(log_p_RW), top, whole)
    return tuple(None if field is None else field.cpu().numpy() for field in fields)


def _report(folder: Path, manifest: dict[str, Any]) -> None:
    shards = [file for name, file in manifest["files"].items() if name.endswith(".arrow")]
    rows, positions, size = (sum(shard[name] for shard in shards) for name in ("rows", "positions", "bytes"))
    print(f"{folder}: {rows:,} rows, {positions:,} positions, {size / max(positions, 1):.1f} bytes for each.")
    print(f"Next: python main.py fit --config FILE --model.teacher.cache={folder}")
