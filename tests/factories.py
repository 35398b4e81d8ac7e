"""Domain objects for tests, with only what a test says different from the ordinary."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from service.domain.feedback import FeedbackEvent, Interaction, Message, Signals, VersionTuple
from service.domain.fold import apply
from service.domain.slow_weights import (
    AdapterVersion,
    Divergence,
    Margins,
    Promote,
    Reject,
    Scope,
    TrainReport,
    version_name,
)
from service.errors import JobFailed
from service.store import Store
from tests.fakes import MODEL
from workers.consolidation.work import Consolidate, Ends, LeaseLost, OnProgress, Outcome, Work
from workers.quarantine import HashedBase

LOADED_BASE = HashedBase(MODEL, "0" * 64)
"""What `outcome_of`'s versions are trained on."""


def divergence(*, upper: float = 0.01, worst: float = 0.05, budget: float = 0.02) -> Divergence:
    return Divergence(
        mean_nats=upper / 2, upper95_nats=upper, worst_nats=worst, anchors=48, tokens=1000, budget_nats=budget
    )


def train_report(
    *,
    text: Divergence | None = None,
    margins: Margins | None = None,
    scale: float = 1.0,
    absorbed: tuple[str, ...] = (),
) -> TrainReport:
    return TrainReport(
        train_examples=12,
        heldout_examples=4,
        steps=40,
        first_loss=1.0,
        last_loss=0.1,
        scale=scale,
        kl_text=text or divergence(),
        kl_chat=divergence(budget=0.1),
        margins=margins or Margins(base=0.1, current=0.2, candidate=0.5),
        absorbed=absorbed,
        seconds=1.0,
        device="cpu",
    )


def outcome_of(work: Work, *, content: str = "ab", absorbed: tuple[str, ...] = ()) -> Outcome:
    """What a consolidation that went well hands back; `content` stands for the weights."""
    sha256 = (content * 32)[:64]
    report = train_report(absorbed=absorbed)
    version = AdapterVersion(
        name=version_name(work.scope, tenant=work.tenant, number=work.number, content_sha256=sha256),
        tenant=work.tenant,
        scope=str(work.scope),
        number=work.number,
        parent=work.parent,
        base_model=LOADED_BASE.name,
        base_sha256=LOADED_BASE.sha256,
        content_sha256=sha256,
        created=work.created,
        job=work.job,
        watermark={user: log.head for user, log in work.users.items()},
        report=report,
    )
    return Outcome(decision=Promote(), report=report, version=version)


def one_by_one(train: Callable[[Work, OnProgress], Outcome]) -> Consolidate:
    """A consolidation that does each work by itself; what `train` raises of the kinds that end a job ends that one alone."""

    def consolidate(works: Sequence[Work], progress: OnProgress) -> Ends:
        ends: Ends = {}
        for work in works:
            try:
                ends[work.job] = train(work, progress)
            except (JobFailed, LeaseLost) as error:
                ends[work.job] = error
        return ends

    return consolidate


def rejected(*reasons: str) -> Outcome:
    return Outcome(decision=Reject(reasons=reasons), report=train_report())


async def give_feedback(store: Store, n: int, *, user: str = "alice", tenant: str = "acme") -> None:
    """Append the `n`-th feedback of a user's log, a comment on an interaction of its own, as the API would."""
    interaction = Interaction(
        id=f"chatcmpl-{user}-{n}",
        tenant=tenant,
        user=user,
        created=0.0,
        messages=(Message(role="user", content=f"question {n}"),),
        reply=f"reply {n}",
        version=VersionTuple(model=MODEL),
    )
    await store.users.record(interaction, retention_seconds=1000)
    signals = Signals(comment=f"rule {n}", correction=f"wanted {n}")
    event = FeedbackEvent(revision=n, at=float(n), interaction=replace(interaction, signals=signals))
    state = await store.users.fast_weights(tenant=tenant, user=user)
    await store.users.append(event, apply(state, event), tenant=tenant, user=user, optimize_at=float(n))


ALICE = Scope(kind="user", name="alice")
