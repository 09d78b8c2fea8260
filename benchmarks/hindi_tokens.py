"""What new Devanagari pieces are worth: the same student with Qwen's tokens, with 263 pieces more, and with 2,000.

    python benchmarks/hindi_tokens.py [--seeds 3] [--workers 2] [--output DIR]
    python benchmarks/hindi_tokens.py --table                print what is there, train nothing
    python benchmarks/hindi_tokens.py --starts               how new rows can start, before any training

Rows are real Hindi text, news and encyclopaedia passages (see real_text.py): a sentence is the scenario, the sentences
after it are the advisory. A small dense Qwen3 is trained on one half of it in Qwen's tokens until its held-out loss
falls no further, and so is a larger one, the teacher, on all of it. The dense model is then upcycled to four experts
with each tokenizer, new rows starting as the mean of their pieces', and goes on with the other half: by cross-entropy
alone, or with the teacher, who keeps its own tokens: at hand, or from a cache of its answers (`cache`, 64 tokens at a
position), which is not counted into the training's time. Every arm sees the same text, in as many steps of as many
bytes. New rows have more to learn than old ones, so that no one learning rate is fair to all: each tokenizer has the
best of four under its objective, by held-out bits per byte of seed 0. The other seeds have no part in that.

263 pieces are what fits the free rows of Qwen3's embedding beside our four markers. Token ids are renumbered, see
small_vocabulary.py; pieces are learned by `tokens` from the training rows.

Each student is trained in a process of its own, on one thread: times are its CPU seconds, memory is how far its
resident size rises once training begins. A finished cell is a JSON file in DIR, as in ablation.py; started again, the
script goes on.
"""

import argparse
import gc
import itertools
import json
import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from ablation import Plateau, build, quiet, qwen3, remember, result_file, trainer
from ablation_table import markdown
from loss_step import processor
from measure import forget_peak, give_back, resident_mb
from real_text import DATA, documents
from small_vocabulary import read_cut, write_small_tokenizer
from transformers import PreTrainedModel
from upcycling import shown

from agri_moe.cli import main
from agri_moe.data.chat import Chat, ChatFormat
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.logit_cache import MANIFEST
from agri_moe.models.base import LanguageModule
from agri_moe.models.source import ModelConfig
from agri_moe.models.text_loss import bits_per_byte

OUTPUT = Path(__file__).parent / "output" / "hindi_tokens"
FORMAT = ChatFormat(default_system="आगे लिखिए।")
TOKENIZERS = {"qwen": 0, "free_rows": 263, "2000": 2000}
"""Name -> new pieces."""
CACHED = "ce+kl, cached"
ARMS = ("ce", "ce+kl", CACHED)
RATES = (3e-4, 1e-3, 3e-3, 6e-3)
DOMAINS = ("news_hi", "passages_hi")
PARTS = ("first", "second", "validation")
ANSWER_BYTES = 900  # of an advisory, at least, where there is as much
ANSWERS = 8  # advisories that are written

Cells = list[dict[str, Any]]
"""Of one tokenizer and arm, seed by seed."""


@dataclass(frozen=True)
class Setting:
    """Everything that the table depends on, apart from arms and seeds."""

    width: int = 96
    inner: int = 288
    layers: int = 2
    teacher_width: int = 192
    teacher_inner: int = 576
    teacher_layers: int = 3
    max_length: int = 1024  # in Qwen's tokens, as is the next
    tokens_per_batch: int = 4096
    dense_steps: int = 1500  # at most: both end at their plateau
    dense_rate: float = 3e-3
    check_every: int = 50
    epochs: int = 6  # of the students
    kl_weight: float = 1.0


def rows_of(part: str) -> list[dict[str, str]]:
    """Scenario and advisory from every document of a part: a sentence, and those that follow it."""
    rows = []
    for document in documents(part):
        if document["domain"] not in DOMAINS:
            continue
        passage = document["text"].split("\n")
        lines = passage if document["domain"] == "news_hi" else passage[:1]  # of passages, not the questions
        sentences = [s.strip() for line in lines for s in re.split(r"(?<=[।?!])\s+", line) if s.strip()]
        while len(sentences) > 1:
            scenario, answer = sentences.pop(0), [sentences.pop(0)]
            while sentences and len(" ".join(answer).encode()) < ANSWER_BYTES:
                answer.append(sentences.pop(0))
            rows.append({"scenario": scenario, "advisory": " ".join(answer)})
    return rows


