"""Checks of replies against norms never pile up, and end with the gateway."""

import asyncio
from collections.abc import Mapping

import pytest
from prometheus_client import generate_latest

from service.domain.norms import Norm
from service.errors import StoreUnavailable
from service.metrics import Metrics
from service.norm_checks import MAX_PENDING, NormChecks
from service.settings import Settings
from service.store.connection import Connection
from service.store.norms import NormStore

NORMS = {"global": b"[" + Norm(name="title", checker="title").model_dump_json().encode() + b"]"}


class WaitingNorms(NormStore):
    """Answers when it is let, or fails."""

    def __init__(self) -> None:
        super().__init__(Connection("redis://127.0.0.1:1/0", timeout_seconds=1.0))
        self.free = asyncio.Event()
        self.reads = 0
        self.broken: Exception | None = None

    async def all(self, *, tenant: str) -> Mapping[str, bytes]:
        self.reads += 1
        await self.free.wait()
        if self.broken:
            raise self.broken
        return NORMS


def begin(checks: NormChecks, n: int, reply: str = "<<A>> title") -> None:
    checks.begin(reply, reply_id=f"chatcmpl-{n}", prompt=lambda: "Hi", tenant="acme", user="alice", cohort=None)


async def ended() -> None:
    """All tasks but this one."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


def count(metrics: Metrics, sample: str) -> float:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(sample))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


async def test_replies_past_the_limit_are_left_out_and_counted(metrics: Metrics) -> None:
    store = WaitingNorms()
    checks = NormChecks(store, Settings(_env_file=None), metrics)
    for n in range(MAX_PENDING + 3):
        begin(checks, n)
    assert count(metrics, 'fastslow_norms_unchecked_total{reason="busy"}') == 3
    store.free.set()
    await ended()
    assert count(metrics, 'fastslow_norm_checks_total{held="yes",norm="title"}') == MAX_PENDING


async def test_closing_drops_what_is_under_way(metrics: Metrics) -> None:
    checks = NormChecks(WaitingNorms(), Settings(_env_file=None), metrics)
    begin(checks, 0)
    await checks.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert count(metrics, "fastslow_norm") == 0


async def test_what_was_read_is_used_again_until_it_is_too_old(metrics: Metrics) -> None:
    for seconds, reads in ((60.0, 1), (0.0, 3)):
        store = WaitingNorms()
        store.free.set()
        checks = NormChecks(store, Settings(_env_file=None, norms_cache_seconds=seconds), metrics)
        for n in range(3):
            begin(checks, n)
            await ended()
        assert store.reads == reads
        await checks.aclose()


async def test_about_the_share_of_replies_that_is_set_is_checked_and_the_same_ones_everywhere(metrics: Metrics) -> None:
    store = WaitingNorms()
    store.free.set()
    for _ in range(2):
        checks = NormChecks(store, Settings(_env_file=None, norm_checks_share=0.25), metrics)
        for n in range(400):
            begin(checks, n)
            await ended()
        await checks.aclose()
    once, rest = divmod(count(metrics, "fastslow_norm_checks_total{"), 2)
    assert rest == 0
    assert 70 <= once <= 130


@pytest.mark.parametrize(
    ("error", "reason"), [(StoreUnavailable("Redis is away"), "store"), (RuntimeError("a fault of ours"), "failed")]
)
async def test_a_check_that_fails_is_counted_and_harms_nobody(metrics: Metrics, error: Exception, reason: str) -> None:
    store = WaitingNorms()
    store.free.set()
    store.broken = error
    checks = NormChecks(store, Settings(_env_file=None), metrics)
    begin(checks, 0)
    await ended()
    assert count(metrics, f'fastslow_norms_unchecked_total{{reason="{reason}"}}') == 1
