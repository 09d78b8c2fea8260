"""`plan`: what a config will cost, told before anything is loaded."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agri_moe.planning import Duration, Memory, Plan

# The annotations of `plan` name nothing heavy: the command line's parser would import it for `--help`.


def plan(*fit: str, throughput: float | None = None, gpu_memory: float = 80.0, output: str | None = None) -> None:
    """Tell what a config will cost: parameters, memory, operations, time and disk, and whether it fits.

    Takes what `fit` takes: `--config FILE` and any key, such as --trainer.devices=8. Reads the configs of the models
    and the tokenizer, and training rows where they are local files of at most 64 MB; loads no weights.

    Example: python main.py plan --config configs/distill.yaml --gpu_memory 141

    Args:
        *fit: Options of `fit`.
        throughput: Floating-point operations per second that one GPU really makes in such a step; by default half of an
            H100's peak.
        gpu_memory: Memory of one GPU in GB (10^9 bytes).
        output: File to write the same as JSON to.
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    from agri_moe.models.base import LanguageModule
    from agri_moe.planning import Planner, read_config, read_run
    from agri_moe.runs import replace_text

    if throughput is not None and throughput <= 0:
        raise ValueError(f"--throughput is {throughput:g}: it must be above 0, in operations per second.")
    if gpu_memory <= 0:
        raise ValueError(f"--gpu_memory is {gpu_memory:g}: it must be above 0, in GB.")
    cli = read_config(fit)
    if not isinstance(cli.model, LanguageModule):
        raise ValueError("plan adds up what training a language model costs: give it a config of one, not of layers.")
    planner = Planner(cli.model, cli.datamodule, read_run(cli.settings["trainer"]))
    limit = round(gpu_memory * 1e9)
    found = planner.plan(throughput, limit)
    print("\n".join(report(found, limit, given=throughput is not None)))
    if output is not None:
        values = {name: _plain(value) for name, value in asdict(found).items()}
        values |= {"gpu_memory": limit, "fits": found.memory.fits(limit)}
        replace_text(Path(output), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _plain(value: object) -> object:
    """Named tuples as objects: JSON would lose their names."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def report(found: "Plan", limit: int, *, given: bool) -> list[str]:
    """The lines that `plan` prints.

    Args:
        found: What was worked out.
        limit: Bytes of one GPU.
        given: Whether the throughput was given, not assumed.
    """
    return [
        *_parameters(found),
        "",
        *_memory(found),
        "",
        *_fit(found, limit),
        "",
        *_operations(found),
        "",
        *_time(found, given),
        "",
        *_disk(found),
    ]


def _parameters(found: "Plan") -> list[str]:
    student, run = found.student, found.run
    trained = f"{student.pieces.trained:,} trained"
    if found.stages > 1:
        trained += f" in stage {found.stage + 1} of {found.stages}, which holds most"
    lines = [
        "Parameters",
        f"  student   {student.total:>17,}  {student.active:,} active for one token, {trained}",
    ]
    for name, model in (("teacher", found.teacher), ("anchor", found.anchor)):
        if model is not None:
            lines.append(f"  {name:<9} {model.total:>17,}  frozen")
    held, ranks = found.supply.rows, f"{run.ranks} rank{'s' if run.ranks > 1 else ''}"
    lines += [
        f"Rows: {found.supply.note}",
        f"Micro-batch: {held.sequences} x {held.length:,} tokens on each of {ranks} ({run.strategy}, {run.precision}), "
        f"{run.accumulate} to a step",
    ]
    return lines


def _memory(found: "Plan") -> list[str]:
    memory = found.memory
    lines = ["Memory of one rank, GB (10^9 bytes)"]
    lines += [f"  {part.name:<42} {part.bytes / 1e9:>9.3f}" for part in memory.parts if part.bytes > 0]
    lines.append(f"  {'peak, in the ' + memory.when:<42} {memory.peak / 1e9:>9.3f}")
    lines.append("  (not the sum: what comes and goes in a step is not all there at once)")
    return lines


def _fit(found: "Plan", limit: int) -> list[str]:
    memory: Memory = found.memory
    if memory.fits(limit):
        return [f"Fits {limit / 1e9:g} GB: {(limit - memory.peak) / 1e9:.1f} GB are left."]
    lines = [f"Does not fit {limit / 1e9:g} GB: {(memory.peak - limit) / 1e9:.1f} GB too much."]
    for remedy in found.remedies:
        verdict = "fits" if remedy.peak <= limit else "does not"
        lines.append(f"  {remedy.peak / 1e9:>8.1f} GB, {verdict:<9} {remedy.setting}")
    if not found.remedies or found.remedies[-1].peak > limit:
        lines.append("  No single setting makes it fit: take smaller models or shorter rows (data.max_length).")
    return lines


def _operations(found: "Plan") -> list[str]:
    total = found.work.total
    lines = [f"Operations for one token of the student's sequence: {total / 1e9:.3f} GFLOP"]
    for name, value in found.work._asdict().items():
        if value:
            lines.append(f"  {WORDS[name]:<42} {value / 1e9:>9.3f}  {value / total:>6.1%}")
    lines.append("  (terms on samples, norms and on-policy sampling are not counted)")
    return lines


WORDS = {
    "teacher_body": "teacher: layers, attention",
    "teacher_head": "teacher: head, where it is asked",
    "anchor": "anchor: layers, attention",
    "forward_body": "student: forward, matrices (active)",
    "forward_attention": "student: forward, attention",
    "recomputed": "student: forward again (checkpointing)",
    "backward_body": "student: backward, matrices",
    "backward_attention": "student: backward, attention",
    "head": "student: head and its gradients",
}


def _time(found: "Plan", given: bool) -> list[str]:
    duration: Duration | None = found.duration
    if duration is None or found.throughput is None:
        return ["Time: give --throughput, the operations per second that this CPU makes."]
    source = "as given" if given else "assumed: half the peak of an H100 SXM in this precision"
    lines = [
        f"Time at {found.throughput / 1e12:.4g} TFLOP/s on each rank ({source})",
        f"  {duration.tokens_per_second:,.0f} tokens per second, {duration.step_seconds:.3g} s and "
        f"{duration.step_tokens:,} tokens a step",
    ]
    if duration.steps is None:
        return [*lines, "  hours unknown: trainer.max_steps is not set, and rows were not counted"]
    return [*lines, f"  {duration.steps:,} steps, {duration.hours:.2f} hours, validation and saving not counted"]


def _disk(found: "Plan") -> list[str]:
    disk = found.disk
    lines = [
        "Disk, GB",
        f"  {'checkpoint, weights and moments':<42} {disk.checkpoint / 1e9:>9.3f}",
        f"  {f'{disk.kept} of them kept':<42} {disk.checkpoints / 1e9:>9.3f}  (one more while it is written)",
    ]
    if disk.row_cache is not None:
        lines.append(f"  {'tokenised rows':<42} {disk.row_cache / 1e9:>9.3f}")
    if disk.teacher_cache is not None:
        lines.append(f"  {'cached teacher logits, if there were one':<42} {disk.teacher_cache / 1e9:>9.3f}")
    return lines
