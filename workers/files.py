"""Publishing files: written aside, flushed, then renamed."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

# What is not whole yet, or about to go, begins with this: no version's name does. It lies where it is published, because a rename must stay
# in one file system.
ASIDE = ".aside-"
# No job runs this long (`job_limit_seconds` is at most hours), so what is older belongs to a process that was killed.
ORPHAN_SECONDS = 86400.0


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_orphans(folder: Path, *patterns: str, now: float) -> None:
    """Remove files and folders of these glob patterns that are older than `ORPHAN_SECONDS`.

    Args:
        now: seconds since the epoch.
    """
    for path in (found for pattern in patterns for found in folder.glob(pattern)):
        # Another process may just be removing it.
        with suppress(FileNotFoundError):
            if now - path.stat().st_mtime > ORPHAN_SECONDS:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
