"""docs/results.md and the README's small table, written from benchmarks/results."""
