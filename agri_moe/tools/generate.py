"""`generate`: answers to scenarios."""

from typing import Any


def generate(
    model: str,
    scenario: str | None = None,
    input: str | None = None,
    output: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Answer a scenario, or a file of scenarios.

    Example: python main.py generate --model advisor --input scenarios.parquet --output answers.parquet

    Args:
        model: Exported folder, hub name, or a run's checkpoint (.ckpt).
        scenario: One scenario; the answer is printed.
        input: Parquet, JSONL or CSV file with a scenario column (text or a struct).
        output: Parquet file for the input's rows with generated_thought, generated_advisory, tokens and stop_reason.
        system: Instruction; the chat format's own by default.
        max_new_tokens: Answers are cut off after so many tokens.
        temperature: 0 is greedy; otherwise sampling at this temperature.
        batch_size: Scenarios that run together.
        device: cpu, cuda, or auto.
    """
    from pathlib import Path

    if (scenario is None) == (input is None):
        raise ValueError("give either --scenario TEXT or --input FILE with --output FILE.")
    if input is not None and output is None:
        raise ValueError("--input needs --output FILE for the answers.")
    if output is not None and Path(output).exists():
        raise ValueError(f"--output {output} exists; name another file, or move it away.")
    rows: list[dict[str, Any]] = [{"scenario": scenario}] if input is None else read(input)

    import torch
    from tqdm import tqdm

    from agri_moe.generation import generate as answer
    from agri_moe.trained import load_trained

    network, chat = load_trained(model, "--model")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = [chat.encode_prompt(row["scenario"], row.get("system") or system) for row in rows]
    answers = answer(
        network.to(device),
        chat,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
    )
    if output is None:
        result = next(iter(answers))
        print(f"विचार: {result.thought}\n\nसलाह: {result.advisory}")
        if result.stop_reason == "length":
            print(f"(cut off after {result.tokens} tokens; raise --max_new_tokens)")
        return
    results = list(tqdm(answers, total=len(rows), desc="answers", unit="row"))
    write(output, rows, results)
    ended = sum(result.stop_reason == "end" for result in results)
    print(f"Wrote {len(rows)} answers to {output}; {ended} ended by themselves.")


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a file, each with a scenario.

    Raises:
        ValueError: If the file cannot be read, or a row has no scenario.
    """
    from agri_moe.data.chat import render_scenario
    from agri_moe.data.sources import find_sources, read_rows

    rows = []
    for source in find_sources(path, "--input"):
        for raw in read_rows(source):
            try:
                if raw.reason:
                    raise ValueError(raw.reason)
                render_scenario(raw.values.get("scenario"))
            except ValueError as error:
                raise ValueError(f"--input {source.name} row {raw.number}: {error}.") from error
            rows.append(raw.values)
    return rows


def write(path: str, rows: list[dict[str, Any]], results: list[Any]) -> None:
    """The rows with their answers as Parquet, whole or not at all."""
    from pathlib import Path

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([row | result.columns() for row, result in zip(rows, results, strict=True)])
    partial = Path(path).with_name(Path(path).name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, partial)
    partial.replace(path)
