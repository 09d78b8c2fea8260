"""`preview`: rows as the model will see them, what they hold in numbers, and what is wrong with them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agri_moe.data.chat_data import ChatDataModule
    from agri_moe.data.rows import Loaded
    from agri_moe.data.teacher_view import TeacherView

# The annotations below are quoted, not postponed: the command line's parser would import what they name for `--help`.
_LISTED = 1000  # rejected rows that are printed; the rest is counted


def preview(
    config: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    columns: dict[str, str] | None = None,
    max_length: int = 2048,
    rows: int = 3,
    color: bool = True,
    validation: str | None = None,
) -> None:
    """Show rows as the model will see them, their numbers, and every row that cannot be used.

    Example: `python main.py preview --data rows.parquet --tokenizer DIR`

    Args:
        config: An experiment's YAML file: its data section says what to look at.
        data: Without a config: a file, folder, glob or hub dataset with chat rows.
        tokenizer: Without a config: folder or hub name of the tokenizer.
        columns: Our column -> the one in the files, e.g. {"advisory": "answer"}.
        max_length: Rows of more tokens than this are rejected.
        rows: How many rows to print in full.
        color: Whether to colour them by segment.
        validation: Validation rows, to look for rows that stand in both.
    """
    from agri_moe.data.chat_data import ChatDataModule

    given = {"train": data, "tokenizer": tokenizer, "columns": columns, "validation": validation}
    options: dict[str, Any] = {"max_length": max_length} | {k: v for k, v in given.items() if v is not None}
    if config is not None:
        options = _data_section(config) | {k: v for k, v in given.items() if v is not None}
    if not options.get("train") or not options.get("tokenizer"):
        raise ValueError("preview needs --config FILE, or --data FILE and --tokenizer DIR.")
    module = ChatDataModule(**options)
    module.check()
    view = None if config is None else _teacher_view(config)
    module.teacher_view = None if view is None else view.of(module.chat)
    train = module.read("train")
    _print_legend(color)
    _print_rows(module, train, rows, color)
    held_out = None if module.validation is None else module.read("validation")
    _print_rejected("train", train)
    if held_out is not None:
        _print_rejected("validation", held_out)
    _print_numbers(module, train)
    _print_repeated(train)
    _print_shared(module, train, held_out)


def _section(path: str, name: str) -> Any:
    """A section of a config; None if there is none."""
    from pathlib import Path

    import yaml

    if not Path(path).is_file():
        raise ValueError(f"config {path} does not exist.")
    try:
        return (yaml.safe_load(Path(path).read_text("utf-8")) or {}).get(name)
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"config {path} is no YAML mapping: {str(error).splitlines()[0]}.") from error


def _teacher_view(path: str) -> "TeacherView | None":
    """How the teacher of a config reads the rows; None if there is no teacher, or only what a cache has of it."""
    from agri_moe.data.teacher_view import TeacherView

    section = _section(path, "model")
    arguments = section.get("init_args", section) if isinstance(section, dict) else {}
    teacher = (arguments or {}).get("teacher")
    if not isinstance(teacher, dict):
        return None
    given = {"view": "same"} | {k: v for k, v in teacher.items() if k in ("source", "view", "min_aligned") and v}
    if "source" not in given:
        if given["view"] == "same":
            return None
        raise ValueError(f"config {path}: model.teacher.view {given['view']} needs model.teacher.source.")
    view = TeacherView(**given)
    view.check()
    return view


def _data_section(path: str) -> dict[str, Any]:
    """The arguments of ChatDataModule in a config, whether its data section names the class or not."""
    from jsonargparse import ArgumentParser

    from agri_moe.data.chat_data import ChatDataModule

    section = _section(path, "data")
    if not isinstance(section, dict):
        raise ValueError(f"config {path} has no data section: preview reads data.train and data.tokenizer from it.")
    named = str(section.get("class_path", "ChatDataModule"))
    if not named.endswith("ChatDataModule"):
        raise ValueError(f"config {path}: preview looks at chat rows (ChatDataModule), not at those of {named}.")
    arguments = section.get("init_args") or {} if "class_path" in section else section
    parser = ArgumentParser(exit_on_error=False)  # the types of the config are checked as `fit` checks them
    parser.add_class_arguments(ChatDataModule, "data")
    try:
        parsed = parser.instantiate_classes(parser.parse_object({"data": arguments})).data
    except Exception as error:  # jsonargparse's own class is private to some of its versions
        raise ValueError(f"config {path}: {str(error).strip().splitlines()[0]}") from error
    return {name: getattr(parsed, name) for name in arguments}


def _print_legend(color: bool) -> None:
    from agri_moe.data.chat import Segment, paint

    names = [segment for segment in Segment if segment != Segment.PAD]
    print("segments: " + "  ".join(paint(s.name, s, False) if color else s.name for s in names) + "\n")


def _print_rows(module: "ChatDataModule", loaded: "Loaded", rows: int, color: bool) -> None:
    from agri_moe.data.chat import Segment

    for i in range(min(rows, len(loaded.rows))):
        row = loaded.rows.table[i]
        prompt = sum(segment <= Segment.USER for segment in row["segment_ids"])
        print(f"--- row {i}: {row['length']} tokens, {row['length'] - prompt} supervised")
        ids, segments = row["input_ids"], row["segment_ids"]
        print(module.chat.colored(ids, segments) if color else module.chat.tokenizer.decode(ids), end="\n\n")
        if module.teacher_view is not None:
            _print_teacher(module, row, color)


def _print_teacher(module: "ChatDataModule", row: dict[str, Any], color: bool) -> None:
    """A row as the teacher reads it: what has the student's colours aligns, what is grey does not."""
    from agri_moe.data.chat import Segment

    assert module.teacher_view is not None
    ids = row["teacher_ids"]
    segments = [int(Segment.PAD)] * len(ids)
    for token, segment in zip(row["teacher_tokens"], row["segment_ids"], strict=True):
        if token >= 0:
            segments[token] = segment
    share = row["aligned"] / row["answer"]
    print(f"teacher, {module.teacher_view.view}: {len(ids)} tokens, {share:.1%} of the answer aligns")
    print(module.chat.colored(ids, segments) if color else module.chat.tokenizer.decode(ids), end="\n\n")


