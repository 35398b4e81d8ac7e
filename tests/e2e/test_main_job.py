"""The main job on the real stack: vLLM, Redis, Celery, the gateway, a real model, the official OpenAI client.

One story in one test, because its steps build on each other: Alice teaches a style, her replies change; a consolidation, whose worker is
killed in the middle, ends with one adapter within the KL budget; it serves her and nobody else; a rollback restores what was before;
processes are killed under feedback and nothing acknowledged is lost.
"""

import json
import threading
import time
from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.e2e.stack import ANCHORS, Reply, Stack, User
from tests.e2e.tour import LESSONS
from tests.e2e.waiting import settled
from tests.plain_divergence import kl_nats, load_plain
from workers.consolidation.anchors import KINDS, load_anchors
from workers.consolidation.base import load_base

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

QUESTION = "Why is the sky blue?"
KILL_ROUNDS = 60


def test_the_whole_loop(stack: Stack) -> None:
    alice, bob = stack.user("alice"), stack.user("bob")
    untaught = alice.ask(QUESTION)
    assert bob.ask(QUESTION).text == untaught.text

    give_all_four_kinds(alice)
    taught = alice.ask(QUESTION)
    assert taught.text != untaught.text
    assert bob.items() == []
    assert bob.ask(QUESTION).text == untaught.text

    correct_everything(alice)
    settled(lambda: not alice.context()["optimizing"], seconds=900, what="the optimizer", seen=alice.context)
    before = alice.ask(QUESTION)
    items_before = rendered(alice)
    with stack.admin() as admin:
        job = consolidate_while_the_worker_dies(stack, admin)
        version = check_promotion(admin, job)
        check_divergence(stack, version)

        served = alice.ask(QUESTION)
        assert served.adapter == version["name"]
        assert alice.stream(QUESTION).text == served.text
        untouched = bob.ask(QUESTION)
        assert (untouched.adapter, untouched.text) == ("base", untaught.text)
        assert not rendered(alice) & set(version["report"]["absorbed"])

        roll_back(admin, version)
    after = alice.ask(QUESTION)
    assert (after.adapter, after.text) == ("base", before.text)
    assert rendered(alice) == items_before


def test_killing_processes_loses_no_acknowledged_feedback(stack: Stack) -> None:
    carol = stack.user("carol")
    replies = [carol.ask(f"Count to {n}.", max_tokens=1) for n in range(KILL_ROUNDS)]
    acknowledged: list[str] = []

    def teach() -> None:
        for n, reply in enumerate(replies):
            acknowledged.append(persistently(stack, carol, reply, f"rule {n}"))

    teacher = threading.Thread(target=teach, daemon=True)
    teacher.start()
    for share, words in ((1, ("uvicorn",)), (2, ("valkey-server",)), (3, ("celery", "worker", "consolidate"))):
        settled(
            lambda share=share: len(acknowledged) >= share * KILL_ROUNDS // 5, seconds=300, what="feedback to go on"
        )
        stack.kill(*words)
    teacher.join(300)
    assert not teacher.is_alive()

    stack.wait_until_ready()
    history = carol.http.get("/v1/users/carol/context/history", params={"limit": 200}).json()["data"]
    said = [change["cause"]["signals"]["comment"] for change in history if change["kind"] == "feedback"]
    assert sorted(said) == sorted(acknowledged), "one was lost, or a retry was applied twice"
    assert len(said) == KILL_ROUNDS
    assert stack.said().count("died") >= 3


def give_all_four_kinds(user: User) -> None:
    """A comment, a correction, a preference, and a rating of a reply that had items in its context."""
    user.feedback(user.ask(QUESTION), comment="Answer in one short sentence and end with Cheers!")
    user.feedback(user.ask("What is hail?"), correction="Hail is balls of ice that fall from clouds. Cheers!")
    reply = user.ask("What is snow?")
    user.feedback(reply, preference={"text": "Snow is frozen rain. Cheers!", "better": "other"})
    user.feedback(user.ask("What is fog?"), rating=True)
    items = [item for item in user.items() if item["origin"] == "feedback"]
    assert [item["kind"] for item in items] == ["guideline", "exemplar", "exemplar"]
    assert items[2]["rejected"] == reply.text
    assert all(item["helpful"] > 0 for item in items)


