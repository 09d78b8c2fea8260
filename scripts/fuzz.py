"""Coverage-guided fuzzing of everything that reads what others wrote, with atheris (Python 3.11 or 3.12).

    pip install atheris
    python scripts/fuzz.py --inputs 1000000          # shared out among the targets, one process after the other
    python scripts/fuzz.py --target chat --inputs 200000

Prints a table: target, inputs, seconds, crashes. An input that breaks a promise is kept in fuzz_output/ and ends its
target; exit status 1. `tests/test_fuzz.py` runs the same targets on few inputs, and on those that once broke them.

Every target takes bytes and makes of them what it reads. It passes if that is used, or refused with a ValueError of one
line; anything else is a crash: another exception, an endless loop, text that became a control token, a row that
disappeared, or any attempt to start a program or to open a connection.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

SHARE = {"chat": 34, "rows": 32, "parquet": 3, "cache": 5, "finder": 12, "table": 8, "config": 2, "pieces": 4}
"""Target -> percent of the inputs: some are ten times as quick as others."""
INSTRUMENTED = ("agri_moe.data", "agri_moe.runs", "agri_moe.foreign_files", "agri_moe.cli")
SECONDS_PER_INPUT = 20  # one that takes longer hangs
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")


# ---------------------------------------------------------------------- what a target may do


@contextmanager
def told() -> Iterator[None]:
    """A refusal is a ValueError of one line; it ends the `with` block."""
    try:
        yield
    except ValueError as error:
        assert type(error) is ValueError, f"{type(error).__name__} is no sentence for a user: {error}"
        assert str(error).strip(), "a refusal without a reason"
        assert "\n" not in str(error), f"more than one line: {error}"


def watch() -> None:
    """Make any attempt to run a program or to open a connection fail loudly, for the rest of this process."""

    def hook(event: str, _: Any) -> None:
        if event.startswith(FORBIDDEN):
            os.write(2, f"FORBIDDEN: {event}\n".encode())
            os.abort()

    sys.addaudithook(hook)


@functools.cache
def scratch() -> Path:
    """A folder for this process, in memory where there is such a place."""
    shared = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None)
    return Path(folder)


def empty(name: str) -> Path:
    """An empty folder of this name."""
    folder = scratch() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def mutated(original: bytes, data: bytes) -> bytes:
    """`original` with changes read from `data`: three bytes each, two for the place and one for the new value."""
    content = bytearray(original)
    for at in range(0, len(data) - 2, 3):
        place = int.from_bytes(data[at : at + 2], "little") % (len(content) + 1)
        if place == len(content):
            del content[data[at + 2] * len(content) // 256 :]
            if not content:
                break
        else:
            content[place] = data[at + 2]
    return bytes(content)


# ---------------------------------------------------------------------- chat rows


@functools.cache
def chat() -> Any:
    """A small tokenizer with our markers, and added tokens of the kinds that Qwen3 has."""
    from tokenizers import AddedToken

    from agri_moe.data.chat import Chat
    from agri_moe.data.synthetic import make_rows, train_tokenizer

    tokenizer = train_tokenizer(make_rows(60, seed=0, split="train"), vocab_size=600)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return Chat(tokenizer)


HOSTILE = (
    *("<|system|>", "<|user|>", "<|thought|>", "<|assistant|>", "<|endoftext|>", "<|im_end|>", "<think>", "</think>"),
    *("स्थिति (Scenario):", "\x1b[2J", "{{ 7 * 7 }}", "{% for", "\u200d", "\u0301", "<|", "|>", "क\u094d"),
)


def text_of(data: bytes) -> str:
    """Bytes as text, the low control characters as strings that a row must not make something of."""
    text = data.decode("utf-8", "surrogateescape")
    return "".join(HOSTILE[ord(c) - 14] if 14 <= ord(c) < 14 + len(HOSTILE) else c for c in text)


def fuzz_chat(data: bytes) -> None:
    """A row of any texts: only the markers are control tokens, and what is said comes back."""
    parts = [text_of(part) for part in data.split(b"\0")]
    row: dict[str, Any] = dict(zip(("scenario", "advisory", "thought", "system"), parts, strict=False))
    if len(parts) > 4:
        row["scenario"] = dict(zip(parts[4::2], parts[5::2], strict=False))
    ours, added = chat(), set(chat().tokenizer.get_added_vocab().values())
    with told():
        ids, segments = ours.encode(row)
        text = unicodedata.normalize("NFC", ours.render(row))
        thought = (row.get("thought") or "").strip()
        names = ["system", "user", *(["thought"] if thought else []), "assistant", "end"]
        assert [i for i in ids if i in added] == [ours.marker_ids[name] for name in names], "text became control"
        assert len(ids) == len(segments)
        assert segments == sorted(segments), "a part begins before the one before it ends"
        assert ours.tokenizer.decode(ids) == text, "the tokens are not the text"
        rendered = ours.tokenizer.apply_chat_template(ours.messages(row), tokenize=False)
        assert unicodedata.normalize("NFC", rendered) == text, "the template says something else"
        prompt = ours.encode_prompt(row["scenario"], row.get("system"), thought=bool(thought))
        last = max(at for at, token in enumerate(prompt) if token in added)
        assert prompt[: last + 1] == ids[: last + 1], "asked for something else than was trained"
        answer = ours.parse(ids[last + 1 :], thought=bool(thought))
        assert answer.complete
        said = (unicodedata.normalize("NFC", row["advisory"]).strip(), unicodedata.normalize("NFC", thought).strip())
        assert (answer.advisory, answer.thought or "") == said, "the answer is not what was said"
        assert ours.colored(ids, segments).count("\x1b") == 2 * ours.colored(ids, segments).count("\x1b[0m")
    ours.parse([byte * 3 % len(ours.tokenizer) for byte in data])


# ---------------------------------------------------------------------- rows of files

SUFFIXES = (".jsonl", ".json", ".csv", ".txt")


def read_all(path: Path) -> None:
    """Every row of a file is used or refused, none disappears; and so is the file."""
    from agri_moe.data import chat_data, text_data
    from agri_moe.data.sources import check_columns, find_sources, read_rows

    with told():
        (source,) = find_sources(str(path), "data.train")
        with told():
            check_columns(source, {"scenario": "scenario", "advisory": "advisory"})
        for number, raw in enumerate(read_rows(source)):
            assert raw.number == number, "a row disappeared"
            (record,) = chat_data._encode(chat(), raw, {})
            assert_record(record)
            for record in text_data._encode(chat(), raw, "text", 64):
                assert_record(record)


def assert_record(record: dict[str, Any]) -> None:
    """A row is used, or there is a reason."""
    if record["reason"]:
        assert not record["input_ids"]
        assert "\n" not in record["reason"]
    else:
        assert record["length"] == len(record["input_ids"]) == len(record["segment_ids"]) > 0


def fuzz_rows(data: bytes) -> None:
    """A file of any bytes: JSONL, JSON, CSV or text."""
    path = scratch() / f"rows{SUFFIXES[data[0] % len(SUFFIXES)] if data else '.csv'}"
    path.write_bytes(data[1:])
    read_all(path)


@functools.cache
def parquet() -> bytes:
    """A small file with a struct, two row groups and no compression, so that changes reach the values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"scenario": {"crop": "धान", "days": i}, "advisory": f"सलाह {i}", "text": "छिड़काव"} for i in range(6)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=3, compression="none")
    return buffer.getvalue()


