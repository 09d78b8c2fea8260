"""What each term of the objective is worth: one student, one trained teacher, many objectives, several seeds.

    python benchmarks/ablation.py --corpus embedded|real [--seeds 3] [--cells none,ce+kl,all] [--steps N] [--output DIR]
    python benchmarks/ablation.py --corpus real --full_vocabulary      the main result at Qwen3's whole vocabulary
    python benchmarks/ablation.py --corpus embedded --table            print what is there, train nothing

A teacher is trained until its validation loss falls no further, once for all. For each seed a smaller dense model is
trained briefly; upcycled, it is where every cell of that seed starts. The cells of a seed see the same rows in the same
order for as many steps at the same learning rate, and differ in the objective alone. All are scored in one way: losses
on held-out rows, divergence from the teacher, debiased CKA with the teacher over the uniform layer map, load of the
experts, and on the embedded corpus the share of right diagnoses and actions in answers to held-out scenarios.

A finished cell is a JSON file in DIR, named by a hash of everything that was set: started again, the script goes on
where it stopped, and a cell that was cut off begins anew. The hash does not know the code: empty DIR after changing it.

The rows of `--corpus real` come from the folder named by AGRI_MOE_DATA. Their token ids are renumbered, see
small_vocabulary.py.
"""

import argparse
import copy
import hashlib
import json
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for every model that is loaded; read when tqdm is imported

import lightning
import pyarrow.parquet as pq
import torch
from ablation_table import Results, plot, progress, tables
from jsonargparse import ArgumentParser
from loss_step import processor
from small_vocabulary import read_cut, widen, write_small_tokenizer
from torch import Tensor

from agri_moe.callbacks.cka import CKAMonitor
from agri_moe.data.chat import DEFAULT_FORMAT, Chat, ChatFormat
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.synthetic import score, write_corpus
from agri_moe.generation import generate
from agri_moe.layer_map import layer_pairs
from agri_moe.models.base import LanguageModule, parameter_counts
from agri_moe.runs import replace_text

