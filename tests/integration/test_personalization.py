"""What of the user a chat is served with: by the request's own wish, in a dry run, by the member that is drawn."""

import time
from typing import Any

import httpx
import pytest

from service.domain.events import Member, PopulationEvent
from service.domain.fold import apply
from service.domain.population import member_id
from service.store import Store
from tests.fakes import MODEL, FakeVllm

OTHER_MODES = [False, {"context": False}, {"context": False, "adapter": False}]


def chat(question: str = "What is a noun?", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}]} | fields


async def taught(client: httpx.AsyncClient, *questions: str) -> None:
    """One correction for each question."""
    for question in questions:
        completion = (await client.post("/v1/chat/completions", json=chat(question))).json()
        body = {"interaction_id": completion["id"], "correction": f"The answer to {question}"}
        assert (await client.post("/v1/feedback", json=body)).status_code == 200


async def populated(store: Store, *members: tuple[str, ...]) -> list[Member]:
    """Alice's population, as the optimizer would write it."""
    state = await store.users.fast_weights(tenant="acme", user="alice")
    found = [Member(id=member_id(items), items=items) for items in members]
    event = PopulationEvent(
        revision=state.revision + 1,
        at=time.time(),
        basis=state.revision,
        basis_clock=state.clock,
        members=tuple(found),
    )
    await store.users.append(event, apply(state, event), tenant="acme", user="alice", optimize_at=None)
    return found


@pytest.mark.parametrize("wish", OTHER_MODES)
async def test_a_request_can_do_without_its_users_context(
    client: httpx.AsyncClient, vllm: FakeVllm, wish: bool | dict[str, bool]
) -> None:
    await taught(client, "What is rain?")

    response = await client.post("/v1/chat/completions", json=chat(personalization=wish))

    assert response.status_code == 200
    assert [m["role"] for m in vllm.last["messages"]] == ["user"]
    assert response.headers["x-fastslow-context-tokens"] == "0"


async def test_a_misspelt_wish_is_an_error_that_names_it(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=chat(personalization={"contexts": False}))

    assert response.status_code == 400
    assert "personalization" in response.json()["error"]["param"]


async def test_a_dry_run_shows_what_would_be_sent_and_sends_nothing(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    await taught(client, "What is rain?")
    asked = len(vllm.bodies)

    shown = (await client.post("/v1/chat/completions", json=chat(personalization={"dry_run": True}))).json()
    sent = (await client.post("/v1/chat/completions", json=chat())).json()

    assert len(vllm.bodies) == asked + 1
    assert shown["messages"] == vllm.last["messages"]
    assert shown["object"] == "chat.dry_run"
    assert sent["object"] == "chat.completion"


async def test_the_drawn_member_is_in_the_header_and_its_rating_is_credited_to_it(
    client: httpx.AsyncClient, store: Store
) -> None:
    await taught(client, "What is rain?", "What is a verb?")
    first, second = (await store.users.fast_weights(tenant="acme", user="alice")).exemplars
    members = await populated(store, (first,), (second,))

    response = await client.post("/v1/chat/completions", json=chat())
    drawn = response.headers["x-fastslow-context-member"]
    await client.post("/v1/feedback", json={"interaction_id": response.json()["id"], "rating": True})

    assert drawn in {member.id for member in members}
    shown = (await client.get("/v1/users/alice/context")).json()["population"]["members"]
    assert {m["id"]: m["helpful"] for m in shown} == {m.id: float(m.id == drawn) for m in members}


async def test_the_same_request_is_served_by_the_same_member_and_a_conversation_keeps_its_own(
    client: httpx.AsyncClient, store: Store
) -> None:
    await taught(client, "What is rain?", "What is a verb?")
    first, second = (await store.users.fast_weights(tenant="acme", user="alice")).exemplars
    await populated(store, (first,), (second,))

    async def drawn(body: dict[str, Any]) -> str:
        response = await client.post("/v1/chat/completions", json=body)
        return response.headers["x-fastslow-context-member"]

    alone = {n: await drawn(chat(f"Question {n}?")) for n in range(8)}
    again = {n: await drawn(chat(f"Question {n}?")) for n in range(8)}
    turns = [{"role": "assistant", "content": "An answer."}, {"role": "user", "content": "And then?"}]
    later = {n: await drawn(chat() | {"messages": chat(f"Question {n}?")["messages"] + turns}) for n in range(8)}

    assert again == alone == later
    assert len(set(alone.values())) == 2


async def test_feedback_after_an_optimization_is_in_the_very_next_chat(
    client: httpx.AsyncClient, store: Store, vllm: FakeVllm
) -> None:
    await taught(client, "What is rain?")
    [only] = (await store.users.fast_weights(tenant="acme", user="alice")).exemplars
    await populated(store, (only,))

    await taught(client, "What is a verb?")
    await client.post("/v1/chat/completions", json=chat())

    assert [m["content"] for m in vllm.last["messages"] if m["role"] == "user"] == [
        "What is rain?",
        "What is a verb?",
        "What is a noun?",
    ]


async def test_feedback_plans_an_optimization_and_enough_of_it_makes_that_due(
    client: httpx.AsyncClient, store: Store
) -> None:
    await taught(client, "What is rain?")
    planned = (await client.get("/v1/users/alice/context")).json()["optimizing"]
    soon = await store.optimizations.due(now=time.time())
    await taught(client, "What is snow?", "What is hail?", "What is fog?", "What is wind?")

    assert planned is True
    assert soon == []
    assert await store.optimizations.due(now=time.time()) == [("acme", "alice")]


async def test_metrics_tell_how_optimizations_ended_on_all_workers(client: httpx.AsyncClient, store: Store) -> None:
    for outcome in ("improved", "improved", "scorer-away"):
        await store.counts.add("optimize", outcome)
    await store.counts.add("optimize_without", "embedder")

    text = (await client.get("/metrics")).text

    assert 'fastslow_optimizations_total{outcome="improved"} 2.0' in text
    assert 'fastslow_optimizations_total{outcome="scorer-away"} 1.0' in text
    assert 'fastslow_optimizations_without_total{missing="embedder"} 1.0' in text
