"""`compress`: a Mixture-of-Experts becomes one whose experts share a core."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from agri_moe.models.compress import LayerReport


def compress(
    source: str,
    rank: int,
    output: str | None = None,
    calibration: str | list[str] | None = None,
    columns: dict[str, str] | None = None,
    calibration_tokens: int = 32768,
    max_length: int = 2048,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
) -> None:
    """Give the experts of each layer one FFN in common, and each a low-rank change before and after it.

    What that keeps of each layer is printed before anything is written. Distil the original into the result
    (configs/compress_moe.yaml); `export` multiplies it out to a stock Qwen3-MoE.

    Example: python main.py compress --source Qwen/Qwen3-30B-A3B --output compressed --rank 128

    Args:
        source: Qwen3-MoE in safetensors: a folder or a Hugging Face name.
        rank: Of the change, a multiple of 8: experts take (3 F D + 4 E D rank) / (3 E F D) of their room, for E
            experts of width F in a model of width D.
        output: Folder to write; without one there is the report only.
        calibration: Chat rows (file, glob or list) on which the experts are fitted; the rows to train on will do.
            Without them the weights are fitted, which keeps far less.
        columns: Our column -> the one in those files, e.g. {"advisory": "answer"}.
        calibration_tokens: Tokens of those rows that are read.
        max_length: Longer rows are left out.
        device: Where to compute; auto takes a GPU if there is one. Calibration holds the whole source there.
        overwrite: Replace an existing model folder, once the new one is complete.
    """
    from pathlib import Path

    from agri_moe.models.checkpoint_files import refuse_output

    target = None if output is None else Path(output).expanduser().resolve()
    if target is not None:
        refuse_output(target, overwrite)
    if calibration is not None and calibration_tokens < 1:
        raise ValueError(f"--calibration_tokens is {calibration_tokens}: it must be at least 1.")

    import torch

    from agri_moe.models import compress as compression

    compression.check(source, rank)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = None
    if calibration is not None:
        rows = compression.Calibration(calibration, columns or {}, calibration_tokens, max_length)
    model, reports = compression.compress(source, rank, rows, device)
    _print(reports)
    if target is None:
        print("Nothing was written: give --output DIR.")
        return
    compression.write(model, reports, source, target, overwrite=overwrite)
    print(f"{output}: {model.num_parameters():,} parameters.")
    print(f"Next: python main.py fit --config configs/compress_moe.yaml --model.student.source={output}")


def _print(reports: "list[LayerReport]") -> None:
    print("layer   rank of the differences   cosine of     error of     error of    room taken")
    print("         gate and up      down   differences   the weights  the output  by experts")
    for one in reports:
        error = "-" if one.output_error is None else f"{one.output_error:.1%}"
        print(
            f"{one.layer:5} {one.input_rank:13.1f} {one.output_rank:11.1f} {one.cosine:12.3f} {one.weight_error:13.1%} "
            f"{error:>11} {one.size:12.1%}"
        )
