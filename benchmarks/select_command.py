"""What `select` lets in of a corpus with salt in it, and how fast it is on one that is larger than its memory.

    python benchmarks/select_command.py salted [--salt 0.2]
    python benchmarks/select_command.py throughput [--megabytes 2000] [--num_proc 2] [--part 100] [--folder DIR]

salted: the real raw rows (plant diseases, soil: English; sentences: Hindi), and salt of ten kinds in each language:
exact repeats; near repeats (one or two words changed, or a typing error in each of three); one sentence over and over;
boilerplate of a template and numbers; and noise: links and tags, tables of digits, characters and letters in no order,
text in the wrong encoding. Of 10% and 30% of the rows, the share that is salt: chosen at random; by entropy alone, with
nothing against repeats, repetition and noise; with one of the two; and by `select` as it is. A copy counts as salt
where the row that it repeats, or another copy, was chosen too; any other salt counts wherever it was chosen.

throughput: a corpus of chat rows whose sentences are those of the real rows, mixed anew in each row, is written to
--folder and deleted afterwards. `select` chooses 10% of it; the resident sizes of all its processes are added up
twenty times a second. Against it the same scores, by the same functions, over a table that pandas holds in memory, on
the first --part megabytes: rows a second, and the peak memory, which grows with the corpus.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from measure import DATA, report, resident_mb, table

from agri_moe.data.selection import Rule
from agri_moe.data.selection_passes import Selection, select_rows
from agri_moe.data.selection_scoring import load_scorer

ROOT = Path(__file__).parents[1]
TOKENIZER = DATA / "qwen3-0.6b"
BUDGETS = (0.1, 0.3)
RULES = {
    "entropy alone": {"near": 0.0, "damp": False},
    "without damping": {"damp": False},
    "without near repeats": {"near": 1.0},
    "select": {},
    "select, strata": {"within": "strata"},
}
Texts = list[str]


class Salted(NamedTuple):
    """A row, its language, the kind of salt it is (empty: none), and what it is a copy of (empty: nothing)."""

    text: str
    language: str
    kind: str
    family: str


def real_rows() -> dict[str, Texts]:
    """The texts of the real raw rows, repeats left out, and the Hindi sentences, three to a row."""
    english: Texts = []
    for name in ("plant_disease_raw", "soil_raw"):
        for row in pq.read_table(DATA / f"{name}.parquet").to_pylist():
            english.append("\n".join(row[c] for c in ("scenario", "thought", "advisory") if row[c]))
    lines = [line for line in (DATA / "hindi_text.txt").read_text("utf-8").split("\n") if line]
    return {"en": list(dict.fromkeys(english)), "hi": [" ".join(lines[i : i + 3]) for i in range(0, len(lines), 3)]}


# ---------------------------------------------------------------------- salt


def typing_errors(text: str, draw: random.Random) -> str:
    """Two letters exchanged in three words."""
    words = text.split(" ")
    for i in draw.sample(range(len(words)), min(3, len(words))):
        if len(words[i]) > 3:
            at = draw.randrange(len(words[i]) - 1)
            words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
    return " ".join(words)


def other_words(text: str, draw: random.Random) -> str:
    """One or two words replaced by others of the same text."""
    words = text.split(" ")
    for i in draw.sample(range(len(words)), min(draw.randint(1, 2), len(words))):
        words[i] = draw.choice(words)
    return " ".join(words)


def over_and_over(text: str, draw: random.Random) -> str:
    """A sentence of the row, 6 to 20 times."""
    sentence = max(text.split("\n"), key=len)
    return " ".join([sentence] * draw.randint(6, 20))


TEMPLATES = {
    "en": [
        "Thank you for contacting the agricultural advisory service. Your request number {} has been received and will "
        "be answered by one of our experts within {} working days. Please do not reply to this message.",
        "Copyright {} All rights reserved. Terms of use and privacy policy apply to this page and to its {} sections. "
        "Subscribe to our newsletter to receive the latest news on crops, weather, prices and schemes.",
        "Page {} of {} | Home | About us | Contact | Advertise with us | Careers | Help | Sign in to leave a comment",
    ],
    "hi": [
        "कृषि सलाह सेवा से संपर्क करने के लिए धन्यवाद। आपका अनुरोध क्रमांक {} प्राप्त हो गया है और हमारे विशेषज्ञ {} दिनों में उत्तर देंगे। "
        "कृपया इस संदेश का उत्तर न दें।",
        "सर्वाधिकार सुरक्षित {}। इस पृष्ठ के {} भागों पर उपयोग की शर्तें और गोपनीयता नीति लागू होती हैं। फसल, मौसम और मंडी भाव की "
        "ताज़ा खबरों के लिए हमारी सदस्यता लें।",
        "पृष्ठ {} / {} | मुखपृष्ठ | हमारे बारे में | संपर्क | विज्ञापन दें | सहायता | टिप्पणी करने के लिए साइन इन करें",
    ],
}
LINKS = {"en": ["Home", "Read more", "Sign in", "Share"], "hi": ["मुखपृष्ठ", "और पढ़ें", "साइन इन", "साझा करें"]}


def boilerplate(text: str, draw: random.Random, language: str) -> str:
    """A template with two numbers."""
    return draw.choice(TEMPLATES[language]).format(draw.randint(1, 99999), draw.randint(1, 99))


def markup(text: str, draw: random.Random, language: str) -> str:
    """Links and tags."""
    return "".join(
        f'<div class="{draw.choice(["nav", "menu", "item-box", "footer"])}"><a href="https://site{draw.randint(0, 999)}'
        f'.example/p?id={draw.randint(0, 99999)}"><span style="color:#{draw.randrange(1 << 24):06x}">'
        f'{draw.choice(LINKS[language])}</span></a><img src="/i/{draw.randint(0, 9999)}.png"></div>'
        for _ in range(draw.randint(2, 6))
    )


def digits(text: str, draw: random.Random, language: str) -> str:
    """A table of numbers under a few words."""
    rows = [" ".join(f"{draw.uniform(0, 999):.2f}" for _ in range(6)) for _ in range(draw.randint(4, 16))]
    return "\n".join([" ".join(text.split()[:6]), *rows])


def noise(text: str, draw: random.Random, language: str) -> str:
    """Printable characters in no order."""
    return "".join(chr(draw.randint(33, 126)) for _ in range(draw.randint(100, 600)))


def letters(text: str, draw: random.Random, language: str) -> str:
    """Letters of the language in no order, in words."""
    alphabet = {"en": "abcdefghijklmnopqrstuvwxyz", "hi": "कखगघचछजझटठडढणतथदधनपफबभमयरलवशसहािीुूेैोौं"}[language]
    return " ".join("".join(draw.choices(alphabet, k=draw.randint(2, 9))) for _ in range(draw.randint(20, 90)))


def wrong_encoding(text: str, draw: random.Random, language: str) -> str:
    """UTF-8 read as Latin-1; English is first given the letters that suffer from it."""
    if language == "en":
        text = text.translate(str.maketrans("aeiou", "àéîõü"))
    return text.encode().decode("latin-1")


COPIES: dict[str, Callable[[str, random.Random], str]] = {
    "exact repeats": lambda text, draw: text,
    "typing errors": typing_errors,
    "other words": other_words,
}
RUBBISH: dict[str, Callable[[str, random.Random, str], str]] = {
    "one sentence": lambda text, draw, language: over_and_over(text, draw),
    "boilerplate": boilerplate,
    "markup": markup,
    "digits": digits,
    "characters": noise,
    "letters": letters,
    "wrong encoding": wrong_encoding,
}
NOISE = ("markup", "digits", "characters", "letters", "wrong encoding")


def salted(share: float, seed: int = 0) -> list[Salted]:
    """Real rows with this share of salt, in a random order."""
    draw = random.Random(seed)
    rows = []
    for language, texts in real_rows().items():
        rows += [Salted(text, language, "", f"{language}{i}") for i, text in enumerate(texts)]
        each = round(share * len(texts) / (1 - share) / (len(COPIES) + len(RUBBISH)))
        for kind, change in COPIES.items():
            for i in draw.choices(range(len(texts)), k=each):
                rows.append(Salted(change(texts[i], draw), language, kind, f"{language}{i}"))
        for kind, make in RUBBISH.items():
            rows += [Salted(make(draw.choice(texts), draw, language), language, kind, "") for _ in range(each)]
    draw.shuffle(rows)
    return rows


def salt_in(rows: list[Salted]) -> Counter[str]:
    """How many of the chosen rows are salt, by kind; of a row and its copies, one is none."""
    members = Counter(row.family for row in rows if row.family)
    real = {row.family for row in rows if not row.kind}
    found: Counter[str] = Counter()
    for row in rows:
        if row.kind and row.family and row.family not in real and members[row.family] > 0:
            real.add(row.family)  # the first copy stands for the row, which is not there
        elif row.kind:
            found[row.kind] += 1
    return found


def run_salted(arguments: argparse.Namespace) -> None:
    """Select from the salted rows in each way, and tell what got in."""
    rows = salted(arguments.salt)
    names = {"en": "English", "hi": "Hindi"}
    there = Counter(row.kind for row in rows if row.kind)
    lines: list[list[Any]] = []
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "rows.parquet", Path(folder) / "selected.parquet"
        columns = {"text": [row.text for row in rows], "language": [names[row.language] for row in rows]}
        pq.write_table(pa.table(columns | {"number": range(len(rows))}), source)
        for budget in BUDGETS:
            draw = random.Random(1)
            chosen = {"random": draw.sample(rows, round(budget * len(rows)))}
            for name, options in RULES.items():
                rule = Rule(share=budget, **options)  # type: ignore[arg-type]
                selection = Selection(str(source), str(output), folder, rule, {}, ("language",), str(TOKENIZER))
                select_rows(selection, progress=False)
                chosen[name] = [rows[i] for i in pq.read_table(output)["number"].to_pylist()]
            for name, found in chosen.items():
                salt = salt_in(found)
                repeated = sum(n for kind, n in salt.items() if kind not in NOISE) / len(found)
                share = salt.total() / len(found)
                shares.setdefault(name, {})[f"{budget:.0%}"] = (repeated, share)
                kinds = ", ".join(f"{kind} {n}" for kind, n in salt.most_common())
                lines.append([f"{budget:.0%}", name, len(found), f"{repeated:.2%}", f"{share:.2%}", kinds or "none"])
    kinds = ", ".join(f"{n} {kind}" for kind, n in there.items())
    text = [
        f"{len(rows):,} rows, {there.total():,} of them salt: {kinds}.\n",
        table(("budget", "chosen", "rows", "repeats and boilerplate", "all salt", "of which"), lines),
    ]
    report("select_salted", "\n".join(text), {"salt": arguments.salt, "share": shares})


# ---------------------------------------------------------------------- throughput


def write_corpus(folder: Path, megabytes: float, seed: int = 0) -> tuple[int, int]:
    """Chat rows of the real rows' sentences, mixed anew, as Parquet files; how many rows, and bytes of text."""
    draw = random.Random(seed)
    parts = {"en": [], "hi": []}  # type: dict[str, list[str]]
    for language, texts in real_rows().items():
        parts[language] = [part for text in texts for part in text.replace("। ", "।\n").split("\n") if len(part) > 30]
    schema = pa.schema([(name, pa.string()) for name in ("scenario", "thought", "advisory", "language")])
    rows = size = number = 0
    while size < megabytes * 1e6:
        made: dict[str, list[str]] = {name: [] for name in schema.names}
        held = 0
        while held < min(32e6, megabytes * 1e6 - size):
            language = "hi" if draw.random() < 0.3 else "en"
            for name, most in (("scenario", 2), ("thought", 12), ("advisory", 8)):
                text = " ".join(draw.choices(parts[language], k=draw.randint(1, most)))
                held += len(text.encode())
                made[name].append(text)
            made["language"].append(language)
        pq.write_table(pa.table(made, schema), folder / f"{number:04}.parquet", compression="zstd")
        rows, size, number = rows + len(made["language"]), size + held, number + 1
    return rows, size


