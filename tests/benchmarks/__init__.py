"""What the service costs: `python -m tests.benchmarks.gateway` and `python -m tests.benchmarks.feedback` (docs/benchmarks.md)."""
