"""Verified copies of adapter versions on this machine, as many as fit; the least recently used make room.

vLLM reads an adapter's files again whenever it needs room for others in between, and dies if they are gone by then. So it is given a copy
that goes only after it let go of it, and the store may lose the version at any time. A copy is held by a shared lock (flock) on its
folder, and removed under an exclusive one, so that processes may have one folder of copies together.
"""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service.domain.slow_weights import NAME
from workers.adapter_store.versions import AdapterRefused, verify
from workers.files import ASIDE, remove_orphans

GIB = 1 << 30
# Removing a copy takes moments, so whoever meets one that is being removed looks again.
TURNS = 100
TURN_SECONDS = 0.02

Fetch = Callable[[str, Path], bool]
"""Writes a version's files into an empty folder; False where there is no such version.

Raises:
    AdapterRefused: they are not what was published.
    OSError: they can't be read or written.
"""


class Copy:
    """A copy that nobody on this machine removes until it is released."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)


class Copies:
    """The copies in one folder.

    Args:
        folder: on a disk of this machine.
        most_bytes: of all copies together; what is held may take more.
        base_model: the served base model's name.
    """

    def __init__(self, folder: Path, *, most_bytes: int, base_model: str) -> None:
        self.folder = folder
        self._most_bytes = most_bytes
        self._base_model = base_model

    def take(self, name: str, fetch: Fetch) -> Copy | None:
        """A verified copy of version `name`, held, made now if there is none; None if there is no such version.

        Blocks on disk and network: call it off the event loop.

        Raises:
            AdapterRefused: the files fail a check, or can't be had.
        """
        if not NAME.fullmatch(name):
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._found(name) or self._made(name, fetch)
        except OSError as error:
            raise AdapterRefused(f"it can't be copied to {self.folder}: {error}.") from error

    def used(self, name: str) -> None:
        """A copy is needed right now, so others go before it."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / name)

    def surplus(self) -> list[str]:
        """The copies that have to go for the others to fit, the least recently used first; and what killed processes left goes at once."""
        remove_orphans(self.folder, f"{ASIDE}*", now=time.time())
        sizes: dict[str, tuple[float, int]] = {}
        for path in self.folder.glob("fs-*"):
            # Another process may just be removing it.
            with suppress(FileNotFoundError):
                sizes[path.name] = path.stat().st_mtime, _bytes_in(path)
        over, found = sum(size for _, size in sizes.values()) - self._most_bytes, []
        for name, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
            if over <= 0:
                break
            found.append(name)
            over -= size
        return found

    def remove(self, name: str) -> bool:
        """Remove a copy; False while anybody holds it. Removing what is not there is fine."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(self.folder / name, descriptor):
                doomed = tempfile.mkdtemp(prefix=ASIDE, dir=self.folder)
                os.rename(self.folder / name, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _found(self, name: str) -> Copy | None:
        copy = self._hold(name)
        if copy is None:
            return None
        try:
            verify(copy.folder, name=name, base_model=self._base_model)
        except AdapterRefused:
            # A copy that a disk spoilt is no reason to refuse the original.
            copy.release()
            self.remove(name)
            return None
        self.used(name)
        return copy

    def _hold(self, name: str) -> Copy | None:
        """An existing copy, unverified; None where there is none, or it is just being removed."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is(self.folder / name, descriptor):
                return Copy(self.folder / name, descriptor)
        os.close(descriptor)
        return None

    def _made(self, name: str, fetch: Fetch) -> Copy | None:
        """Fetch into a temporary folder, verify, and put in place by one rename."""
        temporary = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{name}-", dir=self.folder))
        try:
            if not fetch(name, temporary):
                return None
            verify(temporary, name=name, base_model=self._base_model)
            if (size := _bytes_in(temporary)) > self._most_bytes:
                raise AdapterRefused(f"its {size / GIB:.2f} GiB are more than FASTSLOW_ADAPTER_CACHE_GIB.")
            return self._placed(temporary, name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _placed(self, temporary: Path, name: str) -> Copy:
        """A verified folder under its name; where another process was faster, that one's copy, which may be gone again by now."""
        for _ in range(TURNS):
            # Held before it has its name, so that nobody finds it free.
            descriptor = os.open(temporary, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            try:
                os.rename(temporary, self.folder / name)
                return Copy(self.folder / name, descriptor)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if copy := self._found(name):
                return copy
            time.sleep(TURN_SECONDS)
        raise AdapterRefused(f"its copy in {self.folder} is being removed.")


def _is(path: Path, descriptor: int) -> bool:
    """Whether a folder still has the name under which it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