DATA = Path(os.environ.get("AGRI_MOE_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUTPUT = Path(__file__).parent / "output" / "ablation"
REAL = ("plant_disease", "soil", "hindi_qa")
WHOLE_VOCABULARY = 151_936

# ---------------------------------------------------------------------- what is compared

BASE: dict[str, dict[str, Any]] = {
    "ce": {"weight": 1.0},
    "kl": {"weight": 1.0, "segments": ["assistant"]},
}
CELLS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {"kl": {"weight": 0.0}},
    "ce+kl": {},
    "+cka": {"cka": {"weight": 0.1}},
    "+hidden_mse": {"hidden": {"weight": 0.1, "distance": "mse"}},
    "+hidden_cosine": {"hidden": {"weight": 0.1, "distance": "cosine"}},
    "+attention": {"attention": {"weight": 0.1}},
    "+diversity": {"diversity": {"weight": 0.01, "sample_tokens": 128}},
    "+anchor": {"anchor": {"cka": {"weight": 0.1}}},
    "reverse": {"kl": {"divergence": "reverse"}},
    "jsd": {"kl": {"divergence": "jsd"}},
    "adaptive": {"kl": {"temperature": {"minimum": 1.0, "maximum": 4.0}}},
    "kl_thought": {"kl": {"segments": ["thought", "assistant"]}},
    "all": {
        "cka": {"weight": 0.1, "layer_weights": "balanced"},
        "attention": {"weight": 0.1, "layer_weights": "balanced"},
        "diversity": {"weight": 0.01, "sample_tokens": 128},
    },
}
"""Name of a cell -> what it changes in BASE, term by term."""

MAIN = ("none", "ce+kl", "all")
SCORED: dict[str, dict[str, Any]] = {
    **BASE,
    "cka": {"weight": 0.1},
    "diversity": {"weight": 0.01, "sample_tokens": 128},
}
"""What is measured, for every model alike; the weights play no part in it."""


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        steps: Optimizer steps, at most so many with `patience`.
        learning_rate: Peak; linear warm-up over 20 steps, cosine to a tenth.
        shape: Hugging Face config of a model with random weights; empty for the student, which is upcycled.
        check_every: Steps between validations.
        patience: Ends when so many validations in a row were no better than the best by MARGIN; 0 takes all steps.
    """

    steps: int
    learning_rate: float
    shape: dict[str, Any]
    check_every: int = 0
    patience: int = 0


@dataclass(frozen=True)
class Setting:
    """Everything that a table depends on, apart from cells and seeds."""

    corpus: str
    max_length: int
    tokens_per_batch: int
    teacher: Training
    dense: Training
    student: Training
    experts: int = 8
    top_k: int = 2
    answers: int = 0  # held-out scenarios that are answered
    cka_every: int = 2  # one validation batch in so many is compared by CKA
    whole_vocabulary: bool = False


MARGIN = 0.002  # nats per token: less than that is no fall of the validation loss
MAX_NEW_TOKENS = 160  # the longest embedded row answers in fewer


def qwen3(width: int, layers: int, inner: int) -> dict[str, Any]:
    """Config of a small Qwen3 with heads of 32, two query heads to a key-value head."""
    return {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "head_dim": 32,
        "tie_word_embeddings": True,
    }


SETTINGS = {
    "embedded": Setting(
        "embedded",
        max_length=256,
        tokens_per_batch=1024,
        teacher=Training(1600, 4e-3, qwen3(192, 6, 384), check_every=100, patience=3),
        dense=Training(150, 4e-3, qwen3(128, 3, 256)),
        student=Training(300, 4e-3, {}),
        answers=240,
    ),
    "real": Setting(
        "real",
        max_length=1024,
        tokens_per_batch=1024,
        teacher=Training(4000, 2e-3, qwen3(128, 6, 384), check_every=150, patience=2),
        dense=Training(150, 3e-3, qwen3(96, 3, 192)),
        student=Training(150, 3e-3, {}),
        cka_every=4,
    ),
}

# ---------------------------------------------------------------------- rows


class Corpus(NamedTuple):
    """Where rows and tokenizer lie, and a word on them for the table."""

    train: list[str]
    validation: list[str]
    tokenizer: str
    format: ChatFormat
    about: str


def embedded_corpus(folder: Path) -> Corpus:
    """The embedded Hindi crop advisory, written when it is not there."""
    if not (folder / "validation.parquet").exists():
        write_corpus(folder)
    return Corpus(
        [str(folder / "train.parquet")],
        [str(folder / "validation.parquet")],
        str(folder / "tokenizer"),
        DEFAULT_FORMAT,
        "embedded Hindi crop advisory (a grammar)",
    )


def real_corpus(folder: Path, whole_vocabulary: bool) -> Corpus:
    """Plant diseases, soil (English) and XQuAD (Hindi), under a short instruction: the default one takes 98 tokens."""
    if not DATA.is_dir():
        raise SystemExit(f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real rows.")
    files = {split: [str(DATA / f"{name}_{split}.parquet") for name in REAL] for split in ("train", "val")}
    chat_format = ChatFormat(default_system="Answer the question.")
    source = DATA / "qwen3-0.6b"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        rows = [row for name in files["train"] + files["val"] for row in pq.read_table(name).to_pylist()]
        write_small_tokenizer(source, partial, rows, chat_format)
        partial.rename(folder)
    cut = read_cut(folder)
    about = f"plant diseases, soil (English), XQuAD (Hindi); Qwen3's tokens, vocabulary of {WHOLE_VOCABULARY:,}"
    if not whole_vocabulary:
        about = (
            f"plant diseases, soil (English), XQuAD (Hindi); token ids renumbered: {cut.occurring:,} of "
            f"{WHOLE_VOCABULARY:,} occur, {cut.kept:,} are kept (with the pieces that the tokenizer merges them from)"
        )
    return Corpus(files["train"], files["val"], str(source if whole_vocabulary else folder), chat_format, about)


# ---------------------------------------------------------------------- training


def build(module: str, options: Mapping[str, Any]) -> LanguageModule:
    """A module from the keys that a config file has under `model.init_args`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LanguageModule, "model")
    config = parser.parse_object({"model": {"class_path": f"agri_moe.models.{module}", "init_args": dict(options)}})
    built: LanguageModule = parser.instantiate(config).model
    return built


