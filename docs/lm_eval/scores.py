"""What `diagnosis.yaml` counts. It needs nothing but the row, so that it runs where agri_moe is not installed."""

from typing import Any


def process_results(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the advisory names the row's diagnosis, and its action.

    The harness drops special tokens, so an answer is thought, blank line, advisory.
    """
    advisory = results[0].strip().rpartition("\n\n")[2]
    return {name: float(row[name] in advisory) for name in ("diagnosis", "action")}
