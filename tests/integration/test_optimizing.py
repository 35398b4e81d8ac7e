"""Optimizing over real Redis: the lease, the event and what came in meanwhile, the scorer away, who is due. Likelihoods are planted."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from redis import Redis

from service.domain.events import Edit, EditEvent, PopulationEvent
from service.domain.fast_weights import FastWeights
from service.domain.feedback import BASE, FeedbackEvent, Signals
from service.domain.fold import apply, fold
from service.errors import ContextLengthExceeded, EngineUnavailable, UpstreamRejected
from service.settings import Settings
from service.store import Store
from tests.context_search_data import PlantedScorer, corrections, exemplar_for, feedback, means, words
from tests.fakes import RecordedJobs
from workers.context_search.due import SENT_SECONDS, send_due
from workers.context_search.run import AWAY_SECONDS, REFUSED_SECONDS, Optimizing
from workers.context_search.search import Means

KEY = {"tenant": "acme", "user": "alice"}
HELPFUL = {"Wanted 2.": 0.5, "Wanted 5.": 0.4, "Always shout": -0.7}


async def say(
    store: Store, event: FeedbackEvent | EditEvent, *, optimize_at: float | None = 0.0, user: str = "alice"
) -> FastWeights:
    """Append an event as the API would."""
    if isinstance(event, FeedbackEvent):
        unspoken = replace(event.interaction, signals=Signals())
        await store.users.record(unspoken, retention_seconds=1000)
    after = apply(await store.users.fast_weights(tenant="acme", user=user), event)
    await store.users.append(event, after, tenant="acme", user=user, optimize_at=optimize_at)
    return after


async def said(store: Store, count: int = 10) -> FastWeights:
    for event in corrections(count, comments={1: "Always shout"}):
        state = await say(store, event)
    return state


def optimizing(store: Store, settings: Settings, scorer: PlantedScorer, **changes: object) -> Optimizing:
    def means_of(tenant: str, user: str, cancelled: Callable[[], bool]) -> Means:
        return means(scorer, **({"cancelled": cancelled} | changes))

    async def embed(tenant: str, user: str, state: FastWeights) -> None: ...

    return Optimizing(store=store, settings=settings, count=words, means=means_of, embed=embed, clock=lambda: 1000.0)


async def counted(store: Store) -> dict[tuple[str, str], int]:
    return await store.counts.read()


async def test_the_result_is_an_event_that_the_fold_serves_from(store: Store, settings: Settings) -> None:
    state = await said(store)
    outcome = await optimizing(store, settings, PlantedScorer(HELPFUL)).optimize(**KEY)

    after = await store.users.fast_weights(**KEY)
    assert outcome == "improved"
    assert after.revision == state.revision + 1
    best = after.population_under(BASE).members[0]
    assert {exemplar_for(state, 2), exemplar_for(state, 5)} <= set(best.items)
    assert fold(await store.users.events(**KEY)) == after
    assert not await store.optimizations.pending(**KEY)
    assert await counted(store) == {("optimize", "improved"): 1}


async def test_feedback_that_came_in_meanwhile_stands_and_joins_the_population(
    store: Store, settings: Settings
) -> None:
    await said(store)

    class Meanwhile(PlantedScorer):
        said = False

        async def score(self, model, items):
            if not self.said:
                self.said = True
                await say(store, feedback(11, correction="Wanted 11.", comment="Newest of all"), optimize_at=5000.0)
            return await super().score(model, items)

    await optimizing(store, settings, Meanwhile(HELPFUL)).optimize(**KEY)

    events, after = await store.users.events(**KEY), await store.users.fast_weights(**KEY)
    assert [event.kind for event in events[-2:]] == ["feedback", "population"]
    assert (events[-1].basis, events[-1].basis_clock) == (10, 10)
    assert exemplar_for(after, 11)
    assert "Newest of all" in [g.text for g in after.guidelines.values()]
    assert fold(events) == after
    # It is still due, for what came in.
    assert await store.optimizations.pending(**KEY)


async def test_what_was_removed_meanwhile_is_in_no_member(store: Store, settings: Settings) -> None:
    gone = exemplar_for(await said(store), 2)

    class Meanwhile(PlantedScorer):
        removed = False

        async def score(self, model, items):
            if not self.removed:
                self.removed = True
                edits = (Edit(op="remove", id=gone),)
                await say(store, EditEvent(revision=11, at=0.0, by="user", edits=edits))
            return await super().score(model, items)

    await optimizing(store, settings, Meanwhile(HELPFUL)).optimize(**KEY)
    after = await store.users.fast_weights(**KEY)
    assert gone not in after.exemplars
    assert all(gone not in member.items for member in after.population_under(BASE).members)


async def test_an_event_that_comes_between_reading_and_appending_costs_a_second_try_only(
    store: Store, settings: Settings
) -> None:
    await said(store)
    append, conflicts = store.users.append, 0

    async def overtaken(event, after, **kwargs):
        nonlocal conflicts
        if isinstance(event, PopulationEvent) and conflicts < 3:
            conflicts += 1
            store.users.append = append
            await say(store, feedback(event.revision, correction=f"Wanted {event.revision}."))
            store.users.append = overtaken
        return await append(event, after, **kwargs)

    store.users.append = overtaken
    assert await optimizing(store, settings, PlantedScorer(HELPFUL)).optimize(**KEY) == "improved"
    events = await store.users.events(**KEY)
    assert [event.kind for event in events[-4:]] == ["feedback"] * 3 + ["population"]


@pytest.mark.parametrize(
    ("error", "outcome", "seconds"),
    [
        (EngineUnavailable("not there"), "scorer-away", AWAY_SECONDS),
        (UpstreamRejected("no such adapter", status=404), "scorer-refused", REFUSED_SECONDS),
        (ContextLengthExceeded("too long"), "scorer-refused", REFUSED_SECONDS),
    ],
)
async def test_a_scorer_that_fails_leaves_the_last_population_and_is_asked_again_later(
    store: Store, settings: Settings, error: Exception, outcome: str, seconds: float
) -> None:
    await said(store)
    await optimizing(store, settings, PlantedScorer(HELPFUL)).optimize(**KEY)
    await say(store, feedback(12, correction="Wanted 12."))
    before = await store.users.fast_weights(**KEY)

    class Away(PlantedScorer):
        async def score(self, model, items):
            raise error

    assert await optimizing(store, settings, Away({})).optimize(**KEY) == outcome
    assert await store.users.fast_weights(**KEY) == before
    assert await counted(store) == {("optimize", "improved"): 1, ("optimize", outcome): 1}
    assert await store.optimizations.due(now=1000.0) == []
    assert await store.optimizations.due(now=1000.0 + seconds) == [("acme", "alice")]


async def test_a_search_that_breaks_is_counted_and_tried_again_much_later(store: Store, settings: Settings) -> None:
    class Broken(PlantedScorer):
        async def score(self, model, items):
            raise KeyError("a mistake of ours")

    await said(store)

    assert await optimizing(store, settings, Broken({})).optimize(**KEY) == "failed"
    assert await counted(store) == {("optimize", "failed"): 1}
    assert await store.optimizations.due(now=1000.0) == []
    assert await store.optimizations.due(now=1e9) == [("acme", "alice")]


async def test_two_workers_do_not_optimize_the_same_user_at_once(store: Store, settings: Settings) -> None:
    await said(store)
    scorer = PlantedScorer(HELPFUL)
    outcomes = await asyncio.gather(*(optimizing(store, settings, scorer).optimize(**KEY) for _ in range(2)))
    assert sorted(map(str, outcomes)) == ["None", "improved"]
    assert [event.kind for event in await store.users.events(**KEY)].count("population") == 1


async def test_a_message_that_comes_twice_changes_nothing(store: Store, settings: Settings) -> None:
    await said(store)
    scorer = PlantedScorer(HELPFUL)
    await optimizing(store, settings, scorer).optimize(**KEY)
    once, scored = await store.users.fast_weights(**KEY), scorer.scored
    await store.optimizations.ask_for(**KEY, at=0.0)

    assert await optimizing(store, settings, scorer).optimize(**KEY) == "kept"
    assert (await store.users.fast_weights(**KEY), scorer.scored) == (once, scored)
    assert not await store.optimizations.pending(**KEY)


@pytest.mark.parametrize("number", [2, 3])
async def test_what_was_edited_since_is_looked_at_with_the_feedback_that_there_was(
    store: Store, settings: Settings, number: int
) -> None:
    """Be it of what every member holds, or of what they do without."""
    state = await said(store)
    scorer = PlantedScorer(HELPFUL)
    await optimizing(store, settings, scorer).optimize(**KEY)
    before, scored = await store.users.fast_weights(**KEY), scorer.scored
    change = Edit(op="change", id=exemplar_for(state, number), reply="Wanted otherwise.")
    assert {change.id in member.items for member in before.population.members} == {number == 2}
    await say(store, EditEvent(revision=before.revision + 1, at=0.0, by="user", edits=(change,)))

    assert await optimizing(store, settings, scorer).optimize(**KEY) in ("kept", "improved")
    after = await store.users.fast_weights(**KEY)
    assert scorer.scored > scored
    assert (after.population.basis, after.population.clock) == (before.revision + 1, before.clock)
    assert all(after.resolve(change.id or "") in member.items for member in after.population.members)
    assert not await store.optimizations.pending(**KEY)
    assert await optimizing(store, settings, scorer).optimize(**KEY) == "kept"
    assert await store.users.fast_weights(**KEY) == after


async def test_what_is_edited_while_a_search_runs_is_looked_at_by_the_next(store: Store, settings: Settings) -> None:
    name = exemplar_for(await said(store), 2)

    class Meanwhile(PlantedScorer):
        edited = False

        async def score(self, model, items):
            if not self.edited:
                self.edited = True
                change = Edit(op="change", id=name, reply="Wanted otherwise.")
                await say(store, EditEvent(revision=11, at=0.0, by="user", edits=(change,)), optimize_at=5000.0)
            return await super().score(model, items)

    await optimizing(store, settings, Meanwhile(HELPFUL)).optimize(**KEY)
    assert await store.optimizations.pending(**KEY)


async def test_too_little_feedback_is_settled(store: Store, settings: Settings, redis_url: str) -> None:
    state = await said(store, 2)
    assert await optimizing(store, settings, PlantedScorer(HELPFUL)).optimize(**KEY) == "too-little"
    assert await store.users.fast_weights(**KEY) == state
    assert not await store.optimizations.pending(**KEY)
    assert not Redis.from_url(redis_url).keys("*optimizing*")


async def test_one_round_sends_each_user_who_is_due_once(store: Store) -> None:
    jobs = RecordedJobs()
    await said(store, 1)
    assert await send_due(store, jobs, now=10.0) == [("acme", "alice")]
    assert await send_due(store, jobs, now=11.0) == []
    assert jobs.optimized == [("acme", "alice")]
    # The message, or its worker, was lost.
    assert await send_due(store, jobs, now=10.0 + SENT_SECONDS) == [("acme", "alice")]


@pytest.mark.parametrize("user", ["alice", "bob\u0001", "名前"])
async def test_users_are_due_under_any_name(store: Store, user: str) -> None:
    await store.optimizations.ask_for(tenant="acme", user=user, at=1.0)
    assert await send_due(store, RecordedJobs(), now=2.0) == [("acme", user)]
