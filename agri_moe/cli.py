"""The command line: Lightning's fit, validate, test and predict, and one function per tool.

Nothing heavy is imported at the top: `--help` answers at once, and a tool imports what it needs when it is called.
"""

import importlib
import inspect
import re
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

if TYPE_CHECKING:
    from agri_moe.training_cli import TrainingCLI

# Command -> (purpose, example). Training commands are Lightning's.
TRAINING = {
    "fit": ("train; goes on by itself where a run was cut off", "fit --config configs/distill.yaml"),
    "validate": ("score the newest run's newest checkpoint on its validation rows", "validate"),
    "test": ("score it on its test rows, and what it answers to their scenarios", "test"),
    "predict": ("answer the test scenarios, into the run's predictions.jsonl", "predict"),
}
# Command -> (module:function, purpose, example).
TOOLS = {
    "tokens": (
        "agri_moe.tools.tokens:tokens",
        "give a tokenizer new pieces for a language, as merges of those that it has",
        "tokens --source Qwen/Qwen3-0.6B --input rows.parquet --pieces 263 --output hindi_tokens",
    ),
    "upcycle": (
        "agri_moe.tools.upcycle:upcycle",
        "make a dense checkpoint a sparse Mixture-of-Experts",
        "upcycle --source Qwen/Qwen3-0.6B --output student",
    ),
    "audit": (
        "agri_moe.tools.audit:audit",
        "check an upcycled checkpoint: shapes, symmetry, function kept",
        "audit --student student",
    ),
    "preview": (
        "agri_moe.tools.preview:preview",
        "look at rows as the model will see them, and at what is wrong with them",
        "preview --config configs/distill.yaml",
    ),
    "cache": (
        "agri_moe.tools.cache:cache",
        "write a teacher's answers to disk, for training without it",
        "cache --config configs/distill_cached.yaml --output teacher_cache",
    ),
    "compress": (
        "agri_moe.tools.compress:compress",
        "give the experts of a Mixture-of-Experts one FFN in common, with small changes for each",
        "compress --source Qwen/Qwen3-30B-A3B --output compressed --rank 128",
    ),
    "plan": (
        "agri_moe.tools.plan:plan",
        "tell what a config will cost in memory, time and disk, before it runs",
        "plan --config configs/distill.yaml",
    ),
    "similarity": (
        "agri_moe.tools.similarity:similarity",
        "compare two checkpoints layer by layer, and the experts of one, with CKA",
        "similarity --source student --target teacher --data rows.parquet --output similarity",
    ),
    "report": (
        "agri_moe.tools.report:report",
        "write a page with pictures about a run, or a comparison of several",
        "report --run lightning_logs/version_0",
    ),
    "export": (
        "agri_moe.tools.export:export",
        "write a checkpoint as a Hugging Face folder, round trip proven",
        "export --output advisor",
    ),
    "generate": (
        "agri_moe.tools.generate:generate",
        "answer a scenario, or a file of scenarios; or write rows to train on",
        'generate --model advisor --scenario "फसल: गेहूँ, लक्षण: पत्तियाँ पीली"',
    ),
    "chat": (
        "agri_moe.tools.chat:chat",
        "open a page in the browser that answers scenarios, in Hindi",
        "chat --model advisor",
    ),
    "corpus": (
        "agri_moe.tools.corpus:corpus",
        "write the embedded Hindi crop-advisory rows (demonstration data)",
        "corpus --output corpus",
    ),
    "select": (
        "agri_moe.tools.select:select",
        "choose rows under a budget, by the entropy of their tokens, without repeats and noise",
        "select --input corpus/train.parquet --output selected.parquet --budget 10% --tokenizer corpus/tokenizer",
    ),
}


def overview() -> str:
    """What `--help` prints."""
    commands = TRAINING | {name: (purpose, example) for name, (_, purpose, example) in TOOLS.items()}
    lines = ["usage: python main.py COMMAND [options]      python main.py COMMAND --help", ""]
    for name, (purpose, example) in commands.items():
        lines += [f"  {name:<10} {purpose}", f"             python main.py {example}"]
    return "\n".join(lines)


def example_of(command: str) -> str:
    """The line below a command's `--help`; it works as printed where what it names is there (a test runs them all)."""
    return f"example: python main.py {(TRAINING[command] if command in TRAINING else TOOLS[command])[-1]}"


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the example on its one line, to be copied."""


class ToolParser(ArgumentParser):
    """Says what is wrong in one sentence instead of jsonargparse's whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence and exit with status 2."""
        fail(one_sentence(message, ex, sys.argv))


