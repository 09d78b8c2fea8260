"""`corpus`: write the embedded Hindi crop-advisory corpus and its tokenizer to a folder."""

from __future__ import annotations

from pathlib import Path


def corpus(
    output: str,
    train_rows: int = 6000,
    validation_rows: int = 240,
    seed: int = 0,
    vocab_size: int = 2048,
    overwrite: bool = False,
) -> None:
    """Write the embedded Hindi crop-advisory corpus (demonstration data, not advice) and its tokenizer.

    Example: `python main.py corpus --output DIR`

    Args:
        output: New folder for train.parquet, validation.parquet, tokenizer/ and README.md.
        train_rows: Number of training rows.
        validation_rows: Number of held-out rows.
        seed: Seed of the grammar; the same seed gives the same rows.
        vocab_size: Size of the tokenizer's vocabulary, the 256 bytes and <|endoftext|> included.
        overwrite: Replace the output folder if it is an earlier corpus.
    """
    import pyarrow.parquet as pq

    from agri_moe.data import synthetic
    from agri_moe.data.chat import Chat, render_scenario

    folder = Path(output)
    synthetic.write_corpus(
        folder,
        train_rows=train_rows,
        validation_rows=validation_rows,
        seed=seed,
        vocab_size=vocab_size,
        overwrite=overwrite,
    )
    train = pq.read_table(folder / "train.parquet").to_pylist()
    validation = pq.read_table(folder / "validation.parquet").to_pylist()
    chat = Chat.load(str(folder / "tokenizer"))
    lengths = sorted(len(chat.encode(row).input_ids) for row in train)
    two_fields = sum(row["needs_two_fields"] for row in validation) / len(validation)

    print(f"Wrote {folder}: {len(train):,} training rows, {len(validation):,} validation rows.")
    print(
        f"  {len(synthetic.CROPS)} crops, {len(synthetic.PROBLEMS)} problems of a crop "
        f"({len(synthetic.DIAGNOSES)} names), {len(synthetic.all_actions())} actions"
    )
    print(f"  {two_fields:.0%} of the validation rows need another field besides crop and symptom")
    print(
        f"  tokens per row: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; "
        f"vocabulary {len(chat.tokenizer):,} with the chat markers"
    )
    for name, row in (("training", train[0]), ("validation", validation[0])):
        print(f"\n--- a {name} row ---")
        print(render_scenario(row["scenario"]))
        print(f"[thought]  {row['thought']}\n[advisory] {row['advisory']}")
    print(f"\n{synthetic.NOTICE}")
