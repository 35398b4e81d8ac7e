"""Consolidation jobs in tests: real in all but the training, which is a small function."""

import itertools
import threading
from collections.abc import Callable, Sequence

from service.domain.slow_weights import Scope
from service.settings import Settings
from service.store import Store
from service.store.jobs import Job
from service.vllm import VllmEngine
from tests.factories import ALICE, LOADED_BASE, one_by_one, outcome_of
from tests.fakes import FakeVllm
from workers.consolidation.work import Consolidate, Ends, OnProgress, Outcome, Progress, Work
from workers.quarantine import LoadedBase
from workers.runner import run_jobs

unique = itertools.count(1)


class Trainer:
    """Stands for the training: what it makes of each work is given, vLLM then knows the version."""

    def __init__(self, vllm: FakeVllm, make: Callable[[Work], Outcome] = outcome_of) -> None:
        self.works: list[Work] = []
        self._vllm = vllm
        self._make = make

    def __call__(self, works: Sequence[Work], progress: OnProgress) -> Ends:
        return one_by_one(self.train)(works, progress)

    def train(self, work: Work, progress: OnProgress) -> Outcome:
        """One work."""
        self.works.append(work)
        progress(work.job, Progress(stage="train", step=3, steps=40, loss=0.5, kl_text=0.01, kl_chat=0.02, beta=0.7))
        outcome = self._make(work)
        if outcome.version is not None:
            self._vllm.adapters.add(outcome.version.name)
        return outcome


class SlowTrainer(Trainer):
    """Starts, then waits until the test lets it go on."""

    def __init__(self, vllm: FakeVllm, make: Callable[[Work], Outcome] = outcome_of) -> None:
        super().__init__(vllm, make)
        self.started, self.go_on = threading.Event(), threading.Event()

    def __call__(self, works: Sequence[Work], progress: OnProgress) -> Ends:
        self.started.set()
        assert self.go_on.wait(20)
        return super().__call__(works, progress)


def user(name: str) -> Scope:
    return Scope(kind="user", name=name)


async def opened(store: Store, scope: Scope = ALICE) -> Job:
    job, new = await store.jobs.open(scope, tenant="acme", unique=f"job{next(unique)}", now=100.0)
    assert new
    return job


async def run_all(
    jobs: Sequence[Job],
    store: Store,
    settings: Settings,
    consolidate: Consolidate,
    base: Callable[[], LoadedBase] = lambda: LOADED_BASE,
    forget: Callable[[str], None] = lambda job: None,
) -> list[Job]:
    """Do the jobs side by side; their records afterwards."""
    engine = VllmEngine(settings)
    try:
        ids = [job.id for job in jobs]
        await run_jobs(
            ids, store=store, engine=engine, settings=settings, consolidate=consolidate, base=base, forget=forget
        )
    finally:
        await engine.close()
    return [await store.jobs.get(job.id, tenant="acme") for job in jobs]


async def run(job: Job, store: Store, settings: Settings, consolidate: Consolidate) -> Job:
    """Do one job; its record afterwards."""
    [ended] = await run_all([job], store, settings, consolidate)
    return ended


async def active(store: Store, scope: Scope = ALICE) -> str:
    return (await store.scopes.state(scope, tenant="acme")).active
