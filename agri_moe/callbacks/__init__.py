"""What watches a run: routers, CKA, samples, throughput, checkpoints. One concern a file."""
