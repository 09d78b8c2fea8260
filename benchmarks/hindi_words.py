"""Tokens per word of Hindi in Qwen3's tokenizer, and with new pieces that `tokens` has learned.

    python benchmarks/hindi_words.py [--pieces 263 2000] [--no_balance]

Learned from: half of the sentences of a newspaper, told from the other half by a hash, and rows with passages of an
encyclopaedia. Counted: the other half, and questions of farmers, of which nothing is learned from. 263 pieces are what
fits the free rows of Qwen3's embedding beside our four markers. The texts are read from the folder named by
AGRI_MOE_DATA.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ablation_table import markdown
from measure import DATA, processor

from agri_moe.data.chat import Chat
from agri_moe.tools.tokens import REPORT_FILE, tokens

SOURCE = DATA / "qwen3-0.6b"
LIMITS = {("news", 263): 2.65, ("news", 2000): 1.80, ("farmers", 263): 2.75, ("farmers", 2000): 1.95}


def halves(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Distinct lines, told apart by a hash of each."""
    found: tuple[list[str], list[str]] = ([], [])
    for line in dict.fromkeys(lines):
        found[hashlib.sha256(line.encode()).digest()[0] >= 128].append(line)
    return found


def per_word(chat: Chat, lines: Sequence[str]) -> float:
    """Tokens per run of characters without space."""
    return sum(len(chat.encode_text(line)) for line in lines) / sum(len(line.split()) for line in lines)


def run() -> None:
    """Learn, count, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, nargs="+", default=[263, 2000])
    parser.add_argument("--no_balance", action="store_true", help="let every byte of the inputs count alike")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"error: {DATA} does not exist; set AGRI_MOE_DATA to the folder with the real text.")
    learned, news = halves((DATA / "hindi_text.txt").read_text("utf-8").splitlines())
    farmers = [line for line in (DATA / "farmer_questions_hi.txt").read_text("utf-8").splitlines() if line.strip()]
    counted = {"news": news, "farmers": farmers}
    chats = {0: Chat.load(str(SOURCE))}
    seconds, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        texts = {name: Path(folder, f"{name}.txt") for name in ("learned", "counted")}
        texts["learned"].write_text("\n".join(learned), "utf-8")
        texts["counted"].write_text("\n".join(news), "utf-8")
        given = [str(texts["learned"]), str(DATA / "hindi_qa_train.parquet")]
        for pieces in args.pieces:
            output, held_out = str(Path(folder, str(pieces))), str(texts["counted"])
            tokens(str(SOURCE), given, pieces, output, validation=held_out, balance=not args.no_balance)
            seconds[pieces] = json.loads(Path(output, REPORT_FILE).read_text("utf-8"))["learned"]["seconds"]
            chats[pieces] = Chat.load(output)
    found = {(name, pieces): per_word(chat, lines) for pieces, chat in chats.items() for name, lines in counted.items()}
    head = ("tokens per word", "Qwen3", *(f"{pieces:,} pieces" for pieces in args.pieces))
    rows = [
        [f"{name}, {len(lines):,} lines", *(f"{found[name, pieces]:.3f}" for pieces in chats)]
        for name, lines in counted.items()
    ]
    print(
        f"\n{processor()}; learned in {', '.join(f'{s:.1f} s' for s in seconds.values())}.\n\n{markdown(head, rows)}\n"
    )
    for (name, pieces), limit in LIMITS.items():
        if (name, pieces) in found:
            passed = found[name, pieces] <= limit
            print(
                f"{'pass' if passed else 'FAIL'}: {name}, {pieces:,} pieces: {found[name, pieces]:.3f}, at most {limit}"
            )
            failed += [] if passed else [name]
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run()
