"""Two gateways behind one address share nothing but Redis and vLLM: what one does, the other serves within a second."""

import httpx

from service.domain.feedback import BASE
from service.settings import Settings
from service.store import Store
from tests.dialogue import CHAT, say
from tests.factories import ALICE
from tests.fakes import FakeVllm
from tests.jobs import Trainer, opened, run
from tests.waiting import until

# What a pointer may be behind; nothing of it is cached, so the next chat sees it.
SECONDS = 1.0


async def served_by(client: httpx.AsyncClient, adapter: str) -> None:
    """Wait until a gateway's chats are served by this adapter, for as long as it may be behind."""

    async def served() -> bool:
        reply = await client.post("/v1/chat/completions", json=CHAT)
        return reply.headers["x-fastslow-adapter"] == adapter

    await until(served, seconds=SECONDS, what=f"that {adapter} serves")


async def test_promotions_and_rollbacks_are_seen_by_both(
    client: httpx.AsyncClient,
    second_client: httpx.AsyncClient,
    store: Store,
    settings: Settings,
    vllm: FakeVllm,
    as_admin: dict[str, str],
) -> None:
    await say(client, comment="Be brief.")
    for gateway in (client, second_client):
        await served_by(gateway, BASE)
    version = (await run(await opened(store, ALICE), store, settings, Trainer(vllm))).version
    assert version is not None
    for gateway in (client, second_client):
        await served_by(gateway, version)
    for by, path, body, then in (
        (second_client, "rollback", {"reason": "Worse."}, BASE),
        (client, "promote", {"version": version, "reason": "Better after all."}, version),
    ):
        moved = await by.post(f"/v1/admin/scopes/user:alice/{path}", json=body, headers=as_admin)
        assert moved.status_code == 200, moved.text
        for gateway in (client, second_client):
            await served_by(gateway, then)


async def test_feedback_given_at_one_is_in_the_next_chat_at_the_other(
    client: httpx.AsyncClient, second_client: httpx.AsyncClient, vllm: FakeVllm
) -> None:
    for n, (at, other) in enumerate([(client, second_client), (second_client, client)] * 2):
        said = f"Speak of {('rivers', 'hills', 'trees', 'birds')[n]}."
        await say(at, comment=said)
        await other.post("/v1/chat/completions", json=CHAT)
        assert said in vllm.last["messages"][0]["content"]