def fuzz_parquet(data: bytes) -> None:
    """A Parquet file with some bytes changed, or cut off."""
    path = scratch() / "rows.parquet"
    path.write_bytes(mutated(parquet(), data))
    read_all(path)


# ---------------------------------------------------------------------- the teacher cache


@functools.cache
def caches() -> list[dict[str, bytes]]:
    """The files of a small cache of each kind."""
    import numpy as np

    from agri_moe.data.logit_cache import Answers, Header, finish, shard_name, write_shard

    made = []
    for kind in ("topk", "sampled"):
        folder, rows = empty("cache"), []
        for n in range(1, 4):
            random = np.random.default_rng(n)
            ids = np.sort(random.permuted(np.tile(np.arange(40), (n, 1)), axis=1)[:, :5], axis=1)
            logs = -random.random((n, 5)).astype(np.float32) - 2
            places, entropy, topk = np.arange(n) * 2, np.ones(n, np.float32), kind == "topk"
            tail, counts = np.full(n, -1, np.float32), random.integers(1, 4, (n, 5))
            kept = (logs, None, tail) if topk else (None, counts, None)
            rows.append((n, Answers(places, ids, kept[0], kept[1], kept[2], entropy, ids[:, 0])))
        write_shard(folder / shard_name(0), kind, rows)
        told_of = {"vocabulary": 40, "segments": ["assistant"], "view": "same", "teacher": "t", "teacher_source": "s"}
        header = Header(kind=kind, tokens=5, seed=0, dtype="float32", tokenizer="a", template="b", rows="c", **told_of)  # type: ignore[arg-type]
        finish(folder, header, 1)
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    return made


