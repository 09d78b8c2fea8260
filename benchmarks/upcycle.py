"""Upcycling at the real shape of Qwen3-0.6B: time against copying the output, peak memory, and interruptions.

    python benchmarks/upcycle.py [--repeats 5] [--interruptions 5] [--folder DIR]

The source has random bf16 weights at the shapes of the config in AGRI_MOE_DATA (28 layers, 1.2 GB), written once to a
temporary folder (needs about 12 GB of disk). It becomes 8 experts, top-2, 4.9 GB.

Time: `upcycle` at jitter 0 and 0.01, in turns with copying the jittered output file by file with `shutil.copyfile`.
Both end in fsync of every weight file, and begin after a `sync`. Pass marks: 1.5 and 4 times the copy.

Memory: the peak resident size of a process that only upcycles, less that of one that has only imported it; the mark is
1.5 times the largest layer written.

Interruptions: a process is killed (SIGKILL) at a random moment of its work and run again; the folder must then hold the
bytes of an unbroken run, which a hash of every file decides.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

import torch
from measure import DATA, EXACT, in_turns, mark, ratio, report, resident_mb, table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from agri_moe.models.upcycle import UpcycleSpec, upcycle

JITTERS = (0.0, 0.01)
MARKS = {0.0: 1.5, 0.01: 4.0}


def config_of(arguments: argparse.Namespace) -> PreTrainedConfig:
    """The real config, or a tiny one."""
    if arguments.tiny:
        return AutoConfig.for_model(
            "qwen3", vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
        )  # fmt: skip
    folder = DATA / "qwen3-0.6b"
    if not folder.is_dir():
        raise SystemExit(f"error: {folder} does not exist; set AGRI_MOE_DATA to the folder with the real config.")
    return AutoConfig.from_pretrained(folder)


def write_source(config: PreTrainedConfig, folder: Path) -> None:
    """A dense checkpoint with random bf16 weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def size_mb(paths: Sequence[Path]) -> float:
    """Bytes of the files, in MB."""
    return sum(path.stat().st_size for path in paths) / 1e6


# ---------------------------------------------------------------------- time


def fresh(output: Path, work: Callable[[], object]) -> Callable[[], float]:
    """Let `work` write `output` anew; seconds, from a synced disk and without the time of removing it."""

    def timed() -> float:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return timed


def copy_folder(source: Path, target: Path) -> None:
    """Copy file by file, each written out before the next."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())


def times(dense: Path, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of copying the output, and of upcycling at each jitter, in turns."""
    kept = folder / "kept"
    upcycle(dense, kept, UpcycleSpec(jitter=JITTERS[-1]))
    output = folder / "output"
    works = {"copy": fresh(output, lambda: copy_folder(kept, output))}
    for jitter in JITTERS:
        works[f"jitter {jitter:g}"] = fresh(output, lambda j=jitter: upcycle(dense, output, UpcycleSpec(jitter=j)))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in works}
    # What `in_turns` times holds the removal too; the inner clocks are the ones that count.
    in_turns({name: lambda n=name: seconds[n].append(works[n]()) for name in works}, repeats)  # type: ignore[misc]
    shutil.rmtree(output)
    return {name: values[1:] for name, values in seconds.items()}


# ---------------------------------------------------------------------- memory and interruptions


def command(dense: Path, output: Path, jitter: float) -> list[str]:
    """This script as a process that only upcycles."""
    return [sys.executable, __file__, "--only", str(dense), str(output), str(jitter)]


def only(dense: str, output: str, jitter: str) -> None:
    """What such a process does; prints its resident MB after the imports and at most."""
    imported = resident_mb("VmHWM")
    upcycle(dense, output, UpcycleSpec(jitter=float(jitter)))
    print(json.dumps({"imported": imported, "peak": resident_mb("VmHWM")}))


def peak_of(dense: Path, output: Path, jitter: float) -> dict[str, float]:
    """Peak resident MB of upcycling in a process of its own, and of its imports."""
    done = subprocess.run(
        command(dense, output, jitter), env=os.environ | EXACT, capture_output=True, text=True, check=True
    )
    shutil.rmtree(output)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def interrupted(dense: Path, output: Path, whole: dict[str, str], after: float) -> str:
    """Kill an upcycling so many seconds after its first file, run it again, and compare; says what happened."""
    building = output.with_name(output.name + ".partial")
    process = subprocess.Popen(command(dense, output, JITTERS[-1]), stdout=subprocess.DEVNULL)
    while process.poll() is None and not building.exists():
        time.sleep(0.01)  # the imports are not what is to be interrupted
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    complete = len(list(building.glob("*.safetensors"))) if building.exists() else 0
    if killed and not output.exists():
        subprocess.run(command(dense, output, JITTERS[-1]), stdout=subprocess.DEVNULL, check=True)
    same = digests(output) == whole
    shutil.rmtree(output)
    at = f"killed after {after:.1f} s, {complete} files complete" if killed else f"finished before {after:.1f} s"
    return f"{at}: {'same bytes' if same else 'OTHER BYTES'}"


# ---------------------------------------------------------------------- all of it


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure and report."""
    dense = folder / "dense"
    write_source(config_of(arguments), dense)
    seconds = times(dense, folder, arguments.repeats)
    kept = folder / "kept"
    files = sorted(kept.glob("*.safetensors"))
    layer = size_mb(files[1:2])  # the first holds the embedding, and the layers are alike
    peaks = {jitter: peak_of(dense, folder / f"peak{jitter:g}", jitter) for jitter in JITTERS}
    whole = digests(kept)
    length = statistics.median(seconds[f"jitter {JITTERS[-1]:g}"])
    moments = random.Random(0)
    broken = [
        interrupted(dense, folder / "again", whole, moments.uniform(0, length)) for _ in range(arguments.interruptions)
    ]

    rows: list[list[Any]] = [["copy", statistics.median(seconds["copy"]), "1.00", "-", "-"]]
    marks = []
    for jitter in JITTERS:
        name = f"jitter {jitter:g}"
        slower, above = ratio(seconds[name], seconds["copy"]), peaks[jitter]["peak"] - peaks[jitter]["imported"]
        rows.append([name, statistics.median(seconds[name]), str(slower), f"{above:,.0f}", above / layer])
        marks.append(mark(f"time over copying, {name}", slower.median, MARKS[jitter]))
        marks.append(mark(f"peak memory over the largest layer, {name}", above / layer, 1.5))
    text = [
        f"Source {size_mb(list(dense.glob('*.safetensors'))):,.0f} MB, output {size_mb(files):,.0f} MB in {len(files)} "
        f"files, a layer {layer:,.0f} MB; medians of {arguments.repeats} rounds.\n",
        table(("", "seconds", "x copy", "MB above imports", "x layer"), rows),
        "",
        *marks,
        *broken,
    ]
    result = {"arguments": vars(arguments), "seconds": seconds, "memory": peaks, "layer_mb": layer}
    report("upcycle", "\n".join(text), result | {"interruptions": broken})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--interruptions", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary folder is made; the system's own place by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of the real shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        only(*arguments.only)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(arguments, Path(folder))


if __name__ == "__main__":
    main()