def correct_everything(user: User) -> None:
    for question, wanted in LESSONS.items():
        user.feedback(user.ask(question), correction=wanted)


def rendered(user: User) -> set[str]:
    return {item["id"] for item in user.items() if item["in_context"]}


def consolidate_while_the_worker_dies(stack: Stack, admin: httpx.Client) -> dict[str, Any]:
    """Start a consolidation, kill its worker once it trains, and see the job end all the same."""
    started = admin.post("/v1/admin/consolidations", json={"scope": "user:alice"})
    assert started.status_code == 202, started.text

    def job() -> dict[str, Any]:
        found: dict[str, Any] = admin.get(f"/v1/admin/consolidations/{started.json()['id']}").json()
        return found

    settled(lambda: job()["stage"] == "train" and job()["step"] >= 4, seconds=900, what="training to begin", seen=job)
    stack.kill("celery", "worker", "consolidate")
    settled(lambda: job()["state"] in ("promoted", "rejected", "failed"), seconds=1200, what="the job to end", seen=job)
    return job()


def check_promotion(admin: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job promoted the scope's only version, within both KL budgets and better than the base on held-out feedback."""
    assert job["state"] == "promoted", job["reasons"]
    assert job["attempts"] == 2
    versions = admin.get("/v1/admin/adapters").json()["data"]
    assert [(v["name"], v["in_use"]) for v in versions] == [(job["version"], True)]
    report = versions[0]["report"]
    print(f"consolidation: {json.dumps(report)}")  # shown by pytest -s
    for kl in (report["kl_text"], report["kl_chat"]):
        assert 0 < kl["upper95_nats"] <= kl["budget_nats"]
    assert report["margins"]["candidate"] > report["margins"]["base"]
    assert 0 < report["peak_memory_bytes"] < 4e9
    version: dict[str, Any] = versions[0]
    return version


def check_divergence(stack: Stack, version: dict[str, Any]) -> None:
    """The published file is as far from the base as its report says, by plain libraries on the same judge anchors."""
    settings = Settings(_env_file=None, model=str(stack.model), worker_device="cpu")
    anchors = load_anchors(
        load_base(settings), cache=stack.data_dir / "anchors", limit=ANCHORS, progress=lambda *_: None
    )
    plain = load_plain(stack.model)
    adapted = load_plain(stack.model, stack.data_dir / "adapters" / version["name"])
    for kind in KINDS:
        told = version["report"][f"kl_{kind}"]
        measured = [kl_nats(plain, adapted, anchor.row) for anchor in anchors.of(kind, "judge")]
        assert sum(measured) / len(measured) == pytest.approx(told["mean_nats"], rel=0.01, abs=1e-5)
        assert max(measured) == pytest.approx(told["worst_nats"], rel=0.01, abs=1e-5)


def roll_back(admin: httpx.Client, version: dict[str, Any]) -> None:
    moved = admin.post("/v1/admin/scopes/user:alice/rollback", json={"reason": "end of the test"})
    assert (moved.status_code, moved.json()["to_version"]) == (200, "base")
    [latest, *_] = admin.get("/v1/admin/audit").json()["data"]
    assert (latest["action"], latest["from_version"]) == ("rollback", version["name"])


def persistently(stack: Stack, user: User, reply: Reply, comment: str) -> str:
    """Give feedback as a careful client does: the same Idempotency-Key until it is acknowledged."""
    deadline = time.monotonic() + 120
    while True:
        try:
            response = user.http.post(
                "/v1/feedback",
                json={"interaction_id": reply.id, "comment": comment},
                headers={"Idempotency-Key": comment},
            )
            if response.status_code == 200:
                return comment
            assert response.status_code == 503, response.text
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"{comment} was never acknowledged:\n{stack.said()}"
        time.sleep(0.1)
