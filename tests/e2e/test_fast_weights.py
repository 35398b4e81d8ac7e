"""Fast weights on the real stack: contradictions, edits, cold starts, and what the optimizer finds."""

from typing import Any

import pytest

from tests.e2e.stack import Stack, User
from tests.e2e.tour import LESSONS
from tests.e2e.waiting import settled

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

QUESTION = "Why is the sky blue?"


def would_be_sent(user: User) -> str:
    """All that vLLM would be told before the question."""
    shown = user.dry_run(QUESTION)
    return "\n".join(message["content"] for message in shown["messages"][:-1])


def edit(user: User, **fields: Any) -> dict[str, Any]:
    response = user.http.patch(f"/v1/users/{user.name}/context", json={"edits": [fields]})
    assert response.status_code == 200, response.text
    context: dict[str, Any] = response.json()
    return context


def test_a_contradiction_retires_the_older_wish_until_it_is_retracted(stack: Stack) -> None:
    dora = stack.user("dora")
    dora.feedback(dora.ask(QUESTION, max_tokens=8), comment="I'd like more detail in the answers, please.")
    later = dora.ask("What is a verb?", max_tokens=8)
    dora.feedback(later, comment="Please keep the answers shorter!")
    assert "shorter" in would_be_sent(dora)
    assert "more detail" not in would_be_sent(dora)

    dora.feedback(later, comment=None)
    assert "more detail" in would_be_sent(dora)


def test_an_edit_is_in_the_next_chat_and_outranks_what_was_said(stack: Stack) -> None:
    emil = stack.user("emil")
    emil.feedback(emil.ask(QUESTION, max_tokens=8), comment="Use bullet points.")
    [said] = [item for item in emil.items() if item["kind"] == "guideline"]

    edit(emil, op="change", id=said["id"], text="Use a numbered list.")
    assert "Use a numbered list." in would_be_sent(emil)
    assert "Use bullet points." not in would_be_sent(emil)

    items = edit(emil, op="add", text="Mention the weather.")["items"]
    [added] = [item["id"] for item in items if item["text"] == "Mention the weather."]
    edit(emil, op="remove", id=added)
    assert "weather" not in would_be_sent(emil)


def test_a_new_user_starts_from_what_an_admin_wrote_for_the_cohort_once_the_tenant_opted_in(stack: Stack) -> None:
    fay, gus = stack.user("fay"), stack.user("gus")
    with stack.admin() as admin:
        assert admin.put("/v1/admin/users/fay/cohort", json={"cohort": "clerks"}).status_code == 200
        written = {"guidelines": ["Answer in one sentence."]}
        assert admin.put("/v1/admin/guidelines/cohort:clerks", json=written).status_code == 200
        assert would_be_sent(fay) == ""
        assert admin.put("/v1/admin/cold-start", json={"enabled": True}).status_code == 200
        settled(lambda: "Answer in one sentence." in would_be_sent(fay), what="the gateway to look again")
        assert would_be_sent(gus) == ""
        assert admin.put("/v1/admin/cold-start", json={"enabled": False}).status_code == 200
    settled(lambda: would_be_sent(fay) == "", what="the gateway to look again")


def test_the_optimizer_finds_a_population_that_serves_and_tells_what_it_measured(stack: Stack) -> None:
    hana = stack.user("hana")
    for question, wanted in list(LESSONS.items())[:8]:
        hana.feedback(hana.ask(question, max_tokens=24), correction=wanted)
    settled(lambda: not hana.context()["optimizing"], what="the optimizer", seconds=900)

    members = hana.context()["population"]["members"]
    assert 1 <= len(members) <= 4
    assert max(member["score"] for member in members) > 0
    changes = hana.http.get("/v1/users/hana/context/history", params={"limit": 200}).json()["data"]
    reports = [change["cause"]["report"] for change in changes if change["kind"] == "population"]
    print(f"optimizations: {reports}")  # shown by pytest -s
    assert reports[-1]["margin_after"] > 0

    served = hana.ask(QUESTION)
    assert served.member in {member["id"] for member in members}
    assert served.text.strip().endswith("Cheers!")
