"""Lightning's CLI with run folders: `fit` resumes by itself, `validate` finds the newest run.

Imported only for training commands, since Lightning takes seconds to load.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import lightning
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from transformers import AutoModelForCausalLM

from agri_moe.callbacks.resume import AtomicCheckpointIO, Checkpoint, RunStatus
from agri_moe.callbacks.signals import Signals
from agri_moe.cli import HelpFormatter, example_of, fail, one_sentence
from agri_moe.content import content_fingerprint
from agri_moe.data.chat import Chat
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.data.logit_cache import tokenizer_fingerprint
from agri_moe.data.sources import find_sources
from agri_moe.evaluation import Row, table
from agri_moe.foreign_files import check_found_config, check_sharded, read_config
from agri_moe.models.base import LanguageModule, of_all_ranks
from agri_moe.models.distill import DistillModule
from agri_moe.models.layerwise import LayerwiseModule
from agri_moe.models.pretrain import PretrainModule
from agri_moe.models.training import TrainingModule
from agri_moe.runs import (
    LOGS,
    NO_ROOM,
    Lock,
    Run,
    check_room,
    differences,
    fingerprint,
    identity,
    new_run,
    newest_checkpoint,
    remove_leftovers,
    replace_text,
    set_aside,
    size_on_disk,
    step_of,
    unfinished_run,
)
from agri_moe.trained import check_intact, check_shardable

# Imported so that a config or --model may name them without their module's path.
SHORT_NAMES = (ChatDataModule, DistillModule, LayerwiseModule, PretrainModule)

# Warnings about what is meant, or that only the libraries' authors can mend.
NOISE = (
    ".*args parameter is intended to run from within Python.*",
    ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*",
    ".*LeafSpec.*is deprecated.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from .*",
)

UNTRAINED = "source"
"""Value of --ckpt_path that scores the model as it stands in its source folder."""


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence."""

    given: ClassVar[Sequence[str]] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence and exit with status 2."""
        if not self.exit_on_error:  # an inner parser that tries one of several types
            super().error(message, ex)
        fail(one_sentence(message, ex, self.given))


class Choice(NamedTuple):
    """Where a run lies, what it goes on from, and the step after which it has a validation (None: do none again)."""

    run: str
    checkpoint: str | None
    validated: int | None


class TrainingCLI(LightningCLI):
    """fit, validate, test and predict over the modules and data modules of this package."""

    run: Run | None = None
    lock: Lock | None = None
    signals: Signals | None = None

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.epilog = example_of(subcommand)
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=str,
                default="auto",
                help="auto: go on with the newest unfinished run of this config; never: start afresh; or a checkpoint.",
            )
            parser.add_argument(
                "--resume_anyway",
                type=bool,
                default=False,
                help="Resume though the config is another one, or rows or tokenizer have changed.",
            )
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is: Lightning would let hyperparameters in the checkpoint beat it."""

    def instantiate_classes(self) -> None:
        """Say in one sentence which package is lacking for a class that the config names, such as a logger."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            lacking = chained(error, ModuleNotFoundError)
            if lacking is None:
                raise
            named = re.search(r"class_path '([\w.]+)'", str(error))
            needs = f"{named[1]}, which the config names, needs a package" if named else "the config needs a package"
            raise ValueError(f"{needs} that is not installed: {lacking}") from error

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Every run saves and loads through `AtomicCheckpointIO`; its progress bar asks the device now and then."""
        given = self.config_init[self.subcommand]["trainer"]
        plugins, callbacks = (_listed(given[key]) for key in ("plugins", "callbacks"))
        if given["enable_checkpointing"] is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
            callbacks.append(Checkpoint())
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            # By default it shows every micro-batch's terms, and waits for the device to know them.
            callbacks.append(TQDMProgressBar(refresh_rate=10))
        return super().instantiate_trainer(plugins=[*plugins, AtomicCheckpointIO()], callbacks=callbacks, **kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved config of this command."""
        config = self.config[self.subcommand].as_dict()
        return {k: v for k, v in config.items() if k not in ("config", "resume", "resume_anyway", "ckpt_path")}

    @property
    def root(self) -> Path:
        """Where lightning_logs lies."""
        return Path(self.settings["trainer"]["default_root_dir"] or ".")

    def check(self) -> None:
        """Find what is wrong with settings, sources and rows before anything heavy is loaded."""
        self.datamodule.check()
        self.model.check(self.datamodule.chat)
        if self.subcommand == "fit":
            self.model.check_steps(self.trainer.max_steps)

    # ------------------------------------------------------------------ fit

    def before_fit(self) -> None:
        """Choose the run's folder and the checkpoint to go on from."""
        self.check()
        if self.settings["trainer"]["fast_dev_run"]:
            return
        if self.trainer.world_size > 1 and not self._launches_ranks():
            # Ranks that were started from outside must agree on a folder, so they have to meet before `fit` would.
            self.trainer.strategy.connect(self.model)
            self.trainer.strategy.setup_environment()
        self.signals = Signals()
        self.signals.install(self.trainer, self._ready)
        choice: Choice | None = None
        if self.trainer.is_global_zero:
            choice = self._choose_run()
        if self.trainer.world_size > 1:
            choice = self._share(choice)
        assert choice is not None, "one rank alone is the first rank, which has chosen"
        self.run = Run(Path(choice.run))
        self._enter(self.run, Path(choice.checkpoint) if choice.checkpoint else None, choice.validated)

    def _ready(self) -> None:
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.catch_up(self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Let go of the run and of the signals, however it ends."""
        try:
            super()._run_subcommand(subcommand)
        finally:
            if self.lock is not None:
                self.lock.release()
            if self.signals is not None:
                self.signals.restore()

    def _launches_ranks(self) -> bool:
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        return environment is not None and not environment.creates_processes_externally

    def _share(self, choice: Choice | None) -> Choice:
        """The first rank's choice, on every rank."""
        if not self._launches_ranks():
            shared = self.trainer.strategy.broadcast(choice)
            assert shared is not None, "the first rank has chosen"
            return shared
        # Lightning starts the other ranks of this host later, with this environment.
        if choice is not None:
            os.environ["AGRI_MOE_RUN"] = json.dumps(choice)
        return Choice(*json.loads(os.environ["AGRI_MOE_RUN"]))

    def _choose_run(self) -> Choice:
        """The run's folder, which is locked from now on, and the checkpoint to go on from."""
        mark, content = fingerprint(self.settings), content_of(self.datamodule)
        resume = self.config["fit"]["resume"]
        run = unfinished_run(self.root, mark) if resume == "auto" else None
        if run is None:
            source = None if resume in ("auto", "never") else self._check_resumed(Path(resume), mark)
            self._check_source(source, content, room=2)
            run, validated = new_run(self.root, mark), None
            self.lock = Lock(run)
        else:
            self.lock = Lock(run)  # first: from now on nobody else saves here
            remove_leftovers(run.folder / "checkpoints")
            source, damaged = run.intact_checkpoint()
            for complaint in damaged:
                rank_zero_warn(f"{complaint}; the checkpoint before it is used.")
            self._check_source(source, content, room=2 if source is None else 1)
            validated = run.read().get("validated", -1)
        run.write(content=content)
        return Choice(str(run.folder), str(source) if source else None, validated)

    def _check_source(self, source: Path | None, content: dict[str, str], room: int) -> None:
        """Refuse what cannot be gone on from, or a disk without room for two checkpoints, with those that are there."""
        if source is None:
            self._refuse_foreign_checkpoint()
            if isinstance(self.model, LanguageModule):
                size = checkpoint_size(self.model, self.datamodule.chat, str(self.trainer.precision))
                check_room(self.root, size, room)
            return
        self._check_strategy(source)
        check_room(self.root, size_on_disk(source), room)
        before = Run(source.parent.parent).read().get("content")
        changed = [key for key in content if before is not None and before.get(key) != content[key]]
        if changed and not self.config["fit"]["resume_anyway"]:
            raise ValueError(
                f"{' and '.join(changed)}: the content is not what {source} was trained on; restore it, give "
                "--resume_anyway true to go on with the new content, or --resume never to start afresh."
            )

    def _check_resumed(self, checkpoint: Path, mark: str) -> Path:
        """The checkpoint that --resume names, if it can be gone on from."""
        run = Run(checkpoint.parent.parent)
        if not checkpoint.exists() or not run.config.exists():
            raise ValueError(f"--resume {checkpoint} is no checkpoint in a run's folder (version_N/checkpoints/).")
        check_intact(checkpoint, "--resume")
        if run.read().get("fingerprint") != mark and not self.config["fit"]["resume_anyway"]:
            # Not read by the parser, which would import what it names.
            new = yaml.safe_load(self._parser("fit").dump(self._dumpable(), skip_none=False))
            lines = differences(identity(read_config(run.config)), identity(new))
            raise ValueError(
                f"--resume {checkpoint}: the config has changed ({'; '.join(lines)}); "
                "give --resume_anyway true to go on with the new one."
            )
        return checkpoint

    def _refuse_foreign_checkpoint(self) -> None:
        """Under SLURM, Lightning would load what it finds by this name, whatever run it is of."""
        found = sorted(Path(self.trainer.default_root_dir).glob("*hpc_ckpt_*"))
        if found and SLURMEnvironment.detect():
            raise ValueError(
                f"{found[-1]} was saved by Lightning under SLURM, not by a run of this package, and would be loaded "
                "unasked: move it elsewhere."
            )

    def _check_strategy(self, checkpoint: Path) -> None:
        """Any strategy goes on from any checkpoint, but for one that FSDP2 cannot read, or that would run code."""
        if checkpoint.is_dir():
            check_sharded(checkpoint, "--resume")
        if checkpoint.is_file() and isinstance(self.trainer.strategy, ModelParallelStrategy):
            check_shardable(checkpoint, "--resume")

    def _enter(self, run: Run, checkpoint: Path | None, validated: int | None) -> None:
        """Point logger, checkpoints and status at the run's folder."""
        trainer: Any = self.trainer  # whose callbacks Lightning's own annotations do not know
        if self.lock is not None:
            if checkpoint is not None and checkpoint.parent.parent == run.folder:
                for path in run.checkpoints():
                    if step_of(path) > step_of(checkpoint):
                        set_aside(path)
            replace_text(run.config, self._parser("fit").dump(self._dumpable(), skip_none=False))
            self.datamodule.chat.save(run.folder / "tokenizer")
            run.write(status="running")
        # A crash leaves entries past the checkpoint; those steps are about to be logged again.
        purge_step = step_of(checkpoint) if checkpoint else None if validated is None else 0
        root, name = run.folder.parent.parent, run.folder.name
        for logger in self._log_to(TensorBoardLogger(root, name=LOGS, version=name, purge_step=purge_step)):
            logger.log_hyperparams(self.settings)
        for callback in trainer.checkpoint_callbacks:
            callback.dirpath = str((run.folder / "checkpoints").absolute())
            if isinstance(callback, Checkpoint):
                callback.signals, callback.lock, callback.validated = self.signals, self.lock, validated
        trainer.callbacks.append(RunStatus(run, self.lock))
        if checkpoint is not None:
            self.config_init["fit"]["ckpt_path"] = str(checkpoint)
            rank_zero_info(f"Going on in {run.folder} from {checkpoint.name}.")
        else:
            rank_zero_info(f"New run in {run.folder}.")

    def _dumpable(self) -> Any:
        config = self.config["fit"].clone()
        for key in ("config", "resume", "resume_anyway", "ckpt_path", "weights_only"):
            config.pop(key, None)
        return config

    # ------------------------------------------------------------------ validate, test, predict

    def before_validate(self) -> None:
        """Find the checkpoint to score: random weights are never scored."""
        self._find_checkpoint()

    def before_test(self) -> None:
        """As for validate; and write down what is found, of language models with how far it can be trusted."""
        self._find_checkpoint()
        if isinstance(self.model, LanguageModule):
            self.config_init["test"]["verbose"] = False  # one table is enough
            checkpoint = str(self.config_init["test"]["ckpt_path"] or UNTRAINED)
            self._add(EvaluationWriter(self._evaluated_folder, checkpoint))

    def before_predict(self) -> None:
        """As for validate; and write the answers down."""
        if isinstance(self.model, LanguageModule) and not self.model.answers_tests:
            raise ValueError("model.max_new_tokens is 0: predict writes answers, so it must be at least 1.")
        self._find_checkpoint()
        self._add(PredictionWriter(self._evaluated_folder / "predictions.jsonl"))

    @property
    def _evaluated_folder(self) -> Path:
        """The run's; without a run, where runs would lie."""
        return self.run.folder if self.run else self.root

    def _add(self, callback: lightning.Callback) -> None:
        trainer: Any = self.trainer  # whose callbacks Lightning's own annotations do not know
        trainer.callbacks.append(callback)

    def _find_checkpoint(self) -> None:
        self.check()
        command = str(self.subcommand)
        given = self.config[command]["ckpt_path"]
        folder = self.root
        if given == UNTRAINED:
            self.config_init[command]["ckpt_path"] = None
            self._refuse_foreign_checkpoint()
        elif given is None:
            self.run, checkpoint = newest_checkpoint(self.root, fingerprint(self.settings))
            self.config_init[command]["ckpt_path"] = str(checkpoint)
            folder = self.run.folder
        else:
            if self.trainer.is_global_zero and Path(given).is_dir():
                check_intact(Path(given), "--ckpt_path")
            folder = Path(given).parent.parent
            self.run = Run(folder)
        self._log_to(TensorBoardLogger(folder, name="", version=command))

    def _log_to(self, tensorboard: TensorBoardLogger) -> list[Logger]:
        """Log to TensorBoard, whose files `report` reads, and beside it to the config's own loggers, which come back.

        To none where the config says false, and not twice to TensorBoard.
        """
        given = self.config[str(self.subcommand)]["trainer"]["logger"]
        own = [] if given in (None, True) else self.trainer.loggers
        if given is not False and not any(isinstance(logger, TensorBoardLogger) for logger in own):
            self.trainer.loggers = [tensorboard, *own]
        return own


class EvaluationWriter(lightning.Callback):
    """Print what `test` found as one table, and write it to evaluation.json, the answers to test_answers.jsonl.

    Args:
        folder: Where to.
        checkpoint: What was tested.
    """

    def __init__(self, folder: Path, checkpoint: str):
        self.folder = folder
        self.checkpoint = checkpoint

    @rank_zero_only
    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """All numbers, and a line for each answer with its own scores."""
        assert isinstance(pl_module, LanguageModule), "nothing else is evaluated like this"
        found, path = pl_module.evaluation, self.folder / "evaluation.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"checkpoint": self.checkpoint} | found.as_dict()
        replace_text(path, json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
        print(table(found))
        if not found.rows:
            rank_zero_info(f"Wrote {path}; no answers were asked for, or the data has no scenarios.")
            return
        answers = self.folder / "test_answers.jsonl"
        replace_text(answers, json_lines(found.rows))
        rank_zero_info(f"Wrote {path}, and {len(found.rows)} answers with their scores to {answers.name} beside it.")


class PredictionWriter(BasePredictionWriter):
    """Write the answers of all ranks as JSON lines, whole or not at all.

    Args:
        path: Where to.
    """

    def __init__(self, path: Path):
        super().__init__("epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: lightning.Trainer, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        """One line per scenario."""
        rows = of_all_ranks([row for batch in predictions for row in batch])
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json_lines(rows))
            rank_zero_info(f"Wrote {len(rows)} answers to {self.path}.")


def json_lines(rows: Sequence[Row]) -> str:
    """One object a line, Hindi as it is."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def with_newest_run(args: Sequence[str]) -> list[str]:
    """Add the newest run's own config and checkpoint where no config is named."""
    args = list(args)
    if any(arg.split("=")[0] in ("--config", "-c", "--help", "-h") for arg in args):
        return args
    root = next((arg.split("=", 1)[1] for arg in args if arg.startswith("--trainer.default_root_dir=")), ".")
    run, checkpoint = newest_checkpoint(Path(root))
    check_found_config(run.config)
    rank_zero_info(f"Using {checkpoint}.")
    found = ["--config", str(run.config)]
    if not any(arg.split("=")[0] == "--ckpt_path" for arg in args):
        found += ["--ckpt_path", str(checkpoint)]
    return found + args


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def chained(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first exception of a kind among an error and what it came from."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def content_of(data: Any) -> dict[str, str]:
    """A hash of the rows of each split that trains or validates, and of the tokenizer."""
    streamed = getattr(data, "streaming", False)
    splits = {f"data.{name}": getattr(data, name, None) for name in ("train", "validation")}
    content = {
        key: content_fingerprint(find_sources(value, key), streamed and key == "data.train")
        for key, value in splits.items()
        if value
    }
    return content | {"data.tokenizer": tokenizer_fingerprint(data.chat)}


def checkpoint_size(module: LanguageModule, chat: Chat, precision: str) -> int:
    """Bytes of a checkpoint, about: the weights and the optimizer's moments, from the model's config."""
    config = module.model_config.hf_config(module.model_key, chat)
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    by_stage = [stage.scales(list(parameters)) for stage in module.stages]
    trained = sum(p.numel() for name, p in parameters.items() if any(scales[name] for scales in by_stage))
    size = 2 if precision == "bf16-true" else 4
    moments = module.optimizer_config.moment_bytes(size) * trained
    return size * sum(p.numel() for p in parameters.values()) + round(moments)


T = TypeVar("T", bound=TrainingCLI)


def run_training(command: str, args: Sequence[str], cli: type[T]) -> T:
    """Run one of Lightning's commands, or what `cli` makes of it."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    if command != "fit":
        args = with_newest_run(args)
    Parser.given = args
    try:
        return _cli(command, args, cli)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f"{error.filename} cannot be written" if error.filename else "a file cannot be written"
        raise ValueError(
            f"{where}, {error.strerror}: free some room and give the same command again, it goes on from the newest "
            "checkpoint."
        ) from error


def _cli(command: str, args: Sequence[str], cli: type[T]) -> T:
    return cli(
        TrainingModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"formatter_class": HelpFormatter},
        trainer_defaults={"use_distributed_sampler": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=[command, *args],
    )
