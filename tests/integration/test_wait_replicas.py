"""`FASTSLOW_REDIS_WAIT_REPLICAS`: feedback is acknowledged once a replica has it, on a real primary and its replica."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from service.store import open_store
from service.tokens import Tokens
from tests.conftest import gateway_client
from tests.dialogue import chat, edit, texts_of
from tests.fakes import RecordedJobs
from tests.redis_servers import Server, replicated, server
from tests.waiting import until

SECONDS = 1.0


@pytest.fixture
async def primary(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path, {"save": "", "repl-diskless-sync-delay": 0}) as primary:
        yield primary


@pytest.fixture
async def replica(tmp_path: Path, primary: Server) -> AsyncIterator[Server]:
    options = {"save": "", "replicaof": f"127.0.0.1 {primary.port}"}
    async with server(tmp_path, options) as replica:
        await replicated(primary, replica)
        yield replica
        replica.process.send_signal(signal.SIGCONT)


@pytest.fixture
async def client(
    settings: Settings, tokens: Tokens, jobs: RecordedJobs, primary: Server
) -> AsyncIterator[httpx.AsyncClient]:
    waiting = {"redis_url": f"redis://127.0.0.1:{primary.port}/0", "redis_wait_replicas": 1}
    changed = settings.model_copy(update=waiting | {"redis_timeout_seconds": SECONDS})
    async with gateway_client(changed, tokens, jobs) as client:
        yield client


async def give(client: httpx.AsyncClient, interaction: str, *, key: str | None) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return await client.post(
        "/v1/feedback", json={"interaction_id": interaction, "comment": "Be brief."}, headers=headers
    )


@pytest.mark.parametrize("key", ["a-key", None])
async def test_what_no_replica_has_is_not_acknowledged_and_neither_is_its_retry_until_one_has_it(
    client: httpx.AsyncClient, replica: Server, key: str | None
) -> None:
    interaction = await chat(client)
    replica.process.send_signal(signal.SIGSTOP)
    for _ in range(2):
        refused = await give(client, interaction, key=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert "0 of 1 replicas" in refused.json()["error"]["message"]
    replica.process.send_signal(signal.SIGCONT)

    async def taken() -> bool:
        return (await give(client, interaction, key=key)).status_code == 200

    await until(taken, what="an acknowledgement")
    assert await texts_of(client) == ["Be brief."]


async def test_edits_wait_too(client: httpx.AsyncClient, replica: Server) -> None:
    assert (await edit(client, {"op": "add", "text": "Be brief."})).status_code == 200
    replica.process.send_signal(signal.SIGSTOP)
    assert (await edit(client, {"op": "add", "text": "Use rhymes."})).status_code == 503


async def test_without_any_replica_chats_go_on(client: httpx.AsyncClient) -> None:
    assert (await give(client, await chat(client), key=None)).status_code == 503


async def test_a_cluster_can_not_be_waited_for(settings: Settings) -> None:
    urls = {"redis_url": "redis+cluster://127.0.0.1:1", "redis_wait_replicas": 1}
    with pytest.raises(ValueError, match="not for a cluster"):
        open_store(settings.model_copy(update=urls))
