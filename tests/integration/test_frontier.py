"""The picture of a version's frontier through the HTTP interface."""

import httpx
import pytest

from service.domain.slow_weights import AdapterVersion
from service.settings import Settings
from service.store import Store
from tests.conftest import OTHER_TENANT_KEY
from tests.factories import ALICE, give_feedback, outcome_of
from tests.fakes import FakeVllm
from tests.jobs import Trainer, opened, run
from tests.unit.test_frontier import POINTS
from workers.consolidation.work import Outcome, Work


@pytest.fixture
async def version(store: Store, settings: Settings, vllm: FakeVllm) -> AdapterVersion:
    """A promoted version whose report has a frontier."""

    def judged(work: Work) -> Outcome:
        outcome = outcome_of(work)
        assert outcome.version is not None
        report = outcome.report.model_copy(update={"frontier": POINTS})
        made = outcome.version.model_copy(update={"report": report})
        return outcome.model_copy(update={"report": report, "version": made})

    await give_feedback(store, 1)
    ended = await run(await opened(store, ALICE), store, settings, Trainer(vllm, judged))
    assert ended.version is not None, ended.reasons
    return await store.scopes.version(ended.version, ALICE, tenant="acme")


async def test_an_admin_sees_the_frontier_of_a_version(
    client: httpx.AsyncClient, as_admin: dict[str, str], version: AdapterVersion
) -> None:
    response = await client.get(f"/v1/admin/adapters/{version.name}/frontier.png", headers=as_admin)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.content.startswith(b"\x89PNG")
    numbers = (await client.get(f"/v1/admin/adapters/{version.name}", headers=as_admin)).json()["report"]["frontier"]
    assert [point["scale"] for point in numbers] == [0.25, 0.5, 0.75, 1.0]


async def test_nobody_else_does(client: httpx.AsyncClient, version: AdapterVersion) -> None:
    url = f"/v1/admin/adapters/{version.name}/frontier.png"
    assert (await client.get(url)).status_code == 403
    other = {"Authorization": f"Bearer {OTHER_TENANT_KEY}"}
    assert (await client.get(url, headers=other)).status_code == 404
