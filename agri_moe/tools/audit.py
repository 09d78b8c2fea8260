"""`python main.py audit`: is an upcycled checkpoint whole, and does it still compute its source?"""

from __future__ import annotations


def audit(student: str, source: str | None = None) -> None:
    """Check an upcycled checkpoint: shapes, names, values, symmetry, logits; exit 1 if it is not ready.

    Example: python main.py audit --student DIR --source DENSE

    Args:
        student: Mixture-of-Experts checkpoint in safetensors: a folder or a Hugging Face name.
        source: Dense checkpoint that it came from; by default the one that upcycle.json names, if present.
    """
    from agri_moe.models.audit import audit as run_audit

    report = run_audit(student, source)
    print(report)
    if not report.ready:
        raise SystemExit(1)