def fuzz_cache(data: bytes) -> None:
    """A manifest of any text, or with changes; or a shard with changes whose checksum is right all the same."""
    from agri_moe.data.logit_cache import MANIFEST, LogitCache, to_arrays

    mode, rest = (data[0] if data else 0), data[1:]
    files = dict(caches()[mode % 2])
    folder = empty("cache")
    if mode & 12 == 0:
        files[MANIFEST] = rest
    elif mode & 12 == 4:
        files[MANIFEST] = mutated(files[MANIFEST], rest)
    else:
        files["00000.arrow"] = mutated(files["00000.arrow"], rest)
        manifest = json.loads(files[MANIFEST])
        digest = hashlib.sha256(files["00000.arrow"]).hexdigest()
        manifest["files"]["00000.arrow"] |= {"bytes": len(files["00000.arrow"]), "sha256": digest}
        files[MANIFEST] = json.dumps(manifest).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with told():
        cache = LogitCache(folder)
        cache.verify()
        for _, answers in cache:
            arrays = to_arrays(answers)
            assert len(arrays.ids_MK) == len(answers.positions_N)
            assert arrays.ids_MK.min(initial=0) >= 0
            assert arrays.ids_MK.max(initial=0) < cache.header.vocabulary
            assert ((arrays.probs_MK >= 0) & (arrays.probs_MK <= 1)).all(), "not a probability"


# ---------------------------------------------------------------------- runs, checkpoints and configs

NAMES = (
    *("run.json", "lock.json", "config.yaml", "checkpoints/step=00000002.ckpt", "checkpoints/step=00000001.ckpt"),
    *("checkpoints/step=00000002.ckpt.complete", "checkpoints/step=00000001.ckpt.complete"),
    *("checkpoints/step=00000003.ckpt/.metadata", "checkpoints/step=00000003.ckpt.complete", "checkpoints/step=x.ckpt"),
)
STATUS = json.dumps({"fingerprint": "mark", "status": "running"}).encode()


def fuzz_finder(data: bytes) -> None:
    """A folder of runs with files of any content: what is found is whole, by its checksums."""
    from agri_moe.runs import Lock, Run, all_runs, damage, newest_checkpoint, unfinished_run

    root = empty("root")
    folder = root / "lightning_logs" / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_bytes(STATUS)
    written: dict[str, bytes] = {}
    for part in data.split(b"\0\xff"):
        if part:
            name = NAMES[part[0] % len(NAMES)]
            content = part[1:]
            if content.startswith(b"\1") and name.endswith(".complete"):  # a marker that is right
                of = name.removesuffix(".complete")
                content = json.dumps({Path(of).name: hashlib.sha256(written.get(of, b"")).hexdigest()}).encode()
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            written[name] = content
    with told():
        for run in all_runs(root):
            run.read()
    with told():
        run, checkpoint = newest_checkpoint(root)
        assert damage(checkpoint) is None
        marker = json.loads((checkpoint.parent / f"{checkpoint.name}.complete").read_bytes())
        for name, digest in marker.items():
            path = checkpoint / name if checkpoint.is_dir() else checkpoint
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, "a damaged checkpoint was found"
    with told():
        unfinished_run(root, "mark")
    with told():
        Lock(Run(folder)).release()


