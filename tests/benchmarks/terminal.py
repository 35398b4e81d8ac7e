"""Where benchmarks tell how they go."""

import sys

from rich.console import Console

WIDTH = 140


def terminal() -> Console:
    """Standard error. In a file or a pipe rich would take a line to have 80 characters, and cut the tables."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)
