"""`tokens`: a tokenizer with new pieces for a language, learned as merges of the pieces that it has."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from agri_moe.data.chat import Chat
    from agri_moe.data.extended_tokenizer import Extension, Usage
    from agri_moe.data.learning_texts import LearningTexts
    from agri_moe.data.merges import MergeLearner

# The annotations below are quoted, not postponed: the command line's parser would import what they name for `--help`.
REPORT_FILE = "tokens_report.json"
_SHOWN = 10  # most used new pieces that are printed; the report has _LISTED
_LISTED = 100


def tokens(
    source: str,
    input: list[str],
    pieces: int,
    output: str,
    script: str = "Devanagari",
    held_out: float = 0.1,
    validation: str | list[str] | None = None,
    text_column: str | None = None,
    balance: bool = True,
    whole_aksharas: bool = False,
    overwrite: bool = False,
) -> None:
    """Give a tokenizer new pieces, so that text of a language takes fewer tokens.

    Every new piece is a merge of pieces that the tokenizer has, and stands in pieces.json with what it is made of. Text
    in Latin letters stays as it is, token for token, and so does the id of every old token. The report counts text that
    was not learned from.

    Example: python main.py tokens --source Qwen/Qwen3-0.6B --input rows.parquet --pieces 263 --output hindi_tokens

    Args:
        source: Folder or hub name of a byte-level BPE tokenizer, such as Qwen's.
        input: Text with a document a line, or rows as training takes them; may be given more than once.
        pieces: How many new pieces to learn.
        output: Folder to write.
        script: Script of the language, as Unicode names it; new pieces consist of its letters and marks alone.
        held_out: Share of the lines that are not learned from, chosen by a hash of the line, for the report.
        validation: Other text for the report instead; what stands there too is not learned from.
        text_column: Column with the text; without it scenario, thought, advisory, system and text, where they are.
        balance: Let each input count as much as the largest, however little text it has.
        whole_aksharas: Refuse pieces that begin with a dependent sign; costs most of the gain with Qwen's tokenizer.
        overwrite: Replace an output that an earlier run of this command wrote.
    """
    from pathlib import Path

    from agri_moe.data.chat import Chat
    from agri_moe.data.extended_tokenizer import Extension
    from agri_moe.data.learning_texts import read_texts
    from agri_moe.data.merges import MergeLearner, piece_rule

    if pieces < 1:
        raise ValueError(f"--pieces is {pieces}: it must be at least 1.")
    if not 0 <= held_out < 1 or (held_out == 0 and not validation):
        raise ValueError(f"--held_out is {held_out:g}: it must be above 0 and below 1, or 0 with --validation.")
    if script.upper() in ("LATIN", "COMMON"):
        raise ValueError(f"--script is {script}: text in Latin letters is left as it is; name another script.")
    folder = _new_folder(Path(output), overwrite)  # refuses at once, makes nothing yet
    texts = read_texts(input, validation, held_out, text_column, balance)
    texts.check_script(script)
    chat = Chat.load(source)
    if chat.merged:
        raise ValueError(f"--source {source} has new pieces already: name the tokenizer that it was made from.")
    extension = Extension(chat)
    rule = piece_rule(script, whole_aksharas)
    learner = MergeLearner(extension.words(texts.learn), extension.piece_bytes, extension.first_id, rule)
    seconds = _learn(learner, pieces)
    with folder as building:
        written = _save(extension, learner, building)
        report = {"source": source, "script": script, "pieces": pieces, "first_id": extension.first_id}
        report |= {"learned": {**texts.told(), "seconds": round(seconds, 1)}, "matrix": _matrix(source, report)}
        report |= _measured(extension, learner, written, texts)
        _write_report(report, building)
    print("\n".join(_said(report)))
    print(f"Wrote {output}. Report: {Path(output) / REPORT_FILE}")


def _learn(learner: "MergeLearner", pieces: int) -> float:
    """Learns that many pieces; how many seconds it took."""
    import time

    from tqdm import tqdm

    began = time.perf_counter()
    for _ in tqdm(learner.learn(pieces), desc="learn pieces", total=pieces, unit="piece"):
        pass
    found = len(learner.pieces)
    if found < pieces:
        most = f"ask for at most {found:,}, or give more text" if found else "give more text"
        raise ValueError(
            f"--pieces is {pieces:,}, but only {found:,} can be learned from pairs of pieces that this text has twice: "
            f"{most}."
        )
    return time.perf_counter() - began


# ---- the folder


def _new_folder(output: "Path", overwrite: bool) -> "AbstractContextManager[Path]":
    """A folder to be filled, which gets its name at the end of the block and is removed after an error."""
    import contextlib
    import os
    import shutil

    from agri_moe.data.merges import PIECES_FILE

    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists: give another folder, or --overwrite true to replace it.")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / PIECES_FILE).is_file())):
        raise ValueError(f"--output {output} is no earlier output of this command, so it is not replaced.")

    @contextlib.contextmanager
    def fill() -> "Iterator[Path]":
        """Yield the folder, and give it its name once the block has ended well."""
        building = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
        replaced = building.with_suffix(".replaced")
        building.mkdir(parents=True)
        try:
            yield building
            if output.exists():
                output.rename(replaced)
            building.rename(output)
        finally:
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)

    return fill()


def _save(extension: "Extension", learner: "MergeLearner", folder: "Path") -> "Chat":
    """Writes the new tokenizer with its pieces, and reads it back; ValueError if a token has another id then."""
    import transformers

    from agri_moe.data.chat import Chat

    built = extension.build(learner)
    built.save(folder)
    written = Chat.load(str(folder))
    expected = extension.chat.tokenizer.get_vocab().items() | built.tokenizer.get_vocab().items()
    if written.tokenizer.get_vocab().items() != expected:
        raise ValueError(f"transformers {transformers.__version__} gives other ids to tokens than {folder} says.")
    return written


# ---- the report


def _matrix(source: str, report: dict[str, Any]) -> dict[str, int] | None:
    """How many rows the embedding has and will need; None where the source has no config.json that says so."""
    import json
    from pathlib import Path

    config = Path(source) / "config.json"
    rows = json.loads(config.read_text("utf-8")).get("vocab_size") if config.is_file() else None
    if not isinstance(rows, int):
        return None
    needed = report["first_id"] + report["pieces"]
    after = rows if needed <= rows else -(-needed // 128) * 128
    return {"rows": rows, "free": max(rows - report["first_id"], 0), "rows_after": after, "free_after": after - needed}


def _measured(
    extension: "Extension", learner: "MergeLearner", written: "Chat", texts: "LearningTexts"
) -> dict[str, Any]:
    """What the new tokenizer does to text that was not learned from; ValueError if it changes text in Latin letters."""
    from agri_moe.data.extended_tokenizer import ENGLISH, Usage, first_change, latin_words, unshared

    words = latin_words([*texts.learn, *texts.held_out])
    changed = first_change(extension.chat, written, [ENGLISH, *words, *(f" {word}" for word in words)])
    if changed is not None:
        raise ValueError(f"--source {extension.name}: new pieces would cut {changed!r} otherwise than before.")
    before = Usage.of(extension.chat, extension, texts.held_out, learner.bytes)
    after = Usage.of(written, extension, texts.held_out, learner.bytes)
    alone, boundaries = unshared(before, after)
    return {
        "counted": {"text": texts.counted, "lines": len(texts.held_out), "words": before.words, "bytes": before.size},
        "before": before.numbers(),
        "after": after.numbers(),
        "unshared_boundaries": {"count": alone, "of": boundaries},
        "round_trip": {"exact": after.exact, "of": len(texts.held_out)},
        "unchanged": {"english_and_code_tokens": len(written.encode_text(ENGLISH)), "latin_words": len(words)},
        "most_used": _most_used(after, learner),
        "sentence": _sentence(extension, written, learner, texts.held_out),
    }


def _most_used(after: "Usage", learner: "MergeLearner") -> list[dict[str, Any]]:
    return [
        {
            "id": piece,
            "text": _shown(learner.bytes[piece]),
            "count": after.ids[piece],
            "made_of": [_shown(learner.bytes[old]) for old in learner.pieces[piece]],
        }
        for piece in sorted(learner.pieces, key=lambda piece: (-after.ids[piece], piece))[:_LISTED]
    ]


def _sentence(extension: "Extension", written: "Chat", learner: "MergeLearner", lines: list[str]) -> dict[str, str]:
    """A line that was not learned from, in the pieces before and after, words apart and pieces too."""
    line = next((line for line in lines if 6 <= len(line.split()) <= 14), lines[0])
    line = " ".join(line.split()[:14])

    def pieces(chat: "Chat") -> str:
        return "·".join(_shown(learner.bytes[i]) for i in chat.encode_text(line)).replace("· ", "  ")

    return {"before": pieces(extension.chat), "after": pieces(written)}


def _shown(piece: bytes) -> str:
    """A piece as text; its bytes in hexadecimal where it ends within a character."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{piece.hex(' ')}>"


