"""Stored users are what the service would have written; the scale benchmark's ratios are taken within a repeat, the worse one told."""

import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service.domain.fold import fold
from service.settings import Settings
from service.store import open_store
from tests.benchmarks import history, processes, scale, stored
from tests.benchmarks.sides import Side
from tests.benchmarks.stats import Round

USER = stored.user_name(4711)
CORES = processes.Cores(frozenset({0}), frozenset({1}))


@pytest.mark.parametrize("past", [stored.ACTIVE_USER, stored.LIGHT_USER])
async def test_a_copied_user_has_the_log_the_fold_and_the_interactions_of_one_that_the_service_wrote(
    past: stored.Past, redis_url: str, tmp_path: Path
) -> None:
    template, state = await stored.stored_user(past, time.time())
    wire = stored.Wire(urlsplit(redis_url).port or 0, template.tape.scripts)
    wire.send(template.copied_to(USER), template.tape.commands)
    store = open_store(Settings(_env_file=None, redis_url=redis_url, data_dir=tmp_path))
    history = await store.users.log(tenant=stored.TENANT, user=USER)
    assert [event.interaction.signals for event in history.events] == list(past.history)
    assert {event.interaction.user for event in history.events} == {USER}
    read = await store.users.fast_weights(tenant=stored.TENANT, user=USER)
    assert read == fold(history.events)
    assert (read.guidelines.keys(), read.exemplars.keys()) == (state.guidelines.keys(), state.exemplars.keys())
    for n in range(len(past.history) + past.silent):
        found = await store.users.feedback_inputs(
            stored.interaction_id(USER, n), tenant=stored.TENANT, user=USER, other_id=None, idempotency_key=None
        )
        assert found.interaction is not None
        assert found.interaction.user == USER
    assert await store.users.users(tenant=stored.TENANT) == [USER]
    wire.send(await stored.forgotten(USER), 1)
    assert (await store.users.fast_weights(tenant=stored.TENANT, user=USER)).revision == 0
    wire.close()
    await store.close()


async def test_a_light_user_has_a_context() -> None:
    _, state = await stored.stored_user(stored.LIGHT_USER, 0.0)
    assert state.guidelines
    assert state.exemplars


@pytest.mark.parametrize(
    ("n", "told"), [(1, "1"), (1_000, "1k"), (100_000, "100k"), (1_000_000, "1m"), (812_345, "812k")]
)
def test_numbers_are_told_in_short(n: int, told: str) -> None:
    assert scale.short(n) == told


def test_a_ratio_is_the_median_of_those_within_a_repeat() -> None:
    assert scale.ratio([1.0, 2.0, 10.0], [1.5, 3.0, 10.0]) == 1.5


def side(users: int, *, chat_ms: float, feedback_ms: float) -> Side:
    rounds = {1: [Round(1.0, (feedback_ms / 1000,), (0.0,))] * 3}
    return Side(users, 0, 0, "", None, None, bytes_per_user=4321.4, rounds=rounds, overhead_ms=[chat_ms] * 3)  # type: ignore[arg-type]


def lives(figures: dict[int, tuple[float, float]]) -> history.Lives:
    """Histories with their (chat, feedback) in milliseconds."""
    found = history.Lives({}, None, None, "")  # type: ignore[arg-type]
    for length, (chat_ms, feedback_ms) in figures.items():
        overhead_ms = {history.RECALLING: [chat_ms] * 3, history.NOT_RECALLING: [1.0] * 3}
        rounds = [Round(1.0, (feedback_ms / 1000,), (0.0,))] * 3
        found.at[length] = history.Moment(None, {}, 1024, rounds, overhead_ms)  # type: ignore[arg-type]
    return found


def test_the_headline_is_the_worse_of_chat_and_feedback() -> None:
    stores = [side(1_000, chat_ms=1.0, feedback_ms=2.0), side(1_000_000, chat_ms=1.2, feedback_ms=2.2)]
    line = json.loads(scale.result(stores, lives({1: (1.0, 1.0), 10_000: (1.1, 1.3)}), CORES))
    assert list(line)[:4] == [
        "bench",
        "p50_ratio_users_1m_to_1k",
        "p50_ratio_history_10k_to_1",
        "redis_bytes_per_user",
    ]
    assert line["p50_ratio_users_1m_to_1k"] == 1.2
    assert line["p50_ratio_history_10k_to_1"] == 1.3
    assert line["redis_bytes_per_user"] == 4321
    assert line["ratio_users"] == {"chat": 1.2, "feedback": 1.1}


def test_fewer_users_are_told_where_a_million_do_not_fit() -> None:
    stores = [side(1_000, chat_ms=1.0, feedback_ms=1.0), side(640_000, chat_ms=1.0, feedback_ms=1.0)]
    assert "p50_ratio_users_640k_to_1k" in scale.result(stores, lives({1: (1.0, 1.0)}), CORES)
    assert scale.fitting(Side(1, 0, 0, "", None, None, bytes_per_user=2**40)) == 0  # type: ignore[arg-type]
    assert scale.fitting(Side(1, 0, 0, "", None, None, bytes_per_user=1.0)) == scale.MANY  # type: ignore[arg-type]