@functools.cache
def table() -> bytes:
    """The table of a small sharded checkpoint, as torch writes it."""
    import pickle

    import torch
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = empty("sharded")
    state = {"weight": torch.ones(3), "optimizer": {"lr": 0.1, "betas": (0.9, 0.95)}}
    save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 0}, folder / "meta.pt")
    content = (folder / ".metadata").read_bytes()
    return pickle.dumps(pickle.loads(content))  # written by this process itself


def fuzz_table(data: bytes) -> None:
    """The pickled table of a sharded checkpoint: any bytes, or one with changes."""
    from agri_moe.foreign_files import check_sharded

    original = table()
    content = data[1:] if data[:1] == b"\0" else mutated(original, data[1:])
    (scratch() / "sharded" / ".metadata").write_bytes(content)
    with told():
        check_sharded(scratch() / "sharded", "--ckpt_path")


@functools.cache
def parser() -> Any:
    """A parser of the command line's own kind, for the settings that a config nests."""
    from agri_moe.cli import ToolParser
    from agri_moe.models.upcycle import UpcycleSpec
    from agri_moe.objective import Objective
    from agri_moe.optimizer import OptimizerConfig
    from agri_moe.schedules import Value
    from agri_moe.stages import Stage

    def settings(
        objective: Objective | None = None,
        upcycle: UpcycleSpec | None = None,
        optimizer: OptimizerConfig | None = None,
        stages: list[Stage] | None = None,
        weight: Value = 1.0,
        freeze: list[str] | None = None,
    ) -> None: ...

    made = ToolParser()
    made.add_function_arguments(settings)
    return made


def fuzz_config(data: bytes) -> None:
    """A config of any text: refused as one that was found, or parsed, or refused in one line with exit status 2."""
    from agri_moe.foreign_files import check_found_config

    path = scratch() / "config.yaml"
    path.write_bytes(text_of(data).encode("utf-8", "surrogateescape"))
    try:
        check_found_config(path)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parser().instantiate_classes(parser().parse_string(path.read_text("utf-8")))
    except SystemExit as stop:
        assert stop.code == 2
        assert said.getvalue().startswith("error: ")
        assert said.getvalue().count("\n") == 1, said.getvalue()
    except (ValueError, TypeError) as error:
        from agri_moe.cli import our_cause

        assert our_cause(error) is not None, repr(error)


def fuzz_pieces(data: bytes) -> None:
    """What new pieces of a tokenizer are said to be made of."""
    from agri_moe.data.merges import PIECES_FILE, read_pieces, write_pieces

    folder = empty("pieces")
    (folder / PIECES_FILE).write_bytes(data)
    with told():
        pieces = read_pieces(folder)
        assert list(pieces) == list(range(min(pieces), min(pieces) + len(pieces)))
        assert all(len(made_of) > 1 and 0 <= min(made_of) <= max(made_of) < min(pieces) for made_of in pieces.values())
        write_pieces(folder, pieces)
        assert read_pieces(folder) == pieces


TARGETS: dict[str, Callable[[bytes], None]] = {
    "chat": fuzz_chat,
    "rows": fuzz_rows,
    "parquet": fuzz_parquet,
    "cache": fuzz_cache,
    "finder": fuzz_finder,
    "table": fuzz_table,
    "config": fuzz_config,
    "pieces": fuzz_pieces,
}

