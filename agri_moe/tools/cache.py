"""`cache`: what the teacher says of a config's rows, written to disk once, for runs without the teacher."""

from typing import Literal


def cache(
    *fit: str,
    output: str,
    kind: Literal["topk", "sampled"] = "topk",
    k: int = 64,
    draws: int = 12,
    segments: list[Literal["system", "user", "thought", "assistant"]] | None = None,
    seed: int = 0,
) -> None:
    """Ask a config's teacher about its train, validation and test rows, and write the answers to a folder.

    Takes what `fit` takes, `--config FILE` and any key; train from the folder with `--model.teacher.cache=DIR`. Under
    torchrun the processes share the rows out, each with the whole teacher. Killed and started again, it goes on after
    the last file that was complete.

    Example: `python main.py cache --config configs/distill_cached.yaml --output teacher_cache`

    Args:
        *fit: Options of `fit`.
        output: Folder to write.
        kind: `topk`, the most probable tokens, their log-probabilities and the mass of all others; or `sampled`, tokens
            drawn from the teacher's distribution, an unbiased estimate of all of it in less space (Anshumann et al.
            2025, Sparse Logit Sampling).
        k: Of topk, tokens at each position.
        draws: Of sampled, draws at each position; more make less noise and take more space.
        segments: Segments whose tokens the teacher is asked for; by default those of objective.kl.segments.
        seed: Of the draws.
    """
    from agri_moe.caching import Asked, write_cache

    if k < 1:
        raise ValueError(f"--k is {k}: it must be at least 1.")
    if not 1 <= draws <= 65535:
        raise ValueError(f"--draws is {draws}: it must be between 1 and 65535.")
    write_cache(fit, output, Asked(kind, k if kind == "topk" else draws, segments, seed))