def _write_report(report: dict[str, Any], folder: "Path") -> None:
    import json

    (folder / REPORT_FILE).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _said(report: dict[str, Any]) -> list[str]:
    """The report as lines for the terminal."""
    learned, counted, matrix = report["learned"], report["counted"], report["matrix"]
    alone, trip, same = report["unshared_boundaries"], report["round_trip"], report["unchanged"]
    last = report["first_id"] + report["pieces"] - 1
    lines = [
        f"Learned {report['pieces']:,} pieces (ids {report['first_id']:,} to {last:,}) in {learned['seconds']:.1f} s, "
        f"from {learned['lines']:,} lines, {learned['bytes'] / 1e6:.2f} MB.",
        *(f"  {one['name']}: {one['bytes'] / 1e6:.2f} MB, counted {one['times']} x" for one in learned["inputs"]),
        f"On {counted['text']}: {counted['lines']:,} lines, {counted['words']:,} words",
        f"  {'':<18}{'before':>10}{'after':>10}",
    ]
    for name, digits in (("tokens_per_word", 3), ("bytes_per_token", 2), ("distinct_ids", 0), ("tokens", 0)):
        old, new = report["before"][name], report["after"][name]
        lines.append(f"  {name.replace('_', ' '):<18}{old:>10,.{digits}f}{new:>10,.{digits}f}")
    lines += [
        f"  boundaries that the source does not share: {alone['count']:,} of {alone['of']:,}",
        f"  round trip exact: {trip['exact']:,} of {trip['of']:,} lines",
        f"unchanged: {same['english_and_code_tokens']:,} tokens of English and code, and "
        f"{same['latin_words']:,} words of the text in Latin letters",
        "Most used new pieces:",
    ]
    for one in report["most_used"][:_SHOWN]:
        lines.append(f"  {one['count']:>6,} x {one['text']!r} = {' + '.join(map(repr, one['made_of']))}")
    lines += [f"before: {report['sentence']['before']}", f"after:  {report['sentence']['after']}"]
    return [*lines, _said_of_rows(matrix, last + 1)]


def _said_of_rows(matrix: dict[str, int] | None, needed: int) -> str:
    if matrix is None:
        return f"The embedding needs {needed:,} rows; how many it has is not known, for the source has no config.json."
    if matrix["rows_after"] == matrix["rows"]:
        return f"They fit the {matrix['free']:,} free rows of the embedding; {matrix['free_after']:,} stay free."
    return f"The embedding grows from {matrix['rows']:,} to {matrix['rows_after']:,} rows."