def fail(message: str) -> NoReturn:
    """Tell the user what to mend; exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_sentence(message: str, error: BaseException | None, args: Sequence[str] = ()) -> str:
    """What is wrong, out of jsonargparse's many lines.

    Args:
        message: Its own report, a tree of what each type of a union had to say.
        error: The exception behind it, if any.
        args: The command line, to give a key the way the user wrote it.
    """
    if (cause := our_cause(error)) is not None:
        return str(cause)
    message = re.sub(r"(key \"[^\"]+\":) (?=\S)", r"\1\n", message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    keys = [match[1] for line in lines if (match := re.search(r"key \"([^\"]+)\"", line))]
    telling = [line for line in lines if line and not line.startswith(UNTELLING)][:3]
    if not keys:
        return ", or ".join(dict.fromkeys(telling)) or message
    key = next((arg.split("=")[0] for arg in args if keys[-1] in arg.split("=")[0]), keys[-1])
    value = next((line for line in lines if line.startswith("Given value: ")), "")
    return f"{key}: {', or '.join(dict.fromkeys(telling)) or 'this value does not fit'}. {value}".strip()


# Lines of jsonargparse's reports that say nothing to the person who wrote the config.
UNTELLING = (
    *("Parser key", "Problem with", "Given value", "Subtypes:", "Errors:", "Does not validate against"),
    *("Expected a path but", "Expected a dot import path", "Expected a <class 'NoneType'>"),
)


def our_cause(error: BaseException | None) -> ValueError | None:
    """The ValueError of this package at the bottom of an exception's chain; None if there is none."""
    found = None
    while error is not None:
        if isinstance(error, ValueError) and _ours(error):
            found = error
        error = error.__cause__ or error.__context__
    return found


def _ours(error: BaseException) -> bool:
    """Whether this package raised the error: then its text is meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def run_tool(name: str, args: Sequence[str]) -> None:
    """Parse a tool's arguments from its function's signature and call it.

    A function with `*arguments` is given there what is none of its options, for another parser to read. An option that
    takes a list may be given more than once.
    """
    target, purpose, _ = TOOLS[name]
    module, function_name = target.split(":")
    function = getattr(importlib.import_module(module), function_name)
    parser = ToolParser(
        prog=f"main.py {name}",
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=example_of(name),
        formatter_class=HelpFormatter,
    )
    parser.add_function_arguments(function)
    parameters = inspect.signature(function).parameters.values()
    rest: list[str] = []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        args, rest = _split(args, {f"--{parameter.name}" for parameter in parameters} | {"-h", "--help"})
    lists = {f"--{parameter.name}" for parameter in parameters if str(parameter.annotation).startswith("list[")}
    args = [_appended(arg) if arg.split("=")[0] in lists else arg for arg in args]
    function(*rest, **parser.parse_args(list(args)).as_dict())


def _appended(option: str) -> str:
    """An option in jsonargparse's form for one more element of a list."""
    name, *value = option.split("=", 1)
    return "=".join([f"{name}+", *value])


def _split(args: Sequence[str], options: set[str]) -> tuple[list[str], list[str]]:
    """These options with their values, and all other arguments."""
    own: list[str] = []
    rest: list[str] = []
    side = rest
    for arg in args:
        if arg.startswith("-"):
            side = own if arg.split("=")[0] in options else rest
        side.append(arg)
    return own, rest


def main(args: Sequence[str] | None = None) -> "TrainingCLI | None":
    """Run one command.

    Args:
        args: Command line without the program's name; `sys.argv` by default.

    Returns:
        For the training commands, the CLI object with its `trainer`, for callers from Python.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return None
    command, *rest = args
    if command not in TOOLS and command not in TRAINING:
        fail(f"{command} is no command; there are {', '.join([*TRAINING, *TOOLS])}.")
    try:
        if command in TOOLS:
            run_tool(command, rest)
            return None
        from agri_moe.training_cli import TrainingCLI, run_training

        return run_training(command, rest, TrainingCLI)
    except (ValueError, TypeError) as error:  # jsonargparse wraps a ValueError of ours in either
        if (cause := our_cause(error)) is None:
            raise
        fail(str(cause))
