"""`GET /v1/users/{user}/context/history` over a real Redis: what changed, because of what, page by page."""

from typing import Any

import httpx
import pytest

from service.settings import Settings
from service.store import Store
from tests.conftest import OTHER_TENANT_KEY
from tests.dialogue import chat, context_of, edit, optimized, say
from workers.archive import archive_user

PATH = "/v1/users/alice/context/history"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Logs are archived early."""
    return settings.model_copy(update={"log_keep_events": 2})


async def history(client: httpx.AsyncClient, **query: int) -> dict[str, Any]:
    response = await client.get(PATH, params=query)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


async def test_feedback_is_told_with_its_interaction_its_signals_and_what_it_added(client: httpx.AsyncClient) -> None:
    interaction = await say(client, comment="Use rhymes.", rating=True)

    [change] = (await history(client))["data"]

    assert (change["revision"], change["kind"]) == (1, "feedback")
    assert change["cause"] == {"interaction_id": interaction, "signals": {"rating": 1.0, "comment": "Use rhymes."}}
    assert [item["text"] for item in change["added"]] == ["Use rhymes."]
    assert change["removed"] == change["changed"] == []


async def test_a_retraction_is_told_as_null_with_what_it_removed(client: httpx.AsyncClient) -> None:
    interaction = await say(client, comment="Use rhymes.")
    await client.post("/v1/feedback", json={"interaction_id": interaction, "comment": None})

    _, change = (await history(client))["data"]

    assert change["cause"]["signals"] == {"comment": None}
    assert [item["text"] for item in change["removed"]] == ["Use rhymes."]


async def test_a_rating_is_told_with_the_credit_that_it_moved(client: httpx.AsyncClient) -> None:
    await say(client, comment="Use rhymes.")
    [item] = (await context_of(client))["items"]
    rated = await say(client, rating=-0.5)
    await client.post("/v1/feedback", json={"interaction_id": rated, "rating": None})

    _, blamed, taken_back = (await history(client))["data"]

    assert blamed["credit"] == {item["id"]: {"helpful": 0.0, "harmful": 0.5}}
    assert taken_back["credit"][item["id"]]["harmful"] == pytest.approx(-0.49)


async def test_an_edit_is_told_with_who_made_it_and_what_became_of_the_item(client: httpx.AsyncClient) -> None:
    await say(client, comment="Use rhymes.")
    [item] = (await context_of(client))["items"]
    await edit(client, {"op": "change", "id": item["id"], "text": "Use verse."})
    [new] = (await context_of(client))["items"]
    await edit(client, {"op": "pin", "id": new["id"]})

    _, changed, pinned = (await history(client))["data"]

    assert changed["cause"] == {"by": "user", "edits": [{"op": "change", "id": item["id"]}]}
    assert [(i["id"], i["became"]) for i in changed["removed"]] == [(item["id"], new["id"])]
    assert [i["text"] for i in changed["added"]] == ["Use verse."]
    assert [i["changed"] for i in pinned["changed"]] == [{"pinned": [False, True]}]


async def test_an_optimization_is_told_with_its_report_and_the_members_before_and_after(
    client: httpx.AsyncClient, store: Store
) -> None:
    await say(client, comment="Use rhymes.")
    event = await optimized(store, "Reply in one sentence.")

    _, change = (await history(client))["data"]

    assert (change["kind"], change["cause"]["basis"]) == ("population", 1)
    assert "margin_after" in change["cause"]["report"]
    assert (change["members_before"], change["members_after"]) == ([], [event.members[0].id])
    assert [item["text"] for item in change["added"]] == ["Reply in one sentence."]


async def test_pages_follow_each_other_without_gap_or_overlap(client: httpx.AsyncClient) -> None:
    for n in range(5):
        await say(client, comment=f"mention topic {n}")

    pages, after = [], 0
    while after is not None:
        page = await history(client, after=after, limit=2)
        pages.append([change["revision"] for change in page["data"]])
        after = page["next_after"]

    assert pages == [[1, 2], [3, 4], [5]]
    assert (await history(client, after=5))["data"] == []
    assert (await history(client, after=4))["has_more"] is False


async def test_a_user_without_feedback_has_no_history(client: httpx.AsyncClient) -> None:
    told = await history(client)
    assert (told["data"], told["has_more"], told["next_after"], told["archived"]) == ([], False, None, 0)


async def test_what_was_archived_is_named_and_what_follows_is_told_as_before(
    client: httpx.AsyncClient, store: Store, settings: Settings
) -> None:
    for n in range(6):
        await say(client, comment=f"mention topic {n}", rating=1)
    before = await history(client)

    await archive_user(store, settings, tenant="acme", user="alice", most_parts=1)
    after = await history(client)

    assert (before["archived"], after["archived"]) == (0, 2)
    assert after["data"] == before["data"][2:]


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 201}, {"after": -1}, {"after": "x"}])
async def test_a_bad_page_is_a_422_that_names_the_parameter(client: httpx.AsyncClient, query: dict[str, Any]) -> None:
    response = await client.get(PATH, params=query)
    assert (response.status_code, response.json()["error"]["param"]) == (422, next(iter(query)))


async def test_nobody_reads_another_tenants_history(client: httpx.AsyncClient) -> None:
    await say(client, comment="Use rhymes.")
    theirs = await client.get(PATH, headers={"Authorization": f"Bearer {OTHER_TENANT_KEY}"})
    anybody = await client.get(PATH, headers={"Authorization": ""})
    assert theirs.json()["data"] == []
    assert anybody.status_code == 401


async def test_a_long_correction_is_cut_in_the_history(client: httpx.AsyncClient) -> None:
    interaction = await chat(client)
    await client.post("/v1/feedback", json={"interaction_id": interaction, "correction": "long " * 1000})
    [change] = (await history(client))["data"]
    assert len(change["cause"]["signals"]["correction"]) == len(change["added"][0]["text"]) == 300
