"""Archives the oldest events of long logs: written to files, read back, and only then replaced by their fold. Runs on the control queue.

A log that is over twice `log_keep_events` long loses its oldest `log_keep_events` at a time, so a file's first and last revision follow
from the log alone: a worker that dies between the file and the log leaves a file that the next one writes again, the same.

Trimming does not wait for a consolidation. What none has seen is trained on while it is among the newest `log_keep_events`, many times what
one takes; its effect on the fast weights is in the snapshot, and the event itself in the archive.
"""

import gzip
import itertools
import logging
import os
import re
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.domain.events import Event, parse_event
from service.domain.fast_weights import FOLD, FastWeights, Snapshot
from service.domain.fold import apply, fold
from service.settings import Settings
from service.store import Store
from service.store.keys import UserKeys
from workers.files import fsync
from workers.undone import sparing_others

log = logging.getLogger(__name__)

# Of one tick, each some tenths of a second; the rest waits for the next.
MOST_PARTS = 64
FILE = re.compile(r"(\d+)-(\d+)\.jsonl\.gz")


async def archive_logs(store: Store, settings: Settings, *, now: float, most_parts: int = MOST_PARTS) -> int:
    """Shorten the logs that are too long, the longest due first; how many parts of them were archived.

    What is wrong with one log is told and counted. It is tried again after all that are due now, so that no number of such logs keeps the
    others long.

    Raises:
        StoreUnavailable: Redis is away.
    """
    parts = 0
    for tenant, user in await store.archives.due(most=most_parts):
        done = False
        told = "the log of %s of %s stays long, for its oldest events can't be archived"
        async with sparing_others(store, "archive", told, user, tenant):
            parts += await archive_user(store, settings, tenant=tenant, user=user, most_parts=most_parts - parts)
            done = True
        if not done:
            await store.archives.postpone(tenant=tenant, user=user, now=now)
    return parts


async def archive_user(store: Store, settings: Settings, *, tenant: str, user: str, most_parts: int) -> int:
    """Bring one user's snapshot under today's rules of folding, and the log to its length; how many parts were archived.

    Raises:
        OSError: the archive can't be written to.
        ValueError: what was written to it can't be read back, or the log has a gap.
    """
    folder = settings.archive / UserKeys(tenant=tenant, user=user).folder
    snapshot = await store.archives.snapshot(tenant=tenant, user=user) or Snapshot(state=FastWeights())
    if snapshot.fold != FOLD and (state := refold(folder, snapshot.state)):
        first, snapshot = state.revision + 1, Snapshot(state=state)
        await store.archives.replace(snapshot, first=first, stale=True, tenant=tenant, user=user)
    for done in range(most_parts):
        if await store.archives.length(tenant=tenant, user=user) <= settings.log_most_events:
            await store.archives.settle(tenant=tenant, user=user)
            return done
        first, keep = snapshot.state.revision + 1, settings.log_keep_events
        events = store.archives.oldest(keep, tenant=tenant, user=user)
        state = await _archive(folder, events, snapshot.state, last=first + keep - 1)
        snapshot = snapshot.model_copy(update={"state": state})
        if not await store.archives.replace(snapshot, first=first, stale=False, tenant=tenant, user=user):
            # Another worker is at it.
            return done
    return most_parts


async def _archive(folder: Path, events: AsyncIterator[bytes], start: FastWeights, *, last: int) -> FastWeights:
    """Write the events from `start` up to revision `last` to their file; the fold up to there."""
    state = start
    with published(folder / f"{start.revision + 1}-{last}.jsonl.gz") as add:
        async for event in events:
            add(event)
            state = apply(state, parse_event(event))
        if state.revision != last:
            raise ValueError(f"the log has events up to {state.revision}, not {last}")
    return state


@contextmanager
def published(file: Path) -> Iterator[Callable[[bytes], None]]:
    """Takes events, one a line; the file is in place once the body has ended well, and it was read back.

    Raises:
        OSError: the folder can't be written to.
        ValueError: what was written can't be read back.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".aside-", dir=file.parent)
    aside, checksum = Path(name), 0

    def add(event: bytes) -> None:
        nonlocal checksum
        checksum = zlib.crc32(event, checksum)
        lines.write(event + b"\n")

    try:
        # Neither a name nor the time in it: the same events make the same bytes.
        with os.fdopen(descriptor, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as lines:
            yield add
        fsync(aside)
        if checksum_of(aside) != checksum:
            raise ValueError(f"{aside} is not what was written")
        aside.rename(file)
        fsync(file.parent)
    finally:
        aside.unlink(missing_ok=True)


def refold(folder: Path, snapshot: FastWeights) -> FastWeights | None:
    """A snapshot anew from the events that it was folded from; None, and said, where the archive hasn't got them."""
    try:
        state = fold(itertools.takewhile(lambda event: event.revision <= snapshot.revision, archived(folder)))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        log.error("a snapshot of older rules stays, for its archive can't be read: %s", error)
        return None
    if state.revision != snapshot.revision:
        log.error("a snapshot of older rules stays: the archive ends at %d, not %d", state.revision, snapshot.revision)
        return None
    return state


def archived(folder: Path) -> Iterator[Event]:
    """A user's archived events, oldest first. Files overlap where the setting was changed; the fold knows an event that it has had."""
    found = [(match, path) for path in folder.iterdir() if (match := FILE.fullmatch(path.name))]
    for _, path in sorted(found, key=lambda entry: (int(entry[0][1]), int(entry[0][2]))):
        with gzip.open(path, "rb") as file:
            yield from map(parse_event, file)


def checksum_of(path: Path) -> int:
    """Of a file's events.

    Raises:
        ValueError: the file is cut off or spoilt.
    """
    checksum = 0
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                checksum = zlib.crc32(line.removesuffix(b"\n"), checksum)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from error
    return checksum
