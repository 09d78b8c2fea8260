"""Chat rows and plain text as packed batches of token ids."""
