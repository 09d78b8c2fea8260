"""Every measurement that needs no GPU, one after the other: `make bench`.

    python benchmarks/run_all.py [--parts loss_step,step] [--random]

Each part is a script of its own here, prints one table and its pass marks, and writes benchmarks/output/PART.json. The
whole takes about 25 minutes on two idle cores; nothing else should run beside it. `step`, `packing` and `upcycle` read
the real rows and the real config from the folder named by AGRI_MOE_DATA.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from measure import DATA

PARTS: dict[str, list[str]] = {
    "loss_step": [],
    "step": ["--profile"],
    "packing": [],
    "growth": [],
    "upcycle": [],
}
"""Script -> what it is given."""
ROWS = ("step", "packing")
CONFIG = "upcycle"


def commands(parts: list[str], random: bool) -> list[list[str]]:
    """One command for each part."""
    folder = Path(__file__).parent
    extra = ["--random"] if random else []
    return [
        [sys.executable, str(folder / f"{part}.py"), *PARTS[part], *(extra if part in ROWS else [])] for part in parts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between")
    parser.add_argument("--random", action="store_true", help="random rows in place of the real ones; no upcycling")
    arguments = parser.parse_args()
    parts = [part for part in arguments.parts.split(",") if not (arguments.random and part == CONFIG)]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts names {unknown[0]!r}; there are {', '.join(PARTS)}.")
    if not DATA.is_dir() and not arguments.random:
        parser.error(f"{DATA} does not exist: set AGRI_MOE_DATA to the folder with the real rows, or give --random.")
    failed = []
    for command in commands(parts, arguments.random):
        if subprocess.run(command, check=False).returncode:
            failed.append(Path(command[1]).name)
        print(flush=True)
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed.")


if __name__ == "__main__":
    main()