def objective(cell: str) -> dict[str, dict[str, Any]]:
    """The whole objective of a cell."""
    changes = CELLS[cell]
    return {term: BASE.get(term, {}) | changes.get(term, {}) for term in [*BASE, *(changes.keys() - BASE.keys())]}


def trainer(**options: Any) -> lightning.Trainer:
    """A trainer on the CPU that writes nothing."""
    for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        options[name] = False
    return lightning.Trainer(accelerator="cpu", gradient_clip_val=1.0, num_sanity_val_steps=0, **options)


class Plateau(lightning.Callback):
    """Ends training when the validation loss falls no further; keeps its curve and the weights at its lowest."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.curve: list[tuple[int, float]] = []
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare with the best so far."""
        assert isinstance(pl_module, LanguageModule)
        losses = [loss for _, loss in self.curve]
        loss = float(trainer.callback_metrics["val/ce"])
        self.curve.append((trainer.global_step, loss))
        if loss < min(losses, default=math.inf):
            self.weights = copy.deepcopy(pl_module.model.hf.state_dict())
        trainer.should_stop = on_plateau([*losses, loss], self.patience)


def on_plateau(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` losses are all no better, by MARGIN, than the best before them."""
    return len(losses) > patience and min(losses[-patience:]) > min(losses[:-patience]) - MARGIN


class MeanCKA(CKAMonitor):
    """The CKA of every pair of layers over a share of the batches; its mean over the uniform layer map.

    Args:
        every: One batch in so many is compared. They are spread out, since the longest rows are packed first.
    """

    value = math.nan

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand on every so many batches, as if each were the first."""
        if batch_idx % self.every == 0:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, 0)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the number, write nothing."""
        assert self._matrix is not None
        matrix = self._matrix.compute()
        student, teacher = matrix.shape
        pairs = layer_pairs("uniform", student, teacher, "layers", attention=False)
        self.value = statistics.fmean(float(matrix[pair]) for pair in pairs)


class Weights(lightning.Callback):
    """Puts trained weights into the model that is about to be scored."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Load them."""
        assert isinstance(pl_module, LanguageModule)
        pl_module.model.hf.load_state_dict(self.weights)


class Ablation:
    """The trainings of one setting.

    Args:
        setting: Rows, models and steps.
        output: Folder of results and models.
    """

    scored = SCORED

    def __init__(self, setting: Setting, output: Path) -> None:
        self.setting = setting
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        if setting.corpus == "embedded":
            self.corpus = embedded_corpus(output / "corpus")
        else:
            self.corpus = real_corpus(output / "small_tokenizer", setting.whole_vocabulary)

    @property
    def rows(self) -> dict[str, Any]:
        """The rows as a config names them, without the format and the seed."""
        return {
            "train": self.corpus.train,
            "validation": self.corpus.validation,
            "tokenizer": self.corpus.tokenizer,
            "max_length": self.setting.max_length,
            "tokens_per_batch": self.setting.tokens_per_batch,
            "bad_rows": "skip",  # the longest Hindi passages
            "cache_dir": str(self.output / "cache"),
        }

    def data(self, seed: int) -> ChatDataModule:
        """The rows in the order of a seed."""
        return ChatDataModule(**self.rows, format=self.corpus.format, seed=seed)

    def fit(
        self, module: str, options: dict[str, Any], training: Training, seed: int
    ) -> tuple[LanguageModule, Plateau]:
        """Train one model."""
        lightning.seed_everything(seed, verbose=False)
        rate = {"learning_rate": training.learning_rate, "optimizer": {"warmup_steps": 20}}
        built = build(module, options | rate)
        plateau = Plateau(training.patience)
        checks: dict[str, Any] = {"limit_val_batches": 0}
        if training.patience:
            checks = {"val_check_interval": training.check_every, "check_val_every_n_epoch": None}
        trainer(max_steps=training.steps, callbacks=[plateau], **checks).fit(built, datamodule=self.data(seed))
        return built, plateau

    # ------------------------------------------------------------------ models

    def pretrained(self, name: str, training: Training, seed: int) -> tuple[Path, dict[str, Any]]:
        """A dense model trained on the rows alone: its folder, and how its training went."""
        if self.setting.whole_vocabulary:
            return self.widened(name, seed)
        rows = {key: getattr(self.setting, key) for key in ("corpus", "max_length", "tokens_per_batch")}
        config = {"rows": rows, "training": asdict(training), "seed": seed}
        folder = self.output / f"{name}_{mark(config)}"

        def work() -> dict[str, Any]:
            options = {"network": {"config": training.shape}}
            module, plateau = self.fit("pretrain.PretrainModule", options, training, seed)
            if plateau.weights:
                module.model.hf.load_state_dict(plateau.weights)
            module.model.hf.save_pretrained(folder)
            module.chat.save(folder)
            return {"curve": plateau.curve, "steps": module.trainer.global_step}

        return folder, remember(self.output, name, config, work)

    def widened(self, name: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The model of the small vocabulary, moved to the whole one."""
        small = Ablation(replace(SETTINGS["real"], whole_vocabulary=False), self.output)
        source, result = small.teacher() if name == "teacher" else small.dense(seed)
        folder = source.with_name(source.name + "_whole")
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            unseen = read_cut(self.output / "small_tokenizer").unseen
            widen(source, partial, Chat.load(self.corpus.tokenizer, self.corpus.format), WHOLE_VOCABULARY, unseen)
            partial.rename(folder)
        return folder, result

    def teacher(self) -> tuple[Path, dict[str, Any]]:
        """The one teacher."""
        return self.pretrained("teacher", self.setting.teacher, 0)

    def dense(self, seed: int) -> tuple[Path, dict[str, Any]]:
        """What the students of a seed are upcycled from."""
        return self.pretrained(f"dense_seed{seed}", self.setting.dense, seed)

    def student(self, seed: int) -> dict[str, Any]:
        """The student of a seed as it stands before distillation, as a config names it."""
        experts = {"num_experts": self.setting.experts, "num_experts_per_tok": self.setting.top_k, "seed": seed}
        return {"source": str(self.dense(seed)[0]), "upcycle": experts}

    # ------------------------------------------------------------------ cells

    def config(self, cell: str, seed: int) -> dict[str, Any]:
        """What the result of a cell depends on."""
        terms = objective(cell) if cell in CELLS else {}
        return {"setting": asdict(self.setting), "objective": terms, "seed": seed}

    def cell(self, cell: str, seed: int) -> dict[str, Any]:
        """Train and score one cell; `teacher` and `start` are scored as they stand."""

        def work() -> dict[str, Any]:
            if cell == "teacher":
                return self.score({"source": str(self.teacher()[0]), "upcycle": None}, sparse=False)
            student = self.student(seed)
            if cell == "start":
                return self.score(student)
            started = time.perf_counter()
            module = self.train(cell, student, seed)
            seconds = time.perf_counter() - started
            return self.score(student, module.model.hf.state_dict()) | {"training_seconds": seconds}

        return remember(self.output, f"{cell}_seed{seed}", self.config(cell, seed), work)

    def train(self, cell: str, student: dict[str, Any], seed: int) -> LanguageModule:
        """Train a student under a cell's objective."""
        terms = objective(cell)
        if cell == "none":
            options = {"network": student, "objective": terms}
            return self.fit("pretrain.PretrainModule", options, self.setting.student, seed)[0]
        options = {"student": student, "teacher": self.teacher_config(), "objective": terms}
        return self.fit("distill.DistillModule", options, self.setting.student, seed)[0]

    def teacher_config(self) -> dict[str, Any]:
        """The teacher as a config names it; it was trained in the student's own format."""
        return {"source": str(self.teacher()[0]), "view": "same", "dtype": "float32"}

    def score(
        self, student: dict[str, Any], weights: dict[str, Tensor] | None = None, sparse: bool = True
    ) -> dict[str, Any]:
        """Every measure of a student, or of that student with other weights."""
        terms = {name: term for name, term in self.scored.items() if sparse or name != "diversity"}
        options = {"student": student, "teacher": self.teacher_config(), "objective": terms}
        module = build("distill.DistillModule", options)
        monitors = [MeanCKA(self.setting.cka_every)] if "cka" in terms else []
        callbacks = [*monitors, *([Weights(weights)] if weights else [])]
        data = self.data(0)  # packing depends on the seed, and all are scored on the same batches
        scorer = trainer(callbacks=callbacks)
        scorer.validate(module, datamodule=data, verbose=False)
        values = {key.removeprefix("val/"): float(value) for key, value in scorer.callback_metrics.items()}
        total, active, _ = parameter_counts(module.model)
        values |= {"total": total, "active": active}
        if monitors:
            values["cka"] = monitors[0].value
        return values | (self.answer(module, data.chat) if self.setting.answers else {})

    def answer(self, module: LanguageModule, chat: Chat) -> dict[str, float]:
        """Share of right diagnoses and actions among greedy answers to held-out scenarios."""
        rows = pq.read_table(self.corpus.validation[0]).to_pylist()[: self.setting.answers]
        prompts = [chat.encode_prompt(row["scenario"]) for row in rows]
        hf = module.model.hf.eval()
        answers = generate(hf, chat, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=120)
        scores = [score(answer.advisory, row) for answer, row in zip(answers, rows, strict=True)]
        return {
            "diagnosis": statistics.fmean(s.diagnosis for s in scores),
            "action": statistics.fmean(s.action for s in scores),
        }

    # ------------------------------------------------------------------ results

    def wanted(self, cells: Sequence[str], seeds: int) -> Iterator[tuple[str, int]]:
        """Every cell and seed, seed by seed."""
        yield "teacher", 0
        for seed in range(seeds):
            for cell in ("start", *cells):
                yield cell, seed

    def results(self, cells: Sequence[str], seeds: int) -> dict[str, dict[int, dict[str, Any]]]:
        """What is finished: cell -> seed -> result."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for cell, seed in self.wanted(cells, seeds):
            path = result_file(self.output, f"{cell}_seed{seed}", self.config(cell, seed))
            if path.exists():
                found.setdefault(cell, {})[seed] = json.loads(path.read_text("utf-8"))["result"]
        return found

    def about(self, results: Results) -> str:
        """Machine, rows, sizes, steps and the teacher's plateau."""
        setting, data = self.setting, self.data(0)
        train, held_out = len(data.rows("train")), len(data.rows("validation"))
        _, training = self.teacher()
        curve = ", ".join(f"{loss:.3f} at {step}" for step, loss in training["curve"][-6:])
        one = next(iter(results["start"].values()))
        ended = "no longer falling" if training["steps"] < setting.teacher.steps else "at the end of its schedule"
        student = setting.student
        return "\n".join(
            [
                f"Rows: {self.corpus.about}; {train:,} to train on, {held_out:,} held out, "
                f"{len(data.rejected):,} longer than {setting.max_length:,} tokens left out.",
                f"Student: {one['total'] / 1e6:.2f}M parameters, {one['active'] / 1e6:.2f}M active, {setting.experts} "
                f"experts, top-{setting.top_k}, upcycled from {shape(setting.dense.shape)} after {setting.dense.steps} "
                f"steps; {student.steps} steps of up to {setting.tokens_per_batch:,} tokens, learning rate "
                f"{student.learning_rate:g}.",
                f"Teacher: {shape(setting.teacher.shape)}, {training['steps']:,} steps, validation loss {ended}: "
                f"{curve}.",
                f"Machine: {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; "
                f"{sum(r['seconds'] for c in results.values() for r in c.values()) / 60:.0f} minutes for the cells.",
            ]
        )


def result_file(folder: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Where a result lies."""
    return folder / f"{name}_{mark(config)}.json"


def remember(folder: Path, name: str, config: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`: read from its file where that is there, else written to it once the work is done."""
    path = result_file(folder, name, config)
    if not path.exists():
        started = time.perf_counter()
        result = work() | {"seconds": time.perf_counter() - started}
        replace_text(path, json.dumps({"config": config, "result": result}, indent=1, ensure_ascii=False))
        print(f"{name}: {progress(result)}", flush=True)
    kept: dict[str, Any] = json.loads(path.read_text("utf-8"))["result"]
    return kept


def mark(config: Mapping[str, Any]) -> str:
    """Eight letters that tell one config from another."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def shape(config: Mapping[str, Any]) -> str:
    """A model's size in words."""
    return f"{config['num_hidden_layers']} layers of {config['hidden_size']}"


# ---------------------------------------------------------------------- the command


def whole(setting: Setting) -> Setting:
    """The same comparison at the whole vocabulary, where a step costs ten times as much: few steps."""
    short = replace(setting.student, steps=40)
    return replace(setting, whole_vocabulary=True, student=short, cka_every=8)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--seeds", type=int, help="3, or 1 with --full_vocabulary")
    parser.add_argument("--cells", help=f"names with commas between: {','.join(CELLS)}")
    parser.add_argument("--steps", type=int, help="optimizer steps of each cell")
    parser.add_argument("--full_vocabulary", action="store_true", help=f"{', '.join(MAIN)} at {WHOLE_VOCABULARY:,} ids")
    parser.add_argument("--output", type=Path, help=f"{OUTPUT}/CORPUS by default")
    parser.add_argument("--table", action="store_true", help="print what is finished, train nothing")
    args = parser.parse_args()
    if args.full_vocabulary and args.corpus != "real":
        parser.error("--full_vocabulary is for --corpus real: the embedded corpus has a small tokenizer of its own.")
    args.cells = args.cells.split(",") if args.cells else list(MAIN if args.full_vocabulary else CELLS)
    if unknown := [cell for cell in args.cells if cell not in CELLS]:
        parser.error(f"--cells names {unknown[0]!r}; there are {', '.join(CELLS)}.")
    args.seeds = args.seeds or (1 if args.full_vocabulary else 3)
    args.output = args.output or OUTPUT / args.corpus
    return args


def quiet() -> None:
    """Leave out what Lightning says of every one of many trainers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*rows skipped.*")


def run() -> None:
    """Train what is missing; print the table and draw the plot."""
    args = arguments()
    quiet()
    setting = SETTINGS[args.corpus]
    setting = whole(setting) if args.full_vocabulary else setting
    if args.steps:
        setting = replace(setting, student=replace(setting.student, steps=args.steps))
    ablation = Ablation(setting, args.output)
    if not args.table:
        for cell, seed in ablation.wanted(args.cells, args.seeds):
            ablation.cell(cell, seed)
    results = ablation.results(args.cells, args.seeds)
    if not results:
        raise SystemExit("error: no cell of this setting is finished; run without --table.")
    name = "full_vocabulary" if args.full_vocabulary else "table"
    text = f"{ablation.about(results)}\n\n{tables(results)}"
    print(f"\n{text}")
    (args.output / f"{name}.md").write_text(text + "\n", "utf-8")
    (args.output / f"{name}.json").write_text(json.dumps({"setting": asdict(setting), "results": results}, indent=1))
    plot(results, args.output / f"{name}.png")


if __name__ == "__main__":
    run()