def family_mb(process: int) -> float:
    """Resident MB of a process and all below it, each by itself: what they share counts for each."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    total, todo = 0, [process]
    while todo:
        one = todo.pop()
        todo += children.get(one, [])
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
        except OSError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


def watched(command: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of CPU and peak resident MB of a command with all its processes."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, family_mb(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu, peak


def in_pandas(folder: Path, megabytes: float) -> dict[str, float]:
    """The same scores over a table that pandas holds, in this process: rows, seconds and peak MB."""
    import pandas as pd

    scorer = load_scorer(str(TOKENIZER), "unigram", None, "cpu")
    started, cpu = time.perf_counter(), time.process_time()
    files, size = [], 0.0
    for path in sorted(folder.glob("*.parquet")):
        if size >= megabytes * 1e6:
            break
        files.append(pd.read_parquet(path))
        size += float(files[-1][["scenario", "thought", "advisory"]].map(lambda text: len(text.encode())).sum().sum())
    frame = pd.concat(files, ignore_index=True)
    rows = len(frame)
    frame["text"] = frame["scenario"] + "\n" + frame["thought"] + "\n" + frame["advisory"]
    ids, lengths, frame["score"] = scorer(frame["text"].tolist())
    from agri_moe.data.selection import plain, repetition, signatures

    frame["score"] *= 1 - repetition(ids, lengths)
    signatures([plain(text) for text in frame["text"]])
    frame = frame.drop_duplicates("text").sort_values("score", ascending=False)
    frame.groupby("language").head(len(frame) // 20).to_parquet(folder / "pandas.parquet")
    taken = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    return taken | {"rows": rows, "megabytes": size / 1e6, "peak": resident_mb("VmHWM")}


def run_throughput(arguments: argparse.Namespace) -> None:
    """Write a corpus, select from it, and set it beside pandas."""
    folder = Path(tempfile.mkdtemp(prefix="select-", dir=arguments.folder))
    try:
        rows, size = write_corpus(folder, arguments.megabytes)
        output = folder / "out" / "selected.parquet"
        part = json.loads(
            subprocess.run(
                [sys.executable, __file__, "pandas", "--folder", str(folder), "--part", str(arguments.part)],
                check=True, capture_output=True, text=True,
            ).stdout.splitlines()[-1]
        )  # fmt: skip
        (folder / "pandas.parquet").unlink()
        command = [
            *(sys.executable, "main.py", "select", "--input", str(folder / "*.parquet"), "--output", str(output)),
            *("--budget", "10%", "--group_by", "language", "--tokenizer", str(TOKENIZER)),
            *("--num_proc", str(arguments.num_proc), "--report", str(folder / "out" / "report")),
        ]
        seconds, cpu, peak = watched(command)
        chosen = pq.read_metadata(output).num_rows
    finally:
        shutil.rmtree(folder)
    ours = {"rows": rows, "megabytes": size / 1e6, "seconds": seconds, "cpu": cpu, "peak": peak}
    lines = [
        [name, *(f"{one[key]:,.0f}" for key in ("megabytes", "rows", "seconds", "cpu")),
         *(f"{one['rows'] / one['seconds']:,.0f}", one["megabytes"] / one["seconds"], f"{one['peak']:,.0f}")]
        for name, one in (("select", ours), ("pandas in memory", part))
    ]  # fmt: skip
    head = ("", "MB of text", "rows", "seconds", "of CPU", "rows/s", "MB/s", "peak MB")
    text = f"{chosen:,} of {rows:,} rows chosen, {arguments.num_proc} processes.\n\n{table(head, lines)}"
    found = {"select": ours, "pandas": part, "chosen": chosen, "num_proc": arguments.num_proc}
    report("select_throughput", text, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("salted", "throughput", "pandas"))
    parser.add_argument("--salt", type=float, default=0.2, help="share of the rows that is salt")
    parser.add_argument("--megabytes", type=float, default=2000)
    parser.add_argument("--part", type=float, default=100, help="megabytes for pandas")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--folder", default=None, help="where the corpus is written; the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.what == "salted":
        run_salted(arguments)
    elif arguments.what == "throughput":
        run_throughput(arguments)
    else:
        print(json.dumps(in_pandas(Path(arguments.folder), arguments.part)))


if __name__ == "__main__":
    main()
