"""Check the pins against versions that are known to be bad: offline, and by pip-audit too where that is installed.

    python scripts/audit_pins.py                  # constraints.txt
    python scripts/audit_pins.py --pins FILE

Exit status 1 if a pin is bad. The list below is short: malware that was published under a name of ours, and advisories
about code that this project runs on what others wrote (checkpoints, archives, requests, templates). pip-audit knows
more, where its database is within reach; where it is not, that is said, and the list alone decides.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

BAD = (
    # Package, versions, advisory, what it is.
    ("lightning", "==2.6.2", "withdrawn", "published with malware in it"),
    ("lightning", "==2.6.3", "withdrawn", "published with malware in it"),
    ("torch", "<2.6", "CVE-2025-32434", "torch.load with weights_only runs code"),
    ("transformers", "<4.48", "CVE-2024-11392", "loading a checkpoint runs code"),
    ("pyarrow", ">=0.14,<14.0.1", "CVE-2023-47248", "reading an IPC file runs code"),
    ("jinja2", "<3.1.6", "CVE-2025-27516", "a template leaves its sandbox"),
    ("gradio", "<4.36", "CVE-2024-4941", "a visitor reads files of the server"),
    ("starlette", "<0.49.1", "CVE-2025-62727", "a request takes the server's time"),
    ("python-multipart", "<0.0.18", "CVE-2024-53981", "a request takes the server's time"),
    ("h11", "<0.16", "CVE-2025-43859", "requests are told apart wrongly"),
    ("urllib3", "<2.5", "CVE-2025-50181", "redirects are followed though forbidden"),
    ("requests", "<2.32.4", "CVE-2024-47081", "a URL gets credentials of .netrc"),
    ("certifi", "<2024.7.4", "CVE-2024-39689", "trusts a withdrawn authority"),
    ("pillow", ">=11.2,<11.3", "CVE-2025-48379", "writing a picture overflows a buffer"),
    ("pillow", "<10.3", "CVE-2024-28219", "converting a picture overflows a buffer"),
    ("protobuf", "<4.25.8", "CVE-2025-4565", "a message exhausts the stack"),
    ("protobuf", ">=5,<5.29.5", "CVE-2025-4565", "a message exhausts the stack"),
    ("protobuf", ">=6,<6.31.1", "CVE-2025-4565", "a message exhausts the stack"),
    ("werkzeug", "<3.0.6", "CVE-2024-49767", "a request takes the server's memory"),
    ("tornado", "<6.5", "CVE-2025-47287", "a request takes the server's time"),
    ("setuptools", "<78.1.1", "CVE-2025-47273", "a package name leads out of its folder"),
    ("fonttools", ">=4.33,<4.60.2", "CVE-2025-66034", "a font file writes anywhere"),
    ("tqdm", "<4.66.3", "CVE-2024-34062", "an argument runs code"),
)
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?==([^\s;#]+)", re.MULTILINE)


def found(text: str) -> list[str]:
    """A line for each bad pin."""
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PIN.findall(text)}
    return [
        f"{name} {pins[name]}: {what} ({advisory}); pin a version that is not {versions}."
        for name, versions, advisory, what in BAD
        if name in pins and SpecifierSet(versions).contains(Version(pins[name]), prereleases=True)
    ]


def pip_audit(pins: Path) -> tuple[bool, str]:
    """Whether pip-audit finds nothing, and what is to be said of it."""
    program = shutil.which("pip-audit")
    if program is None:
        return True, "pip-audit is not installed: checked against the list in this file alone."
    command = [program, "--requirement", str(pins), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return True, "pip-audit knows of nothing against the pins."
    if "Found " in done.stderr + done.stdout:
        return False, done.stdout
    return True, "pip-audit could not reach its database: checked against the list in this file alone."


def main() -> int:
    """Parse the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pins", type=Path, default=Path(__file__).parents[1] / "constraints.txt")
    pins = arguments.parse_args().pins
    bad = found(pins.read_text("utf-8"))
    fine, said = pip_audit(pins)
    print("\n".join([*bad, said]))
    return 0 if fine and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