ROW = json.dumps({"scenario": {"crop": "धान"}, "advisory": "सलाह", "thought": "</think> <|end", "text": "x"}).encode()
PIECES = b'{"format": 1, "pieces": {"8": [1, 2], "9": [1, 2, 6]}}'
SEEDS: dict[str, list[bytes]] = {
    "chat": ["फसल: धान\0सलाह\0सोच\0निर्देश".encode(), b"\x0e\x12\0\x11a\0\x15", b"a\0b\0\0\0crop\0rice\0soil\0clay"],
    "rows": [
        *(b"\0" + ROW + b"\n" + ROW, b"\1[" + ROW + b"," + ROW + b"]", b"\3one\ntwo\n", b"\0\xef\xbb\xbf" + ROW),
        *(b'\2scenario,advisory\n"a\nb",c\nd,e,f\n', b'\0{"scenario": [1], "advisory": 1e999}\n{"advisory": null}'),
    ],
    "parquet": [b"", b"\x10\x00\x07"],
    "cache": [b"\0{}", b"\4", b"\5", b"\x08\x20\x01\x07", b"\x09\x20\x01\x07"],
    "finder": [
        b"\0" + STATUS,
        b"\3weights\0\xff\5\1\0\xff\4older\0\xff\6\1",
        b"\7table\0\xff\x08\1\0\xff\1" + json.dumps({"host": "h", "process": 1}).encode(),
    ],
    "table": [b"\1", b"\0cos\nsystem\n(S'true'\ntR.", b"\1\x20\x00\x63"],
    "config": [
        b"objective: {kl: {weight: {start: 0, end: 1, steps: 5}, temperature: 2}}\nweight: 3\n",
        b"stages:\n- {steps: 3, freeze: [mlp]}\nupcycle: {num_experts: 4}\noptimizer: {name: adafactor}\n",
        b"objective: {class_path: os.system, init_args: {command: ls}}\n",
    ],
    "pieces": [PIECES, PIECES.replace(b"9", b"7"), PIECES.replace(b"6", b"-6"), PIECES.replace(b"[1, 2]", b"[[]]")],
}


# ---------------------------------------------------------------------- runs of the fuzzer


def fuzz(target: str, inputs: int, output: Path) -> None:
    """Run one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        import agri_moe.cli
        import agri_moe.data.chat_data
        import agri_moe.data.logit_cache
        import agri_moe.data.text_data
        import agri_moe.foreign_files
        import agri_moe.runs  # noqa: F401
    run, corpus = TARGETS[target], output / f"{target}_corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]):
        run(seed)  # and whatever is made only once is made now
        (corpus / f"seed{number}").write_bytes(seed)
    watch()
    options = [f"-runs={inputs}", f"-timeout={SECONDS_PER_INPUT}", "-rss_limit_mb=6000", "-max_len=512", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={output}/{target}-", str(corpus)], run)
    atheris.Fuzz()


def run_all(inputs: dict[str, int], output: Path) -> int:
    """One process for each target, and the table."""
    output.mkdir(parents=True, exist_ok=True)
    print(f"{'target':<10}{'inputs':>12}{'seconds':>10}{'crashes':>10}", flush=True)
    total = [0, 0, 0]
    for target, count in inputs.items():
        log = output / f"{target}.log"
        with log.open("w") as file:
            command = [sys.executable, __file__, "--target", target, "--inputs", str(count), "--output", str(output)]
            subprocess.run([*command, "--in_process", "true"], stdout=file, stderr=subprocess.STDOUT, check=False)
        said = log.read_text(errors="replace")
        done = re.search(r"Done (\d+) runs in (\d+) second", said)
        steps = [int(number) for number in re.findall(r"^#(\d+)\s", said, re.MULTILINE)]
        runs, seconds = (int(done[1]), int(done[2])) if done else (max(steps, default=0), 0)
        crashes = len([path for path in output.glob(f"{target}-*") if path.is_file()]) or int(not done)
        total = [a + b for a, b in zip(total, (runs, seconds, crashes), strict=True)]
        print(f"{target:<10}{runs:>12,}{seconds:>10,}{crashes:>10}", flush=True)
    print(f"{'in all':<10}{total[0]:>12,}{total[1]:>10,}{total[2]:>10}")
    return 1 if total[2] else 0


def main() -> int:
    """Parse the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=1_000_000)
    arguments.add_argument("--target", choices=TARGETS)
    arguments.add_argument("--output", type=Path, default=Path("fuzz_output"))
    arguments.add_argument("--in_process", choices=["true", "false"], default="false", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.in_process == "true":
        fuzz(given.target, given.inputs, given.output)
    shares = {given.target: 100} if given.target else SHARE
    return run_all({name: -(-given.inputs * share // 100) for name, share in shares.items()}, given.output)


if __name__ == "__main__":
    sys.exit(main())