class Hindi:
    """The trainings.

    Args:
        setting: Models and steps.
        output: Folder of rows, tokenizers, models and results.
    """

    def __init__(self, setting: Setting, output: Path) -> None:
        if not DATA.is_dir():
            raise SystemExit(f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real text.")
        self.setting, self.output = setting, output
        output.mkdir(parents=True, exist_ok=True)
        self.files = {part: output / f"{part}.parquet" for part in PARTS}
        for part, file in self.files.items():
            if not file.exists():
                pq.write_table(pa.Table.from_pylist(rows_of(part)), file)

    # ------------------------------------------------------------------ tokenizers and rows

    @cached_property
    def tokenizers(self) -> dict[str, Path]:
        """Folder of each, made where it is not there."""
        folders = {name: self.output / f"tokenizer_{name}" for name in TOKENIZERS}
        base = folders["qwen"]
        if not base.exists():
            rows = [row for part in PARTS for row in pq.read_table(self.files[part]).to_pylist()]
            partial = base.with_name(base.name + ".partial")
            partial.mkdir(parents=True, exist_ok=True)
            write_small_tokenizer(DATA / "qwen3-0.6b", partial, rows, FORMAT)
            Chat.load(str(partial), FORMAT).save(partial)
            partial.rename(base)
        for name, pieces in TOKENIZERS.items():
            if not folders[name].exists():
                texts = [arg for part in ("first", "second") for arg in ("--input", str(self.files[part]))]
                held_out = ["--validation", str(self.files["validation"])]
                options = ["--source", str(base), "--pieces", str(pieces), "--output", str(folders[name])]
                main(["tokens", *options, *texts, *held_out])
        return folders

    def tokens(self, tokenizer: str) -> float:
        """Tokens of the training rows over those in Qwen's."""
        chats = [Chat.load(str(self.tokenizers[name]), FORMAT) for name in (tokenizer, "qwen")]
        rows = pq.read_table(self.files["second"]).to_pylist()
        ours, base = (sum(len(chat.encode(row).input_ids) for row in rows) for chat in chats)
        return ours / base

    def options(self, tokenizer: str, train: Sequence[str], seed: int) -> dict[str, Any]:
        """Of the data module; sequences hold as much text in any tokenizer."""
        longest = 8 * round(self.setting.max_length * self.tokens(tokenizer) / 8)
        return {
            "tokenizer": str(self.tokenizers[tokenizer]),
            "train": [str(self.files[part]) for part in train],
            "validation": str(self.files["validation"]),
            "max_length": longest,
            "tokens_per_batch": longest * (self.setting.tokens_per_batch // self.setting.max_length),
            "bad_rows": "skip",
            "seed": seed,
            "cache_dir": str(self.output / "cache"),
        }

    def data(self, tokenizer: str, train: Sequence[str], seed: int) -> ChatDataModule:
        """Rows in one tokenizer."""
        return ChatDataModule(format=FORMAT, **self.options(tokenizer, train, seed))

    # ------------------------------------------------------------------ models

    def pretrained(self, name: str) -> tuple[Path, dict[str, Any]]:
        """A model at its plateau in Qwen's tokens: its folder, and how its training went.

        Args:
            name: "dense", which students are made from; "untied", the same with a head of its own; "teacher".
        """
        setting = self.setting
        dense = qwen3(setting.width, setting.layers, setting.inner)
        shapes = {
            "dense": dense,
            "untied": dense | {"tie_word_embeddings": False},
            "teacher": qwen3(setting.teacher_width, setting.teacher_layers, setting.teacher_inner),
        }
        parts = {"dense": ["first"], "untied": ["first"], "teacher": ["first", "second"]}
        keys = ("max_length", "tokens_per_batch", "dense_steps", "dense_rate", "check_every")
        config = {key: getattr(setting, key) for key in keys} | {"shape": shapes[name]}
        folder = self.output / name

        def train() -> dict[str, Any]:
            lightning.seed_everything(0, verbose=False)
            plateau = Plateau(patience=3)
            module = build(
                "pretrain.PretrainModule",
                {
                    "network": {"config": shapes[name]},
                    "objective": {"ce": {"weight": 1.0, "segments": ["user", "assistant"]}},
                    "learning_rate": setting.dense_rate,
                    "optimizer": {"warmup_steps": 30, "schedule": "inverse_sqrt"},
                },
            )
            checks = {"val_check_interval": setting.check_every, "check_val_every_n_epoch": None}
            made = trainer(max_steps=setting.dense_steps, callbacks=[plateau], **checks)
            made.fit(module, datamodule=self.data("qwen", parts[name], 0))
            module.model.hf.load_state_dict(plateau.weights)
            module.model.hf.save_pretrained(folder)
            module.chat.save(folder)
            return {"curve": plateau.curve, "steps": made.global_step}

        return folder, remember(self.output, name, config, train)

    def module(self, tokenizer: str, arm: str, rate: float, seed: int) -> LanguageModule:
        """A student before its training."""
        student = {
            "source": str(self.pretrained("dense")[0]),
            "upcycle": {"num_experts": 4, "num_experts_per_tok": 2, "jitter": 0.01, "seed": seed},
        }
        kl = 0.0 if arm == "ce" else self.setting.kl_weight
        options: dict[str, Any] = {
            "objective": {"ce": {"weight": 1.0}, "balance": {"weight": 0.01}, "kl": {"weight": kl}},
            "learning_rate": rate,
            "optimizer": {"warmup_steps": 20, "schedule": "cosine", "final_learning_rate": 0.1},
        }
        if arm == "ce":
            return build("pretrain.PretrainModule", options | {"network": student})
        return build("distill.DistillModule", options | {"student": student, "teacher": self.teacher(tokenizer, arm)})

    def teacher(self, tokenizer: str, arm: str) -> dict[str, Any]:
        """The teacher at hand, or the answers that `cache` has written."""
        source = {"source": str(self.pretrained("teacher")[0]), "dtype": "float32"}
        if arm != CACHED:
            return source
        folder = self.output / f"answers_{tokenizer}"
        if not (folder / MANIFEST).exists():
            student = {"source": str(self.pretrained("dense")[0])}
            asked = {"student": student, "teacher": source, "objective": {"kl": {"weight": 1.0}}}
            data = self.options(tokenizer, ["second"], 0) | {"format": asdict(FORMAT)}
            config = {
                "model": {"class_path": "DistillModule", "init_args": asked},
                "data": {"class_path": "ChatDataModule", "init_args": data},
            }
            file = self.output / f"answers_{tokenizer}.yaml"
            file.write_text(yaml.safe_dump(config), "utf-8")
            main(["cache", "--config", str(file), "--output", str(folder)])
        return {"cache": str(folder)}

    # ------------------------------------------------------------------ cells

    def cell(self, tokenizer: str, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """Train one student: what it comes to, and what that costs."""

        def train() -> dict[str, Any]:
            data, module = self.data(tokenizer, ["second"], seed), self.module(tokenizer, arm, rate, seed)
            lightning.seed_everything(seed, verbose=False)
            data.setup("fit")
            text = sum(len(row["advisory"].encode()) for row in data.rows("train").table)
            clock = Clock()
            made = trainer(max_epochs=self.setting.epochs, callbacks=[clock])
            made.fit(module, datamodule=data)
            found = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("val/")}
            return found | {
                "steps": made.global_step,
                "cpu_seconds_per_mb": clock.seconds / (self.setting.epochs * text / 1e6),
                "peak_mb": clock.peak,
                **self.writes(module, data),
            }

        return remember(
            self.output, cell_name(tokenizer, arm, rate, seed), self.config(tokenizer, arm, rate, seed), train
        )

    def writes(self, module: LanguageModule, data: ChatDataModule) -> dict[str, float]:
        """CPU seconds and tokens of an advisory: as much text as the rows' own, greedily, one at a time."""
        hf, table = module.model.hf.eval(), data.rows("validation").table
        tokens, began = 0, time.process_time()
        for row in (table[i] for i in range(ANSWERS)):
            count = len(module.chat.encode_text(row["advisory"]))
            prompt = torch.tensor([module.chat.encode_prompt(row["scenario"], thought=False)])
            hf.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True)
            tokens += count
        return {
            "cpu_seconds_per_advisory": (time.process_time() - began) / ANSWERS,
            "tokens_per_advisory": tokens / ANSWERS,
        }

    def before(self, tokenizer: str, name: str = "dense", start: str | None = None) -> float:
        """Bits per byte on held-out advisories before any training in these tokens, without experts.

        New rows start as they do in a run, unless told otherwise.
        """
        chat = Chat.load(str(self.tokenizers[tokenizer]), FORMAT)
        model = ModelConfig(str(self.pretrained(name)[0])).load("source", chat)
        if start is not None:
            restart(model, chat, *STARTS[start])
        rows = pq.read_table(self.files["validation"]).to_pylist()
        return bits_per_byte(model, chat, [row["advisory"] for row in rows])

    def config(self, tokenizer: str, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """What a result depends on."""
        return {
            "setting": asdict(self.setting),
            "pieces": TOKENIZERS[tokenizer],
            "arm": arm,
            "rate": rate,
            "seed": seed,
        }

    def finished(self, tokenizer: str, arm: str, rate: float, seed: int) -> dict[str, Any] | None:
        """The result of a cell that is there."""
        name, config = cell_name(tokenizer, arm, rate, seed), self.config(tokenizer, arm, rate, seed)
        path = result_file(self.output, name, config)
        return json.loads(path.read_text("utf-8"))["result"] if path.exists() else None

    def rate(self, tokenizer: str, arm: str) -> float | None:
        """The best learning rate on seed 0; None before all have been tried. At hand as from the cache."""
        tried = [self.finished(tokenizer, "ce" if arm == "ce" else CACHED, rate, 0) for rate in RATES]
        losses = [one["val/bits_per_byte"] for one in tried if one is not None]
        return RATES[losses.index(min(losses))] if len(losses) == len(RATES) else None

    def results(self, seeds: int) -> dict[tuple[str, str], Cells]:
        """What is finished at the best rates: tokenizer and arm -> results, seed by seed."""
        found: dict[tuple[str, str], Cells] = {}
        for tokenizer, arm in itertools.product(TOKENIZERS, ARMS):
            rate = self.rate(tokenizer, arm)
            cells = [self.finished(tokenizer, arm, rate, seed) for seed in range(seeds)] if rate else []
            if kept := [cell for cell in cells if cell is not None]:
                found[tokenizer, arm] = kept
        return found


def cell_name(tokenizer: str, arm: str, rate: float, seed: int) -> str:
    """Of its file."""
    return f"{tokenizer}_{arm}_{rate:g}_{seed}"


STARTS = {
    "mean": (0.0, 0.0),
    "first piece": (-math.inf, -math.inf),
    "last piece": (math.inf, math.inf),
    "input: last, head: first": (math.inf, -math.inf),
    "weights e^j and e^-j": (1.0, -1.0),
    "weights e^2j and e^-2j": (2.0, -2.0),
    "input: mean, head: e^-j": (0.0, -1.0),
}
"""Name -> of the input embedding and the head, a: the piece at place j has a share in proportion to e^(a j)."""


def restart(model: PreTrainedModel, chat: Chat, embedding: float, head: float) -> None:
    """Start the rows of merged tokens anew, see STARTS; tied ones as the embedding's."""
    matrices = [(model.get_input_embeddings().weight, embedding)]
    if not model.config.tie_word_embeddings:
        matrices.append((model.get_output_embeddings().weight, head))
    with torch.no_grad():
        for rows, power in matrices:
            for token, pieces in chat.merged.items():
                places = torch.arange(len(pieces), dtype=torch.float32)
                if math.isinf(power):
                    share = (places == (len(pieces) - 1 if power > 0 else 0)).float()
                else:
                    share = (power * places).softmax(0)
                rows[token] = share @ rows[list(pieces)]


def starts(hindi: Hindi) -> str:
    """How new rows can start: bits per byte before any training."""
    names = [name for name, pieces in TOKENIZERS.items() if pieces]
    head = ["new rows start as", *(f"{tokenizer}, {model}" for model in ("tied", "untied") for tokenizer in names)]
    rows = [
        [start, *(f"{hindi.before(name, model, start):.3f}" for model in ("dense", "untied") for name in names)]
        for start in STARTS
    ]
    whole = [f"{hindi.before('qwen', model):.3f}" for model in ("dense", "untied") for _ in names]
    return markdown(tuple(head), [["(Qwen's tokens)", *whole], *rows])


class Clock(lightning.Callback):
    """CPU seconds of the training steps alone, and how far memory rises above what is there when they begin."""

    seconds = 0.0
    peak = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin."""
        gc.collect()
        give_back()
        forget_peak()
        self._before, self._began = resident_mb("VmRSS"), time.process_time()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stand still."""
        self.seconds += time.process_time() - self._began
        self.peak = max(self.peak, resident_mb("VmHWM") - self._before)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Go on."""
        forget_peak()
        self._began = time.process_time()


class Column(NamedTuple):
    """A number of every student, and how it is set against the one with Qwen's tokens of the same arm and seed."""

    title: str
    key: str
    digits: int
    against: str = ""  # "%": more or less than its; "x": its over this one; else not

    def compared(self, cells: Cells, base: Cells) -> str:
        """Mean and spread over the seeds."""
        pairs = [(cell[self.key], other[self.key]) for cell, other in zip(cells, base, strict=False)]
        if not pairs:
            return ""
        if self.against == "%":
            return shown([100 * (ours / theirs - 1) for ours, theirs in pairs], 1, "+") + " %"
        return shown([theirs / ours for ours, theirs in pairs], 2) + "x"


COLUMNS = (
    Column("bits per byte", "val/bits_per_byte", 4, "%"),
    Column("KL", "val/kl", 3),
    Column("CPU s per MB of advisories", "cpu_seconds_per_mb", 0, "x"),
    Column("CPU s to write one", "cpu_seconds_per_advisory", 2, "x"),
    Column("tokens of one", "tokens_per_advisory", 0),
    Column("MB", "peak_mb", 0),
)


def table(hindi: Hindi, results: dict[tuple[str, str], Cells]) -> str:
    """Mean and spread over the seeds."""
    before = {name: hindi.before(name) for name in TOKENIZERS}
    head = ["tokens", "trained by", "learning rate", "bits per byte before"]
    for column in COLUMNS:
        head += [column.title] + (["against Qwen's"] if column.against else [])
    rows = []
    for (tokenizer, arm), cells in results.items():
        row = [tokenizer, arm, f"{hindi.rate(tokenizer, arm):g}", f"{before[tokenizer]:.3f}"]
        for column in COLUMNS:
            row.append(shown([cell[column.key] for cell in cells], column.digits) if column.key in cells[0] else "")
            if column.against:
                base = results.get(("qwen", arm), [])
                row.append(column.compared(cells, base) if tokenizer != "qwen" else "")
        rows.append(row)
    return markdown(tuple(head), rows)


def trials(hindi: Hindi) -> str:
    """Bits per byte of seed 0 at every learning rate."""
    rows = []
    for tokenizer, arm in itertools.product(TOKENIZERS, ("ce", CACHED)):
        found = [hindi.finished(tokenizer, arm, rate, 0) for rate in RATES]
        rows.append([tokenizer, arm, *(f"{one['val/bits_per_byte']:.4f}" if one else "" for one in found)])
    return markdown(("bits per byte at seed 0", "trained by", *(f"{rate:g}" for rate in RATES)), rows)


def report(hindi: Hindi, seeds: int) -> str:
    """The table, and what it was made of."""
    setting, results = hindi.setting, hindi.results(seeds)
    cut = read_cut(hindi.tokenizers["qwen"])
    curves = {name: hindi.pretrained(name)[1] for name in ("dense", "teacher")}
    shares = {name: hindi.tokens(name) for name in TOKENIZERS}
    steps = {name: cells[0]["steps"] for (name, _), cells in results.items()}
    said = ", ".join(
        f"{name} {min(loss for _, loss in one['curve']):.3f} after {one['steps']} steps" for name, one in curves.items()
    )
    lines = [
        f"Qwen3 of {setting.layers} layers of {setting.width}, 4 experts, top-2; teacher of {setting.teacher_layers} "
        f"layers of {setting.teacher_width}. {cut.kept:,} of {cut.whole:,} ids, renumbered. Loss before, in nats per "
        f"token of Qwen's: {said}. "
        f"{setting.epochs} epochs; steps: {steps}; tokens of the rows: "
        f"{', '.join(f'{name} {share:.3f}' for name, share in shares.items())}. "
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32.",
        "",
        table(hindi, results),
        "",
        trials(hindi),
    ]
    text = "\n".join(lines)
    (hindi.output / "table.md").write_text(text + "\n", "utf-8")
    return text


def train_cell(setting: Setting, output: Path, *cell: Any) -> None:
    """One student, in a process of its own."""
    quiet()
    torch.set_num_threads(1)
    Hindi(setting, output).cell(*cell)


def train(hindi: Hindi, cells: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Students that are not finished yet, so many at a time."""
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        missing = [cell for cell in cells if hindi.finished(*cell) is None]
        for one in [pool.submit(train_cell, hindi.setting, hindi.output, *cell) for cell in missing]:
            one.result()


def run() -> None:
    """Train what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of each student")
    parser.add_argument("--workers", type=int, default=1, help="students that are trained at a time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print what is finished, train nothing")
    parser.add_argument("--starts", action="store_true", help="compare how new rows can start, train no student")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    setting = replace(Setting(), epochs=args.epochs) if args.epochs else Setting()
    hindi = Hindi(setting, args.output)
    if args.starts:
        print(starts(hindi))
        return
    if not args.table:
        for name in ("dense", "teacher"):
            hindi.pretrained(name)
        for tokenizer in TOKENIZERS:
            hindi.teacher(tokenizer, CACHED)
        trials = itertools.product(TOKENIZERS, ("ce", CACHED), RATES, [0])
        train(hindi, list(trials), args.workers)
        pairs = [(name, arm, hindi.rate(name, arm)) for name, arm in itertools.product(TOKENIZERS, ARMS)]
        train(hindi, [(*pair, seed) for seed in range(args.seeds) for pair in pairs], args.workers)
    print(report(hindi, args.seeds))


if __name__ == "__main__":
    run()
