"""A run of the learning benchmark against a small fake of the service: what is measured, how it resumes, what it ends with."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service.tokens import Tokens
from tests.benchmarks.learning.analysis import Results, bootstrap, diagonal_gain
from tests.benchmarks.learning.arms import last_k, oracle
from tests.benchmarks.learning.folder import OtherRun, open_run
from tests.benchmarks.learning.peers import Peer
from tests.benchmarks.learning.plan import plan
from tests.benchmarks.learning.records import Records
from tests.benchmarks.learning.session import execute
from tests.benchmarks.learning.users import population
from tests.learning_service import SMALL, TEST, TRAIN, FakeService, bench


async def test_each_arm_answers_the_same_questions_of_every_user_at_every_point(tmp_path: Path, tokens: Tokens) -> None:
    records = Records(tmp_path / "r.jsonl")
    told: list[tuple[str, int]] = []
    run = bench(records, FakeService(), tokens, told=told)
    await run.run()
    asked = {(arm, point): [] for arm in ("fast", "last-k") for point in SMALL.points}
    for record in records.under("reply"):
        _, arm, user, point, ask = record["key"]
        asked.setdefault((arm, point), []).append((user, ask))
    everything = sorted((person.name, prompt.ask) for person in run.people for prompt in run.tests)
    assert asked.keys() == {("fast", 0), ("fast", 1), ("fast", 3), ("last-k", 0), ("last-k", 1), ("last-k", 3)} | {
        ("base", 0),
        ("oracle", 0),
        ("shuffled", 3),
    }
    assert all(sorted(found) == everything for (arm, _), found in asked.items() if arm != "shuffled")
    assert sum(steps for _, steps in told) == run.steps


async def test_each_user_gives_exactly_as_many_feedbacks_as_the_last_point_says(tmp_path: Path, tokens: Tokens) -> None:
    service = FakeService()
    run = bench(Records(tmp_path / "r.jsonl"), service, tokens)
    await run.run()
    given = Counter(key.rsplit("-", 1)[0] for key in service.told)
    assert given == {run.account(p): 3 for p in run.people} | {run.account(p, "shuffled"): 3 for p in run.people[:2]}


async def test_the_client_arms_ask_in_nobodys_name_and_the_same_request_only_once(
    tmp_path: Path, tokens: Tokens
) -> None:
    service = FakeService()
    await bench(Records(tmp_path / "r.jsonl"), service, tokens).run()
    plain = [(ask, length) for user, ask, length in service.asked if user is None]
    assert [ask for ask, length in plain if length == 1] == [prompt.ask for prompt in TEST[:3]]


@pytest.mark.parametrize("steps", [1, 7, 40, 70])
async def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, tokens: Tokens, steps: int) -> None:
    records = Records(tmp_path / "r.jsonl")
    with pytest.raises(ExceptionGroup):
        await bench(records, FakeService(fails_after=steps), tokens).run()
    records.close()
    done = (tmp_path / "r.jsonl").read_bytes()

    records = Records(tmp_path / "r.jsonl")
    service = FakeService()
    await bench(records, service, tokens).run()
    whole = (tmp_path / "r.jsonl").read_bytes()
    assert whole.startswith(done)
    keys = Counter(tuple(json.loads(line)["key"]) for line in whole.splitlines())
    assert set(keys.values()) == {1}
    told = [key for key in keys if key[0] == "told"]
    assert len(told) == 4 * 3 + 2 * 3
    assert service.repeats == 0
    already = sum(json.loads(line)["key"][0] == "told" for line in done.splitlines())
    assert len(service.told) == len(told) - already


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Records(path)
    first.put("a", 1, x=1)
    first.close()
    path.write_bytes(path.read_bytes() + b'{"key": ["b"')
    again = Records(path)
    again.put("c")
    again.close()
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [["a", 1], ["c"]]
    with pytest.raises(ValueError, match="twice"):
        Records(path).put("c")


async def test_a_run_ends_with_the_line_pictures_and_replies(tmp_path: Path, tokens: Tokens) -> None:
    service: Any = FakeService()
    service.unsettled = True
    run = open_run(tmp_path / "run", SMALL, where="here")
    line = json.loads(await execute(run, SMALL, service, concurrency=3, console=Console(quiet=True)))
    assert list(line)[:21] == [
        *("bench", "size", "users", "arms", "ci", "oracle", "swap", "shuffled", "context_tokens"),
        *("adapters", "over_budget", "kl_text_max_nats", "kl_chat_max_nats"),
        *("feedback_ratio", "kl_ratio_at_matched_satisfaction", "context_tokens_ratio", "way_to_oracle", "rejected"),
        *("seed", "fractions", "recovered"),
    ]
    assert line["users"] == 4
    assert line["arms"].keys() == {"base", "last-k", "fast", "oracle"}
    assert all(list(curve) == ["0", "1", "3"] for curve in line["arms"].values())
    assert line["unsettled"] == {"0": 4, "1": 4, "3": 4, "shuffled": 2}
    folder = tmp_path / "run"
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("curves.png", "swap.png"))
    replies = [json.loads(text) for text in (folder / "replies.jsonl").read_text().splitlines()]
    assert len(replies) == 4 * 3 * (2 + 2 * 3) + 2 * 3
    assert {"arm", "user", "wants", "feedbacks", "ask", "reply", "satisfied"} <= replies[0].keys()


def test_a_finished_run_makes_room_and_an_unfinished_one_is_not_mixed_with_another(tmp_path: Path) -> None:
    first = open_run(tmp_path, SMALL, where="here")
    assert not first.resumed
    first.records.close()
    again = open_run(tmp_path, SMALL, where="here")
    assert (again.resumed, again.prefix) == (True, first.prefix)
    again.records.close()
    with pytest.raises(OtherRun):
        open_run(tmp_path, plan("smoke", seed=1), where="here")
    again = open_run(tmp_path, SMALL, where="here")
    again.finished()
    fresh = open_run(tmp_path, plan("smoke", seed=1), where="here")
    assert not fresh.resumed
    assert fresh.prefix != first.prefix


async def test_a_peer_is_told_the_same_in_the_conversation(tmp_path: Path, tokens: Tokens) -> None:
    rival: Any = FakeService()
    records = Records(tmp_path / "r.jsonl")
    run = bench(records, FakeService(), tokens, peers=[Peer("rival", rival)])
    await run.run()
    assert Results(SMALL, run.people, records).points("rival") == [0, 1, 3]
    told = Counter(user for user, _, length in rival.asked if length == 3)
    assert told == {run.account(person): 3 for person in run.people}


def exchange(ask: str, **signals: object) -> dict[str, Any]:
    return {"ask": ask, "signals": signals, "reply": {"text": "first"}, "other": {"text": "second"}}


def test_last_k_shows_the_last_five_lessons_oldest_first(tokens: Tokens) -> None:
    given = [exchange(f"q{n}", correction=f"a{n}") for n in range(6)]
    given += [
        exchange("rated", rating=True),
        exchange("compared", preference={"interaction_id": "x", "better": "other"}),
    ]
    said = [message["content"] for message in last_k(given, tokens.count)]
    assert said == ["q2", "a2", "q3", "a3", "q4", "a4", "q5", "a5", "compared", "second"]


def test_last_k_stays_within_the_budget_of_the_services_context(tokens: Tokens) -> None:
    given = [exchange(f"q{n}", correction="word " * 150) for n in range(5)]
    assert [m["content"] for m in last_k(given, tokens.count)][::2] == ["q2", "q3", "q4"]


def test_the_oracle_writes_out_the_preferences_and_shows_replies_that_satisfy(tokens: Tokens) -> None:
    for person in population(10, (1, 2, 3), seed=2):
        system, *turns = oracle(person, TRAIN, tokens.count, seed=0)
        assert all(p.told in system["content"] for p in person.preferences)
        assert len(turns) >= 12
        assert all(p.check(m["content"]) for m in turns[1::2] for p in person.preferences)


def test_the_bootstrap_covers_the_mean_and_narrows_with_more_users() -> None:
    few, many = bootstrap([0.0, 1.0] * 4), bootstrap([0.0, 1.0] * 100)
    assert few.mean == many.mean == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    assert bootstrap([0.25] * 5).fields() == {"mean": 0.25, "low": 0.25, "high": 0.25}
    with pytest.raises(ValueError, match="nothing"):
        bootstrap([])


def test_the_swap_gains_what_the_diagonal_has_over_the_rest_of_its_row() -> None:
    assert diagonal_gain([[1.0, 0.0, 0.5], [0.25, 0.75, 0.25], [0.0, 0.0, 1.0]]).mean == pytest.approx(0.75)
    assert diagonal_gain([[0.5] * 4] * 4).fields() == {"mean": 0.0, "low": 0.0, "high": 0.0}
