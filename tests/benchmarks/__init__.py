"""Speed and memory, measured: `python -m tests.benchmarks`. What it writes stands in docs/benchmarks.rst."""
