"""`report`: a run as one page that a stranger understands."""


def report(run: list[str] | None = None, output: str | None = None) -> None:
    """Write one self-contained HTML page about a run, and its pictures beside it; of several runs, a comparison.

    Only what the run has left in its folder is read: no weights, no rows. Warnings are printed too.

    Example: python main.py report --run lightning_logs/version_0

    Args:
        run: The run's folder, version_N; given more than once, the runs are compared. The newest run by default.
        output: Folder to write index.html to; the run's own report/ by default. Several runs need one.
    """
    from pathlib import Path

    from agri_moe.runs import LOGS, all_runs

    folders = [Path(folder) for folder in run or []] or [newest.folder for newest in all_runs(Path())[:1]]
    if not folders:
        raise ValueError(f"{LOGS} holds no run: train first with fit, or give --run DIR.")
    if len(folders) > 1 and output is None:
        raise ValueError("report needs --output DIR to compare several runs: the page belongs to none of them.")

    from agri_moe.page import compared_page, run_page
    from agri_moe.reporting import read_record, warnings

    records = [read_record(folder) for folder in folders]
    target = Path(output) if output is not None else folders[0] / "report"
    page = run_page(records[0], target) if len(records) == 1 else compared_page(records, target)
    for record in records:
        for warning in warnings(record):
            print(f"{record.name}: {warning}")
    print(f"Report: {page}")
