"""What a consolidation is given and what it hands back. Imports no torch, so that the queue's side can build and read it.

One process trains the adapters of several scopes side by side, so it takes several works and hands back an end for each.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Self

from service.domain.events import Event
from service.domain.fast_weights import FastWeights
from service.domain.feedback import BASE, FeedbackEvent, Frozen, Interaction, latest_interactions
from service.domain.norms import Norm
from service.domain.slow_weights import AdapterVersion, Promote, Reject, Scope, TrainReport
from service.errors import FastslowError

Stage = Literal["data", "anchors", "train", "measure", "judge", "publish"]


class UserLog(Frozen):
    """What one user's log brings into a consolidation."""

    interactions: tuple[Interaction, ...]
    """With the signals that stand now, oldest feedback first (`latest_interactions`)."""
    revisions: dict[str, int]
    """Interaction id -> revision of its latest event; what is past the watermark is new, the rest is replay."""
    head: int
    """The log's last revision: the new version's watermark for this user."""
    watermark: int = 0
    """Revision up to which the version in use has consolidated; 0 without one."""
    fast_weights: FastWeights = FastWeights()
    """The fold of the log at `head`."""
    absorbed: frozenset[str] = frozenset()
    """Items that the version which serves this user makes unnecessary, so that they are not rendered now."""

    @classmethod
    def of(
        cls,
        events: Iterable[Event],
        *,
        watermark: int,
        fast_weights: FastWeights,
        absorbed: frozenset[str] = frozenset(),
    ) -> Self:
        """From a user's events in the order of the log."""
        events = list(events)
        return cls(
            interactions=tuple(latest_interactions(events)),
            revisions={e.interaction.id: e.revision for e in events if isinstance(e, FeedbackEvent)},
            head=max((event.revision for event in events), default=watermark),
            watermark=watermark,
            fast_weights=fast_weights,
            absorbed=absorbed,
        )


class Work(Frozen):
    """One scope's consolidation. The same work gives the same version, name and all, so a job that is done twice ends with one."""

    tenant: str
    scope: Scope
    job: str
    number: int
    """The new version's number, or a later one where another job's version has its name."""
    parent: str = BASE
    """Name of the version in use, whose folder lies in the adapter store; `base` if none."""
    pooled: str = BASE
    """Of a user's scope, the version in use of their cohort, else of the whole tenant: what serves them without one of their own, and
    what their first one starts from. `base` if there is none, and for other scopes."""
    kl_text_budget_nats: float | None = None
    """Of this scope, where an admin has set one; else the settings' apply."""
    kl_chat_budget_nats: float | None = None
    norms: tuple[Norm, ...] = ()
    """What every reply to the scope's users should hold."""
    created: float
    """Seconds since the epoch; becomes the version's `created`."""
    users: dict[str, UserLog]
    """By user id: one user for a user's scope, all members for a cohort's or the global one."""


class Progress(Frozen):
    """Where a consolidation is. `step` and `steps` count inside the stage; loss, KL and beta are there while it trains."""

    stage: Stage
    step: int = 0
    steps: int = 0
    loss: float | None = None
    kl_text: float | None = None
    """Smoothed over the last steps, nats per token on anchors that steer."""
    kl_chat: float | None = None
    beta: float | None = None
    """The larger of the two KL coefficients."""


class LeaseLost(Exception):
    """Another worker has taken a job over, or Redis was away for longer than the lease: this one must write nothing more of it."""


class NotNow(FastslowError):
    """What a job's end needs is away: vLLM, or the adapter store. It stays open, and its next worker ends it."""


OnProgress = Callable[[str, Progress], None]
"""Called with a job's id at each step of that job.

Raises:
    LeaseLost, JobFailed: this job must not go on; the others of the same process do.
"""


class Outcome(Frozen):
    """How a consolidation ended. A rejected candidate is not published: `version` is None, the report says what was measured."""

    decision: Promote | Reject
    report: TrainReport
    version: AdapterVersion | None = None

    @property
    def absorbed(self) -> tuple[str, ...]:
        """Ids of the context items that the new version makes unnecessary."""
        return self.report.absorbed


Ends = dict[str, Outcome | FastslowError | LeaseLost]
"""How each job of a process ended, by its id."""
Consolidate = Callable[[Sequence[Work], OnProgress], Ends]
"""Consolidates scopes side by side. A job that fails does not take the others along."""