def _print_numbers(module: "ChatDataModule", loaded: "Loaded") -> None:
    import numpy as np

    from agri_moe.data.chat import Segment
    from agri_moe.data.packing import pack

    lengths = loaded.rows.lengths
    print(f"rows: {loaded.total:,} read, {len(lengths):,} usable, {len(loaded.rejected):,} rejected")
    if not len(lengths):
        return
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
    print(f"tokens a row: p50 {p50:,.0f}, p90 {p90:,.0f}, p99 {p99:,.0f}, max {lengths.max():,}")
    words, tokens = _words_and_tokens(module, loaded)
    print(f"tokens a word: {tokens / max(words, 1):.2f} (scenario, thought and advisory)")
    targets = loaded.rows.counts[:, 0].sum(0)
    supervised = int(targets[Segment.THOUGHT] + targets[Segment.ASSISTANT])
    total = int(lengths.sum())
    thought, advisory = targets[Segment.THOUGHT] / total, targets[Segment.ASSISTANT] / total
    print(
        f"supervised tokens: {supervised:,} of {total:,}, {supervised / total:.1%} "
        f"(thought {thought:.1%}, advisory {advisory:.1%})"
    )
    if loaded.rows.aligned is not None:
        aligned, answer = loaded.rows.aligned.sum(0)
        print(f"teacher's view: {aligned / answer:.1%} of the answers' tokens align")
    sequences = pack(lengths, module.max_length, module.seed)
    fill = lengths.sum() / (len(sequences) * module.max_length)
    print(f"packing: {len(sequences):,} sequences of {module.max_length:,} tokens, {fill:.1%} full")


def _words_and_tokens(module: "ChatDataModule", loaded: "Loaded", sample: int = 1000) -> tuple[int, int]:
    """Words and tokens of the rows' own texts, evenly sampled; the frame of a row would hide them."""
    step = -(-len(loaded.rows) // sample)
    words = tokens = 0
    for row in loaded.rows.table.select(range(0, len(loaded.rows), step)):
        for name in ("scenario", "thought", "advisory"):
            text = row[name] or ""
            words += len(text.split())
            tokens += len(module.chat.encode_text(text))
    return words, tokens


def _texts(loaded: "Loaded") -> list[tuple[str, str]]:
    """Scenario and advisory of each usable row."""
    columns = loaded.rows.table.with_format("arrow")[:]
    return list(zip(columns["scenario"].to_pylist(), columns["advisory"].to_pylist(), strict=True))


def _print_repeated(loaded: "Loaded") -> None:
    from collections import Counter

    counts = Counter(_texts(loaded))
    print(f"repeated rows: {sum(n - 1 for n in counts.values()):,} (scenario and advisory as in an earlier row)")
    for (scenario, _), n in counts.most_common(3):
        if n > 1:
            print(f"  {n} x {_short(scenario)}")


def _print_shared(module: "ChatDataModule", train: "Loaded", held_out: "Loaded | None") -> None:
    """What training and validation share: whole rows, and scenarios, which are what a model is asked."""
    if held_out is None:
        share = module.validation_share
        print(f"validation: {share:.1%} of the scenarios of train are held out; none stands in both")
        return
    ours, theirs = set(_texts(train)), set(_texts(held_out))
    scenarios = {scenario for scenario, _ in ours} & {scenario for scenario, _ in theirs}
    read, usable, rejected = held_out.total, len(held_out.rows), len(held_out.rejected)
    print(f"validation: {read:,} read, {usable:,} usable, {rejected:,} rejected")
    print(f"shared by train and validation: {len(ours & theirs):,} rows, {len(scenarios):,} scenarios")
    for scenario in sorted(scenarios)[:3]:
        print(f"  {_short(scenario)}")


def _print_rejected(split: str, loaded: "Loaded") -> None:
    from collections import Counter

    if not loaded.rejected:
        print(f"rejected in {split}: none")
        return
    print(f"rejected in {split}: {len(loaded.rejected):,}; rows count from 0 within their file")
    for row in loaded.rejected[:_LISTED]:
        print(f"  {row}")
    if len(loaded.rejected) > _LISTED:
        rest = Counter(row.file for row in loaded.rejected[_LISTED:])
        print("  ... and " + ", ".join(f"{n:,} more in {file}" for file, n in rest.items()))


def _short(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
