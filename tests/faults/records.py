"""What clients saw, and from when on all was well again. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["chat", "stream", "feedback"]
KINDS: tuple[Kind, ...] = ("chat", "stream", "feedback")


@dataclass(frozen=True)
class Request:
    """One request with all its retries, as whoever made it sees it. Times are of one monotonic clock, in seconds."""

    kind: Kind
    began: float
    ended: float
    error: str = ""
    """Why it failed for good; empty where it went well."""


@dataclass
class Records:
    """All of one trial."""

    requests: list[Request] = field(default_factory=list)
    attempts: list[tuple[float, str]] = field(default_factory=list)
    """When an attempt failed, and how; most were tried again."""
    degraded: Counter[str] = field(default_factory=Counter)
    """Chats that said that they were served with less than was due, by reason."""
    behind: list[str] = field(default_factory=list)
    """Chats that said nothing of the kind and lacked feedback that had been acknowledged before."""
    crossed: list[str] = field(default_factory=list)
    personal: int = 0
    """Replies whose context had the user's own secret."""

    def errors(self) -> Counter[str]:
        """What failed for good, by what it was and how."""
        return Counter(f"{request.kind}: {request.error}" for request in self.requests if request.error)

    def answered(self) -> int:
        return sum(not request.error for request in self.requests)


def clean_from(records: Records, *, since: float, until: float, seconds: float = 1.0) -> float | None:
    """When the first clean stretch after `since` began; None where there was none before `until`.

    A stretch of `seconds` is clean when in it no attempt failed, at least one request of each kind went well, and none was under way
    from before its begin to past its end.
    """
    failed = [at for at, _ in records.attempts] + [r.ended for r in records.requests if r.error]
    starts = [since, *sorted(at for at in {*failed, *(r.ended for r in records.requests)} if at > since)]
    return next((at for at in starts if at + seconds <= until and _clean(records.requests, failed, at, seconds)), None)


def _clean(requests: Sequence[Request], failed: Sequence[float], at: float, seconds: float) -> bool:
    end = at + seconds
    # Half open at its begin: a stretch may start at the very end of what failed.
    if any(at < moment <= end for moment in failed):
        return False
    if any(r.began < at and r.ended > end for r in requests):
        return False
    return {r.kind for r in requests if at < r.ended <= end and not r.error} == set(KINDS)
