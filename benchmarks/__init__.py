"""The benchmark suite: `python -m benchmarks` (or `make bench`) measures and writes the report."""
