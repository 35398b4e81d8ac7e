"""What a client says to the gateway in tests: chats, feedback, edits; and what the optimizer would write."""

import time
from typing import Any

import httpx

from service.domain.events import Member, PopulationEvent
from service.domain.feedback import BASE, Interaction
from service.domain.fold import apply
from service.domain.items import Guideline, guideline_id
from service.domain.population import member_id
from service.store import Store
from tests.fakes import MODEL

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is a noun?"}]}


async def chat(client: httpx.AsyncClient, *, user: str = "alice") -> str:
    """The id of a new interaction."""
    response = await client.post("/v1/chat/completions", json=CHAT, headers={"X-User-ID": user})
    assert response.status_code == 200, response.text
    completion_id: str = response.json()["id"]
    return completion_id


async def stored(store: Store, interaction_id: str, *, user: str = "alice", tenant: str = "acme") -> Interaction | None:
    """What is kept of an interaction."""
    inputs = await store.users.feedback_inputs(
        interaction_id, tenant=tenant, user=user, other_id=None, idempotency_key=None
    )
    return inputs.interaction


async def say(client: httpx.AsyncClient, *, user: str = "alice", **signals: Any) -> str:
    """Feedback on a new chat; the interaction's id."""
    interaction = await chat(client, user=user)
    body = {"interaction_id": interaction} | signals
    response = await client.post("/v1/feedback", json=body, headers={"X-User-ID": user})
    assert response.status_code == 200, response.text
    return interaction


async def edit(
    client: httpx.AsyncClient, *edits: dict[str, Any], user: str = "alice", key: str | None = None, **fields: Any
) -> httpx.Response:
    """Edits of a user's context by hand."""
    headers = {"Idempotency-Key": key} if key else {}
    body = {"edits": list(edits)} | fields
    return await client.patch(f"/v1/users/{user}/context", json=body, headers=headers)


async def context_of(client: httpx.AsyncClient, *, user: str = "alice") -> dict[str, Any]:
    response = await client.get(f"/v1/users/{user}/context")
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


async def texts_of(client: httpx.AsyncClient, *, user: str = "alice") -> list[str]:
    """The user's guidelines and the replies of the user's exemplars."""
    return [item["text"] or item["reply"] for item in (await context_of(client, user=user))["items"]]


async def optimized(
    store: Store,
    *inferred: str,
    user: str = "alice",
    tenant: str = "acme",
    adapter: str = BASE,
    members: tuple[tuple[str, ...], ...] = (),
) -> PopulationEvent:
    """Append what the optimizer would: members by their items (else one, of all guidelines) and guidelines that it inferred.

    Args:
        adapter: the version in use.
    """
    state = await store.users.fast_weights(tenant=tenant, user=user)
    found = tuple(Guideline(id=guideline_id(text), text=text, origin="inferred") for text in inferred)
    of_all = (*state.guidelines, *(g.id for g in found))
    event = PopulationEvent(
        revision=state.revision + 1,
        at=time.time(),
        basis=state.revision,
        basis_clock=state.clock,
        adapter=adapter,
        members=tuple(Member(id=member_id(items), items=items) for items in members or (of_all,)),
        inferred=found,
    )
    await store.users.append(event, apply(state, event), tenant=tenant, user=user, optimize_at=None)
    return event
