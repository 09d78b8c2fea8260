"""`python main.py audit`: is an upcycled checkpoint whole, and does it still compute its source?"""

from __future__ import annotations


def audit(student: str, source: str | None = None, text: list[str] | None = None) -> None:
    """Check an upcycled checkpoint: shapes, names, values, symmetry, logits; exit 1 if it is not ready.

    Example: python main.py audit --student DIR --source DENSE

    Args:
        student: Mixture-of-Experts checkpoint in safetensors: a folder or a Hugging Face name.
        source: Dense checkpoint that it came from; by default the one that upcycle.json names, if present.
        text: Files of text or rows that neither has seen: both are told in bits per byte, each in its own tokens.
    """
    from agri_moe.data.learning_texts import read_lines
    from agri_moe.models.audit import audit as run_audit

    lines = None if text is None else read_lines(text, "--text")
    report = run_audit(student, source, lines)
    print(report)
    if not report.ready:
        raise SystemExit(1)
