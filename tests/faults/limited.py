"""Starts a program on a disk that may be full: `python -m tests.faults.limited FILE PROGRAM ARGUMENT...`.

Where FILE exists, it says how many bytes any file of the program may have; a write past that fails as on a full disk, with an error and
not a signal. Needs no privileges.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import psutil


def run(limit: Path, *argv: str) -> None:
    """Becomes the program."""
    # Inherited by what is executed; else the kernel would kill it.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit.exists():
        soft = int(limit.read_text())
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    os.execv(argv[0], argv)


def limit_running(pid: int, most_bytes: int | None) -> None:
    """The same for one that runs; None lifts it."""
    process = psutil.Process(pid)
    hard = process.rlimit(psutil.RLIMIT_FSIZE)[1]
    process.rlimit(psutil.RLIMIT_FSIZE, (hard if most_bytes is None else most_bytes, hard))


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
