"""`select`: the rows worth training on, under a budget."""

from typing import Literal


def select(
    input: list[str],
    output: str,
    budget: str,
    tokenizer: str | None = None,
    group_by: str | None = None,
    budget_in: Literal["rows", "tokens"] = "rows",
    allocation: Literal["proportional", "sqrt", "equal"] = "proportional",
    within: Literal["highest", "strata"] = "highest",
    score: Literal["unigram", "bigram", "model_entropy", "model_loss"] = "unigram",
    model: str | None = None,
    damp: bool = True,
    near_duplicates: float = 0.8,
    columns: dict[str, str] | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    num_proc: int = 1,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    report: str | None = None,
    overwrite: bool = False,
) -> None:
    """Choose rows under a budget by the entropy of their tokens, group by group, without repeats and noise.

    Writes a Parquet file with all columns and selection_score, selection_tokens and selection_group, by group and the
    highest score first, and a page with what was chosen and why. The result is the same for any order of files and rows
    and any number of processes.

    Example: python main.py select --input rows.parquet --output selected.parquet --budget 10% --tokenizer DIR

    Args:
        input: Rows as data.train takes them: file, folder, glob, URL or hub dataset; may be given more than once.
        output: Parquet file to write.
        budget: Rows (or tokens) to choose, or a share such as 10%.
        tokenizer: Folder or hub name of the tokenizer; that of --model by default.
        group_by: Columns, or struct.field such as scenario.crop, separated by commas.
        budget_in: What the budget counts; tokens are those of the text, without markers and instruction.
        allocation: What a group gets goes with its size, the square root of that, or is the same for all.
        within: In a group the highest scores first; or some of ten strata by score, more of the higher ones.
        score: Entropy of a row's tokens, or of its pairs of tokens, or the mean entropy or loss of --model on it.
        model: Exported folder, checkpoint or hub name, for model_entropy and model_loss.
        damp: Repetition within a row takes from its score, and rows of noise are left out.
        near_duplicates: Rows this much alike, 0.7 to 1, count as one; 1: exact repeats only; 0: all may stay.
        columns: Our column -> the one in the files, e.g. {"advisory": "answer"} or {"text": "body"}.
        bad_rows: error stops at a row that cannot be used; skip leaves such rows out, counted and listed.
        num_proc: Processes that read and score.
        seed: Of the hash that settles ties.
        device: Where --model runs; auto takes a GPU if there is one.
        report: Folder of the page; beside the output by default.
        overwrite: Replace an output that is there.
    """
    from pathlib import Path

    from agri_moe.data.selection import Rule
    from agri_moe.data.selection_passes import Selection, check_output, parse_budget, select_rows

    number, share = parse_budget(budget, budget_in)
    if near_duplicates and not 0.7 <= near_duplicates <= 1:
        raise ValueError(f"--near_duplicates is {near_duplicates:g}: it must be 0, or at least 0.7 and at most 1.")
    if num_proc < 1:
        raise ValueError(f"--num_proc is {num_proc}: it must be at least 1.")
    if seed < 0:
        raise ValueError(f"--seed is {seed}: it must be at least 0.")
    if score.startswith("model") != (model is not None):
        raise ValueError(f"--score {score} and --model do not go together: model_entropy and model_loss need a model.")
    if model is None and tokenizer is None:
        raise ValueError("--tokenizer is not set: name a folder or a hub name, for entropy is counted in its tokens.")
    if model is not None and tokenizer is not None:
        raise ValueError(f"--tokenizer {tokenizer} is not used with --model, which brings its own: leave it out.")
    check_output(input, Path(output), overwrite)
    selection = Selection(
        input=input,
        output=output,
        work=str(Path(output).absolute().parent),
        rule=Rule(number, share, budget_in, allocation, within, near_duplicates, damp),
        columns=columns or {},
        group_by=tuple(name.strip() for name in (group_by or "").split(",") if name.strip()),
        tokenizer=tokenizer,
        score_by=score,
        model=model,
        device=device,
        bad_rows=bad_rows,
        seed=seed,
    )
    selection.check()
    Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
    found = select_rows(selection, num_proc)

    from agri_moe.data.selection_page import said, selection_page

    target = Path(report) if report is not None else Path(output).with_name(f"{Path(output).stem}_report")
    page = selection_page(found, selection, target)
    for sentence in said(found, selection.rule):
        print(sentence)
    print(f"Wrote {output}. Report: {page}")
