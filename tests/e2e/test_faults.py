"""The short form of `make test-faults`: a few faults under load, on the real stack with upstreams that echo."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import tests.faults.kinds  # noqa: F401  registers them
from tests.faults.members import Layout
from tests.faults.registry import FAULTS
from tests.faults.stack import Stack, started
from tests.faults.trial import Pace, run

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]

SHORT = ("kill-redis", "kill-gateway", "redis-cut", "corrupt-adapter")
PACE = Pace(users=6, pause_seconds=0.6, fault_seconds=2.5, after_seconds=0.5)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with started(Layout(), tmp_path_factory.mktemp("faults"), model_path) as stack:
        yield stack


@pytest.mark.parametrize("name", SHORT)
async def test_nothing_acknowledged_is_lost_nobody_gets_what_is_anothers_and_all_is_well_again(
    stack: Stack, name: str
) -> None:
    outcome = await run(FAULTS[name], stack, PACE, lambda step: None)
    assert (outcome.lost, outcome.crossed, outcome.behind) == (0, 0, 0), outcome.problems
    assert outcome.held, outcome.problems
    # The checks looked at something.
    assert outcome.acknowledged >= PACE.users
    assert outcome.personal >= PACE.users
