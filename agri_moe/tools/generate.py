"""`generate`: answers to scenarios, for reading, or as rows to train on."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from agri_moe.answering import Asked
    from agri_moe.data.chat import Chat
    from agri_moe.expert_use import ExpertUse
    from agri_moe.generation import Generated

Row = dict[str, Any]
COLUMNS = ("system", "scenario", "thought", "advisory", "source")


def generate(
    model: str,
    scenario: str | None = None,
    input: str | None = None,
    output: str | None = None,
    system: str | None = None,
    template: Literal["own", "model"] = "own",
    max_new_tokens: int = 512,
    max_thought_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    as_rows: bool = False,
    min_devanagari: float = 0.0,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    utilisation: str | None = None,
    device: str = "auto",
) -> None:
    """Answer a scenario, or a file of scenarios; with `as_rows`, let a teacher write rows to train on.

    One scenario's answer is printed as it comes. Answers to a file are kept batch by batch in OUTPUT.partial/ until the
    file is complete: killed and started again with the same options, the command goes on where it was.

    Example: python main.py generate --model advisor --input scenarios.parquet --output answers.parquet

    Args:
        model: Exported folder, hub name, or a run's checkpoint (.ckpt).
        scenario: One scenario: text, a struct as JSON such as '{"फसल": "धान", "लक्षण": "पत्तियाँ पीली"}', or a .json file
            with either. Of a struct, each field is a line `key: value`.
        input: Parquet, JSONL or CSV file with a scenario column (text or a struct).
        output: Parquet file for the input's rows, in their order, with generated_thought, generated_advisory, tokens
            (the end of text included), seconds (of the row's batch, divided by its rows) and stop_reason: end,
            length (cut off), or thought_budget (ended, after a thought that had to be closed).
        system: Instruction of the rows that bring none; the chat format's own by default.
        template: `own` asks in our chat format, `model` in the model's own chat template with thoughts in <think>.
        max_new_tokens: Answers are cut off after so many tokens.
        max_thought_tokens: A thought is closed after so many tokens, and the advisory begins; no limit by default.
        temperature: 0 is greedy; otherwise sampling at this temperature.
        top_p: Sample only among the most probable tokens that together have this probability; by default what the
            model's generation_config.json says.
        top_k: Sample only among so many of the most probable tokens, 0 for all; by default likewise, and 50 where that
            file says nothing (transformers' choice).
        seed: Of sampling; with the same batch_size, the same seed gives the same answers.
        batch_size: Scenarios that run together.
        as_rows: Write rows to train on (system, scenario, thought, advisory, source) instead: sequence-level
            distillation (Kim & Rush 2016). Rows that do not pass the filters go to OUTPUT.rejected.parquet with the
            reason: not ended, a thought cut short, no thought, no advisory, a line again and again, or one of the next
            three.
        min_devanagari: With as_rows, least share of an advisory's letters that are Devanagari; 0 takes any.
        min_tokens: With as_rows, fewest tokens of an advisory.
        max_tokens: With as_rows, most tokens of an advisory; no limit by default.
        utilisation: Tell which experts served prompts and answers, as a table and in this .npz file: `load` [2, layers,
            experts] (assignments; first the prompts, then the answers), `entropy`, `balance` and `dead` [2, layers],
            `tokens` [2], `layers`. The answers are the same without.
        device: cpu, cuda, or auto.
    """
    filters = Filters(min_devanagari, min_tokens, max_tokens)
    check(model, scenario, input, output, template, batch_size, as_rows, filters)
    check_utilisation(utilisation)
    rows: list[Row] = (
        [{"scenario": read_scenario(scenario or "")}] if input is None else read(input, unanswered=as_rows)
    )

    from agri_moe.answering import Asked, Parts, answer_rows
    from agri_moe.generation import Decoding

    decoding = Decoding(max_new_tokens, max_thought_tokens, temperature, top_p, top_k, seed)
    systems = [row.get("system") or system for row in rows]
    asked = Asked(model, rows, systems, template, decoding, batch_size, device, utilisation is not None)
    if output is None:
        tell(print_answer(asked), utilisation)
        return
    with Parts.of(asked, partial_folder(output)) as parts:
        results, chat, use = answer_rows(asked, parts)
        if as_rows:
            made = training_rows(rows, asked.systems, results, chat, f"generated by {model}")
            reasons = [filters.reason(result, len(chat.encode_text(result.advisory))) for result in results]
            print(write_rows(output, made, reasons))
        else:
            write(output, [row | result.columns() for row, result in zip(rows, results, strict=True)])
            ended = sum(result.stop_reason != "length" for result in results)
            print(f"Wrote {len(rows)} answers to {output}; {ended} ended by themselves.")
        tell(use, utilisation)


@dataclass(frozen=True)
class Filters:
    """Which answers are fit to train on; see `generate` for the three numbers."""

    min_devanagari: float = 0.0
    min_tokens: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_devanagari <= 1:
            raise ValueError(f"--min_devanagari is {self.min_devanagari:g}: a share lies between 0 and 1.")
        if self.min_tokens < 0:
            raise ValueError(f"--min_tokens is {self.min_tokens}: it must be at least 0.")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            raise ValueError(f"--max_tokens is {self.max_tokens}: it must be at least 1, and at least --min_tokens.")

    def reason(self, answer: "Generated", tokens: int) -> str:
        """Why an answer whose advisory has so many tokens is not used; empty if it is."""
        checks = {
            "not ended by itself": answer.stop_reason == "length",
            "thought cut short": answer.stop_reason == "thought_budget",
            "no thought": not (answer.thought or "").strip(),
            "no advisory": not answer.advisory.strip(),
            "a line again and again": loops(answer.thought or "") or loops(answer.advisory),
            "too little Devanagari": devanagari_share(answer.advisory) < self.min_devanagari,
            "advisory too short": tokens < self.min_tokens,
            "advisory too long": self.max_tokens is not None and tokens > self.max_tokens,
        }
        return next((reason for reason, found in checks.items() if found), "")


def devanagari_share(text: str) -> float:
    """Share of the letters that are Devanagari; vowel signs count as no letters, and no letters are a share of 0."""
    letters = [character for character in text if character.isalpha()]
    return sum("\u0900" <= character <= "\u097f" for character in letters) / max(len(letters), 1)


def loops(text: str) -> bool:
    """Whether a line or sentence of at least ten characters comes up four times: a model that goes in circles."""
    pieces = (piece.strip() for piece in re.split(r"\n|।|[.!?]\s", text))
    return max(Counter(piece for piece in pieces if len(piece) >= 10).values(), default=0) >= 4


def check(
    model: str,
    scenario: str | None,
    input: str | None,
    output: str | None,
    template: str,
    batch_size: int,
    as_rows: bool,
    filters: Filters,
) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    if (scenario is None) == (input is None):
        raise ValueError("give either --scenario TEXT or --input FILE with --output FILE.")
    if input is not None and output is None:
        raise ValueError("--input needs --output FILE for the answers.")
    if scenario is not None and output is not None:
        raise ValueError("--output takes the answers to --input FILE; that to --scenario is printed.")
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}: it must be at least 1.")
    if template == "model" and Path(model).suffix == ".ckpt":
        raise ValueError(f"--template model: {model} is a run's checkpoint, trained on our format; use --template own.")
    if as_rows and input is None:
        raise ValueError("--as_rows needs --input FILE with the scenarios and --output FILE for the rows.")
    if not as_rows and filters != Filters():
        raise ValueError("--min_devanagari, --min_tokens and --max_tokens choose rows to train on: add --as_rows true.")
    if output is None:
        return
    begun = partial_folder(output).is_dir()  # then rejected rows are those of a run that was killed while it ended
    for path in (Path(output), *([rejected_file(output)] if as_rows and not begun else [])):
        if path.exists():
            raise ValueError(f"--output {path} exists; name another file, or move it away.")


def check_utilisation(path: str | None) -> None:
    """Refuse a file that cannot take the numbers, before anything is loaded."""
    if path is None:
        return
    if Path(path).suffix != ".npz":
        raise ValueError(f"--utilisation {path}: name a file that ends in .npz.")
    if Path(path).exists():
        raise ValueError(f"--utilisation {path} exists; name another file, or move it away.")


def tell(use: "ExpertUse | None", path: str | None) -> None:
    """Print which experts served, and write it down, where that was asked."""
    if use is not None and path is not None:
        use.save(Path(path))
        print(f"\n{use.table()}\nWrote {path}.")


def read_scenario(text: str) -> str | Row:
    """A scenario from the command line: text, or a struct as JSON, or a .json file with either.

    Raises:
        ValueError: If it is neither, or empty.
    """
    from agri_moe.data.chat import render_scenario

    value: Any = text
    name = "--scenario"
    try:
        if text.endswith(".json") and "\n" not in text:
            name = f"--scenario {text}"
            value = json.loads(Path(text).expanduser().read_text("utf-8"))
        elif text.lstrip().startswith("{"):
            value = json.loads(text)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); name a JSON file, or give the text.") from error
    except ValueError as error:
        raise ValueError(f'{name} is not valid JSON ({error}); give a struct such as {{"crop": "..."}}.') from error
    if not isinstance(value, str | Mapping):
        raise ValueError(f'{name} is a {type(value).__name__}; give text or a struct such as {{"crop": "..."}}.')
    try:
        render_scenario(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error
    return value if isinstance(value, str) else dict(value)


def read(path: str, unanswered: bool = False) -> list[Row]:
    """The rows of a file, each with a scenario.

    Args:
        path: Parquet, JSONL or CSV file, or a hub dataset.
        unanswered: Whether rows that already have a thought or an advisory are refused: they would be overwritten.

    Raises:
        ValueError: If the file cannot be read, a row has no scenario, or is answered already.
    """
    from agri_moe.data.chat import render_scenario, usable_text
    from agri_moe.data.sources import find_sources, read_rows

    rows = []
    for source in find_sources(path, "--input"):
        for raw in read_rows(source):
            try:
                if raw.reason:
                    raise ValueError(raw.reason)
                render_scenario(raw.values.get("scenario"))
                usable_text("system", raw.values.get("system"))
                for name in ("thought", "advisory") if unanswered else ():
                    if str(raw.values.get(name) or "").strip():
                        raise ValueError(f"--as_rows would overwrite the {name} that is there; leave the row out")
            except ValueError as error:
                raise ValueError(f"--input {source.name} row {raw.number}: {error}.") from error
            rows.append(raw.values)
    return rows


def print_answer(asked: "Asked") -> "ExpertUse | None":
    """Have the model answer the one scenario, and print the answer as it comes; which experts served, where asked."""
    from concurrent.futures import ThreadPoolExecutor

    from agri_moe.answering import load
    from agri_moe.expert_use import expert_use
    from agri_moe.generation import stream

    network, _, frame = load(asked.model, asked.template, asked.device, asked.utilisation)
    (prompt,) = asked.prompts(frame)
    written: list[Sequence[int]] = []
    with ThreadPoolExecutor(max_workers=1) as worker:
        told = stream(
            network, frame, prompt, worker=worker, watch=lambda _, ids: written.extend(ids), **asdict(asked.decoding)
        )
        last = show(told)
    if last.stop_reason == "length":
        print(f"(cut off after {last.tokens} tokens; raise --max_new_tokens)")
    return expert_use(network, [prompt], written) if asked.utilisation else None


def show(answers: "Iterable[Generated]") -> "Generated":
    """Print an answer as it grows, thought first; returns the whole."""
    printed = ""
    for answer in answers:
        parts = [("विचार", answer.thought or ""), ("सलाह", answer.advisory)]
        text = "\n\n".join(f"{title}: {part}" for title, part in parts if part or answer.stop_reason)
        text = text.replace("\x1b", "␛")  # shown, not obeyed
        # What is printed cannot be taken back: a template's tags that are several tokens look like text at first.
        if text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print("" if text == printed else f"\n\n{text}")
    return answer


def training_rows(
    rows: Sequence[Row], systems: Sequence[str | None], results: "Sequence[Generated]", chat: "Chat", source: str
) -> list[Row]:
    """What was asked and answered, in the columns that `ChatDataModule` reads, with where it came from."""
    from agri_moe.data.chat import render_scenario, usable_text

    return [
        {
            "system": usable_text("system", system) or chat.format.default_system,
            "scenario": render_scenario(row["scenario"]),
            "thought": result.thought,
            "advisory": result.advisory,
            "source": source,
        }
        for row, system, result in zip(rows, systems, results, strict=True)
    ]


def partial_folder(output: str) -> Path:
    """Where answers are until `output` is complete."""
    return Path(output).with_name(Path(output).name + ".partial")


def rejected_file(output: str) -> Path:
    """Where the rows go that the filters take out of `output`."""
    return Path(output).with_suffix(".rejected.parquet")


def write_rows(output: str, rows: Sequence[Row], reasons: Sequence[str]) -> str:
    """Write rows without a reason against them to `output`, the others beside it; returns what was done."""
    rejected = [row | {"reason": reason} for row, reason in zip(rows, reasons, strict=True) if reason]
    if rejected:
        write(str(rejected_file(output)), rejected, (*COLUMNS, "reason"))
    write(output, [row for row, reason in zip(rows, reasons, strict=True) if not reason], COLUMNS)
    told = f"Wrote {len(rows) - len(rejected)} of {len(rows)} rows to {output}"
    if not rejected:
        return f"{told}."
    counts = ", ".join(f"{count} x {reason}" for reason, count in Counter(filter(None, reasons)).most_common())
    return f"{told}; {len(rejected)} rejected ({counts}) in {rejected_file(output)}."


def write(path: str, rows: Sequence[Row], texts: Sequence[str] | None = None) -> None:
    """Rows as Parquet, whole or not at all; `texts` names the columns, all of text, where there may be no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = None if texts is None else pa.schema([(name, pa.string()) for name in texts])
    unfinished = Path(path).with_name(f".{Path(path).name}.unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), unfinished)
    unfinished.replace(path)
