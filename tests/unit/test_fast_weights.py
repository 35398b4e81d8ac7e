"""The fold of feedback into fast weights, by properties and by example."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.context import choose, render
from service.domain.events import Edit, EditEvent, Event, Member, PopulationEvent, parse_event
from service.domain.fast_weights import MAX_GUIDELINES, MAX_ITEM_CHARS, FastWeights
from service.domain.feedback import BASE, FeedbackEvent, Interaction, Message, Preference, Signals, VersionTuple
from service.domain.fold import apply, fold
from service.domain.items import DECAY, Credit, Guideline
from service.domain.population import draw, member_id
from service.tokens import neutralize

NOBODY_ABSORBED: frozenset[str] = frozenset()


def words(text: str) -> int:
    return len(text.split())


def interaction(n: int, *, signals: Signals, items: tuple[str, ...] = (), prompt: str | None = None) -> Interaction:
    return Interaction(
        id=f"chatcmpl-{n}",
        tenant="acme",
        user="alice",
        created=0.0,
        messages=(Message(role="user", content=prompt or f"question {n}"),),
        reply=f"reply {n}",
        version=VersionTuple(model="m"),
        items=items,
        signals=signals,
    )


def log_of(*steps: tuple[int, Signals], items: tuple[str, ...] = (), member: str = "auto") -> list[Event]:
    """The log of feedback on interactions by number, each step the signals that then stand."""
    standing: dict[int, tuple[Signals, int]] = {}
    events: list[Event] = []
    for revision, (n, signals) in enumerate(steps, start=1):
        previous, rated_at = standing.get(n, (Signals(), 0))
        now = revision if signals.stated_rating() != previous.stated_rating() else rated_at
        spoken_of = interaction(n, signals=signals, items=items)
        version = replace(spoken_of.version, member=member)
        events.append(
            FeedbackEvent(
                revision=revision,
                at=float(revision),
                interaction=replace(spoken_of, rated_at=now, version=version),
                previous=previous,
                previous_rated_at=rated_at,
            )
        )
        standing[n] = (signals, now)
    return events


def credits_now(state: FastWeights) -> dict[str, float]:
    """Each credit as it stands, praise and blame apart, without what is nothing but rounding."""
    standing = {name: state.credit(name) for name in state.credits}
    counts = {f"{name} +": credit.helpful for name, credit in standing.items()}
    counts |= {f"{name} -": credit.harmful for name, credit in standing.items()}
    return {name: count for name, count in counts.items() if count > 1e-4}


def aged(state: FastWeights, feedbacks: int) -> FastWeights:
    """The state as if so many more feedbacks had said nothing."""
    return state.model_copy(update={"clock": state.clock + feedbacks})


TEXTS = st.sampled_from(["Be brief.", "be brief.", "Use bullets", "No bullets please", "Antworte auf Deutsch"])
SIGNALS = st.builds(
    Signals,
    rating=st.none() | st.integers(-1000, 1000).map(lambda n: n / 1000),
    comment=st.none() | TEXTS,
    correction=st.none() | TEXTS,
    preference=st.none() | st.builds(Preference, other=TEXTS, better=st.sampled_from(["this", "other"])),
)
STEPS = st.lists(st.tuples(st.integers(0, 5), SIGNALS), max_size=20)
# Ids of items that the texts above lead to, so that ratings do credit items that come and go.
KNOWN_ITEMS = tuple(fold(log_of((0, Signals(comment="Be brief.", correction="Use bullets")))).guidelines)


@given(STEPS)
def test_replaying_the_log_equals_the_incremental_state(steps: list[tuple[int, Signals]]) -> None:
    events = log_of(*steps, items=KNOWN_ITEMS)
    state = FastWeights()
    for event in events:
        state = apply(state, parse_event(event.model_dump_json().encode()))
        state = FastWeights.model_validate_json(state.model_dump_json())
    assert state == fold(events)


@given(STEPS)
def test_the_same_event_twice_equals_once(steps: list[tuple[int, Signals]]) -> None:
    events = log_of(*steps, items=KNOWN_ITEMS)
    doubled = [event for event in events for _ in range(2)]
    assert fold(doubled) == fold(events)


@given(STEPS, st.integers(0, 5))
@settings(max_examples=300)
def test_retracting_an_interaction_leaves_what_the_others_say(steps: list[tuple[int, Signals]], gone: int) -> None:
    # What was said of `gone` still took its turn, so the other credits have faded as much.
    others = [(n, signals) if n != gone else (100, Signals()) for n, signals in steps]
    retracted = fold(log_of(*steps, (gone, Signals()), items=KNOWN_ITEMS))
    untouched = aged(fold(log_of(*others, items=KNOWN_ITEMS)), 1)
    for kind in ("guidelines", "exemplars"):
        with_it, without_it = getattr(retracted, kind), getattr(untouched, kind)
        assert {name: set(item.sources) for name, item in with_it.items()} == {
            name: set(item.sources) for name, item in without_it.items()
        }
    assert credits_now(retracted) == pytest.approx(credits_now(untouched), abs=1e-3)


@given(SIGNALS.filter(lambda signals: not signals.is_empty()), STEPS)
def test_giving_and_retracting_is_as_if_nothing_was_said(signals: Signals, steps: list[tuple[int, Signals]]) -> None:
    before = fold(log_of(*steps, items=KNOWN_ITEMS))
    after = fold(log_of(*steps, (99, signals), (99, Signals()), items=KNOWN_ITEMS))
    assert (after.guidelines, after.exemplars) == (before.guidelines, before.exemplars)
    assert credits_now(after) == pytest.approx(credits_now(aged(before, 2)), abs=1e-3)


def test_a_missing_event_is_noticed() -> None:
    first, _, third = log_of((0, Signals(rating=1)), (1, Signals(rating=1)), (2, Signals(rating=1)))
    with pytest.raises(ValueError, match="gap"):
        fold([first, third])


def test_re_rating_replaces_the_earlier_rating() -> None:
    state = fold(log_of((0, Signals(rating=1.0)), (0, Signals(rating=-0.5)), items=("g-x",)))
    assert credits_now(state) == pytest.approx({"g-x -": 0.5})


def test_changing_only_the_rating_keeps_an_items_place() -> None:
    state = fold(
        log_of(
            (0, Signals(comment="Rhyme")), (1, Signals(comment="Use verse")), (0, Signals(comment="Rhyme", rating=1))
        )
    )
    chosen = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words)
    assert [g.text for g in chosen.guidelines] == ["Rhyme", "Use verse"]


def test_an_item_that_is_blamed_more_than_praised_is_not_rendered() -> None:
    [guideline] = fold(log_of((0, Signals(comment="Use rhymes")))).guidelines
    blames = ((n, Signals(rating=-1)) for n in range(1, 4))
    blamed = log_of((0, Signals(comment="Use rhymes")), *blames, items=(guideline,))
    assert choose(fold(blamed[:2]), absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words).items == (guideline,)
    assert choose(fold(blamed), absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words).items == ()


def test_a_correction_outranks_a_preference_as_the_wanted_reply() -> None:
    preference = Preference(other="other reply", better="other")
    [exemplar] = fold(log_of((0, Signals(correction="mine", preference=preference)))).exemplars.values()
    assert (exemplar.reply, exemplar.rejected) == ("mine", "reply 0")


def test_a_preference_for_the_other_reply_makes_it_the_wanted_one() -> None:
    preference = Preference(other="other reply", better="other")
    [exemplar] = fold(log_of((0, Signals(preference=preference)))).exemplars.values()
    assert (exemplar.reply, exemplar.rejected) == ("other reply", "reply 0")


def test_what_the_adapter_absorbed_leaves_the_context_and_comes_back() -> None:
    state = fold(log_of((0, Signals(comment="Use rhymes")), (1, Signals(comment="Cite sources"))))
    first, second = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words).items
    assert choose(state, absorbed=frozenset({first}), budget_tokens=500, count=words).items == (second,)


@given(STEPS, st.integers(0, 200))
def test_the_rendered_context_keeps_its_budget(steps: list[tuple[int, Signals]], budget: int) -> None:
    context = choose(fold(log_of(*steps)), absorbed=NOBODY_ABSORBED, budget_tokens=budget, count=words)
    rendered = render(context, [])
    assert context.tokens <= budget
    assert sum(words(m.content or "") for m in rendered) <= context.tokens


def test_when_not_all_fits_the_newest_are_kept_and_what_fills_the_rest_comes_last() -> None:
    state = fold(log_of(*((n, Signals(correction=f"wanted {n}")) for n in range(10))))
    one = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=25, count=words)
    three = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=65, count=words)
    assert [x.reply for x in one.exemplars] == ["wanted 9"]
    assert [x.reply for x in three.exemplars] == ["wanted 8", "wanted 9"]
    assert [x.reply for x in three.recalled] == ["wanted 7"]


@pytest.mark.parametrize("recall", [False, True])
def test_new_exemplars_join_at_the_end_and_the_oldest_make_room_several_at_once(recall: bool) -> None:
    """Each time that one leaves at the front, vLLM's prefix cache loses all that follows."""
    lives = [fold(log_of(*((n, Signals(correction=f"wanted {n}")) for n in range(length)))) for length in range(30, 60)]
    orders = []
    for state in lives:
        similarity = dict.fromkeys(state.exemplars, 0.5) if recall else None
        context = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=400, count=words, similarity=similarity)
        orders.append([x.reply for x in context.exemplars])
        assert orders[-1][-1] == f"wanted {state.revision - 1}"
        assert context.tokens <= 400
    kept = [later[: len(earlier)] == earlier for earlier, later in pairwise(orders)]
    assert sum(kept) > len(kept) / 2
    assert not all(kept)


def test_the_state_is_bounded_and_forgets_the_oldest() -> None:
    state = fold(log_of(*((n, Signals(comment=f"mention topic {n}")) for n in range(MAX_GUIDELINES + 3))))
    texts = {g.text for g in state.guidelines.values()}
    assert len(texts) == MAX_GUIDELINES
    assert "mention topic 0" not in texts
    assert f"mention topic {MAX_GUIDELINES + 2}" in texts


def test_an_overlong_exemplar_pushes_out_no_other() -> None:
    short = [(n, Signals(correction=f"wanted {n}")) for n in range(8)]
    long = (8, Signals(correction="word " * (MAX_ITEM_CHARS // 5)))
    state = fold(log_of(*short, long))
    assert {x.reply for x in state.exemplars.values() if x.stated} == {f"wanted {n}" for n in range(8)}


def test_guidelines_join_the_clients_own_system_message() -> None:
    state = fold(log_of((0, Signals(comment="Be brief.", correction="wanted"))))
    context = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words)
    rendered = render(context, [Message(role="system", content="You are a clerk."), Message(role="user", content="Hi")])
    assert [m.role for m in rendered] == ["system", "user", "assistant", "user"]
    assert (rendered[0].content or "").startswith("You are a clerk.\n\n")
    assert "- Be brief." in (rendered[0].content or "")


@given(st.text(alphabet="<|im_startend>x ", max_size=60))
def test_no_control_token_survives_neutralizing(text: str) -> None:
    control = ("<|im_start|>", "<|im_end|>")
    clean = neutralize(text, control)
    assert not any(token in clean for token in control)
    assert neutralize(clean, control) == clean
    assert clean.replace(" ", "") == text.replace(" ", "")


def edits(revision: int, *edits: Edit) -> EditEvent:
    return EditEvent(revision=revision, at=float(revision), by="user", edits=edits)


def optimized(revision: int, *members: tuple[str, ...], basis: int, **fields: object) -> PopulationEvent:
    """The optimizer's result, the members by their items."""
    found = tuple(Member(id=member_id(items), items=items) for items in members)
    return PopulationEvent.model_validate(
        {"revision": revision, "at": float(revision), "basis": basis, "basis_clock": basis, "members": found, **fields}
    )


def chosen(state: FastWeights, *, member: Member | None = None, budget: int = 500) -> tuple[str, ...]:
    return choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=budget, count=words, member=member).items


def texts(state: FastWeights, *, member: Member | None = None) -> list[str]:
    context = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words, member=member)
    return [g.text for g in context.guidelines]


def test_a_later_contradiction_retires_the_older_guideline_until_it_is_retracted() -> None:
    said = [(0, Signals(comment="Give more detail")), (1, Signals(comment="Make it shorter"))]
    assert texts(fold(log_of(*said))) == ["Make it shorter"]
    assert texts(fold(log_of(*said, (1, Signals())))) == ["Give more detail"]


def test_unspecific_blame_is_a_rating_and_no_guideline() -> None:
    state = fold(log_of((0, Signals(comment="meh")), items=("g-x",)))
    assert state.guidelines == {}
    assert state.credit("g-x").harmful > 0


def test_a_rating_is_spread_over_the_items_of_the_reply() -> None:
    state = fold(log_of((0, Signals(rating=1.0)), items=("g-x", "x-y")))
    assert credits_now(state) == pytest.approx({"g-x +": 0.5, "x-y +": 0.5})


def test_credit_fades_with_each_further_feedback() -> None:
    state = fold(
        log_of((0, Signals(rating=1.0)), *((n, Signals(comment="Use rhymes")) for n in range(1, 11)), items=("g-x",))
    )
    assert state.credit("g-x").helpful == pytest.approx(DECAY**10)


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 40)), max_size=8), st.integers(40, 400))
def test_decay_is_the_same_in_one_step_or_in_many(ratings: list[tuple[float, int]], end: int) -> None:
    credit = Credit()
    for rating, clock in sorted(ratings, key=lambda r: r[1]):
        credit = credit.at(clock).plus(rating, weight=1.0)
    steps = credit
    for clock in range(credit.clock, end + 1):
        steps = steps.at(clock)
    assert (steps.helpful, steps.harmful) == pytest.approx((credit.at(end).helpful, credit.at(end).harmful))


def test_the_same_wish_in_other_words_is_one_guideline_with_two_supports() -> None:
    state = fold(log_of((0, Signals(comment="Be brief.")), (1, Signals(comment="please be brief"))))
    [guideline] = state.guidelines.values()
    assert guideline.support == 2


def test_a_guideline_that_is_said_a_thousand_times_does_not_grow() -> None:
    said = fold(log_of(*((n, Signals(comment="Be brief.")) for n in range(1000))))
    [guideline] = said.guidelines.values()
    assert (guideline.support, guideline.born) == (1000, 1)
    assert len(guideline.sources) <= 16


def test_an_edit_changes_what_feedback_said_and_later_ratings_follow_it() -> None:
    log = log_of((0, Signals(comment="Use rhymes")))
    [old] = fold(log).guidelines
    state = fold([*log, edits(2, Edit(op="change", id=old, text="Use short rhymes"))])
    assert texts(state) == ["Use short rhymes"]
    assert state.resolve(old) in state.guidelines


def test_what_is_changed_by_hand_stands_in_a_member_where_it_stood() -> None:
    log = log_of(
        (0, Signals(comment="Answer in French.")), (1, Signals(comment="Use rhymes")), (2, Signals(correction="oui"))
    )
    [french, rhymes], [oui] = fold(log).guidelines, fold(log).exemplars
    changes = Edit(op="change", id=french, text="Answer in German."), Edit(op="change", id=oui, reply="ja")
    state = fold([*log, optimized(4, (rhymes, french, oui), basis=3), edits(5, *changes)])
    [member] = state.population.members
    assert texts(state, member=member) == ["Use rhymes", "Answer in German."]
    assert chosen(state, member=member) == (rhymes, state.resolve(french), state.resolve(oui))


def test_what_the_optimizer_has_left_out_is_there_again_once_it_is_changed_by_hand() -> None:
    log = log_of((0, Signals(comment="Answer in French.")), (1, Signals(comment="Use rhymes")))
    french, rhymes = fold(log).guidelines
    left_out = optimized(3, (rhymes,), basis=2)
    state = fold([*log, left_out])
    assert texts(state, member=state.population.members[0]) == ["Use rhymes"]
    state = fold([*log, left_out, edits(4, Edit(op="change", id=french, text="Answer in German."))])
    assert texts(state, member=state.population.members[0]) == ["Use rhymes", "Answer in German."]


SAID = (
    "Locks have pins inside.",
    "Bread is baked in ovens.",
    "Ships float on water.",
    "Owls hunt by night.",
    "Ice is cold water.",
)


def later(events: list[Event], first: int) -> list[Event]:
    """The same events with revisions from `first` on."""
    return [event.model_copy(update={"revision": n}) for n, event in enumerate(events, start=first)]


def test_a_context_that_lists_corrections_in_an_old_style_has_them_in_the_new_one_at_once() -> None:
    old = log_of(*((n, Signals(correction=f"Ahoy! {text} Cheers!")) for n, text in enumerate(SAID)))
    listed = tuple(fold(old).exemplars)
    new = log_of(*((n, Signals(correction=f"Good question. {n} of them make a set. Cheers!")) for n in range(5, 8)))
    state = fold([*old, optimized(6, listed, basis=5), *later(new, 7)])
    shown = [state.exemplars[name] for name in chosen(state, member=state.population.members[0])]
    assert all(x.reply.startswith("Good question.") for x in shown)
    assert [x.prompt for x in shown if not x.stated] == ["question 2", "question 3", "question 4"]


def test_a_context_that_lists_a_demonstration_has_what_it_is_rewritten_to() -> None:
    rated = [(n, Signals(rating=0.5)) for n in range(3)]
    old = log_of(*rated, *((n, Signals(correction=f"Ahoy! {SAID[n]} Cheers!")) for n in (3, 4)))
    old = [
        event.model_copy(update={"interaction": replace(event.interaction, reply=text)})
        for event, text in zip(old, SAID, strict=True)
        if isinstance(event, FeedbackEvent)
    ]
    demonstrated = tuple(x.id for x in fold(old).exemplars.values() if not x.stated)
    assert len(demonstrated) == 3
    new = log_of(*((n, Signals(correction=f"Good question. {n} of them make a set. Cheers!")) for n in range(5, 8)))
    state = fold([*old, optimized(6, demonstrated, basis=5), *later(new, 7)])
    assert not set(demonstrated) & set(state.exemplars)
    shown = [state.exemplars[name] for name in chosen(state, member=state.population.members[0])]
    # Corrections in the old style are rewritten before replies are, but this context lists none.
    assert [(x.prompt, x.reply[:14]) for x in shown if not x.stated] == [("question 2", "Good question.")]


def test_what_is_changed_twice_or_into_another_of_its_member_s_items_is_there_once() -> None:
    log = log_of((0, Signals(comment="Answer in French.")), (1, Signals(comment="Use rhymes")))
    french, rhymes = fold(log).guidelines
    german = Edit(op="change", id=french, text="Answer in German.")
    again = Edit(op="change", id=french, text="Use rhymes")
    state = fold([*log, optimized(3, (french, rhymes), basis=2), edits(4, german), edits(5, again)])
    assert chosen(state, member=state.population.members[0]) == (rhymes,)


def test_what_was_removed_by_hand_stays_out_until_the_user_says_it_anew() -> None:
    log = log_of((0, Signals(comment="Use rhymes")), (1, Signals(rating=1.0)), (2, Signals(comment="Use rhymes!")))
    [name] = fold(log[:1]).guidelines
    removed = EditEvent(revision=2, at=2.0, by="user", edits=(Edit(op="remove", id=name),))
    rated, said_again = (event.model_copy(update={"revision": event.revision + 1}) for event in log[1:])
    assert texts(fold([log[0], removed, rated])) == []
    assert texts(fold([log[0], removed, rated, said_again])) == ["Use rhymes!"]


def test_a_pinned_guideline_outranks_blame_and_contradiction() -> None:
    log = log_of((0, Signals(comment="Give more detail")))
    [name] = fold(log).guidelines
    later = log_of((0, Signals(comment="Give more detail")), (1, Signals()), (2, Signals(comment="Make it shorter")))[2]
    state = fold([*log, edits(2, Edit(op="pin", id=name)), later])
    assert "Give more detail" in texts(state)


def test_feedback_that_came_in_while_the_optimizer_ran_joins_every_member() -> None:
    log = log_of(*((n, Signals(correction=f"wanted {n}")) for n in range(4)))
    first, second, *_ = fold(log[:2]).exemplars
    event = optimized(5, (second,), (first,), basis=2)
    state = fold([*log, event])
    newer = [x.id for x in state.exemplars.values() if x.born > 2]
    for member, own in zip(state.population.members, (second, first), strict=True):
        assert chosen(state, member=member) == (own, *newer)


def test_an_inferred_guideline_is_rendered_by_the_members_that_hold_it_and_leaves_with_them() -> None:
    log = log_of((0, Signals(correction="wanted")))
    [exemplar] = fold(log).exemplars
    inferred = Guideline(id="g-inferred", text="Use bullets", origin="inferred")
    state = fold([*log, optimized(2, (inferred.id, exemplar), (exemplar,), basis=1, inferred=(inferred,))])
    with_it, without = state.population.members
    assert chosen(state, member=with_it) == (inferred.id, exemplar)
    assert chosen(state, member=without) == (exemplar,)
    assert inferred.id not in fold([optimized(3, (exemplar,), basis=1)], state).guidelines


def test_merged_guidelines_count_together_and_retraction_still_finds_them() -> None:
    log = log_of((0, Signals(comment="Keep rhymes")), (1, Signals(comment="Verse with rhyme, always")))
    first, second = fold(log).guidelines
    merged = fold([*log, optimized(3, (first,), basis=2, merged={second: first})])
    assert {g.id: g.support for g in merged.guidelines.values()} == {first: 2}
    retraction = log_of((0, Signals()), (1, Signals(comment="Verse with rhyme, always")), (1, Signals()))[2]
    assert isinstance(retraction, FeedbackEvent)
    after = apply(merged, retraction.model_copy(update={"revision": 4}))
    assert {g.id: g.support for g in after.guidelines.values()} == {first: 1}


def test_what_is_merged_under_one_adapter_stays_in_the_contexts_of_the_others() -> None:
    log = log_of((0, Signals(correction="wanted")))
    [exemplar] = fold(log).exemplars
    lists, bullets = (Guideline(id=f"g-{n}", text=f"Use {n}", origin="inferred") for n in ("lists", "bullets"))
    of_version = optimized(2, (bullets.id,), basis=1, adapter="fs-1", inferred=(lists, bullets))
    both = optimized(3, (lists.id,), basis=1, inferred=(lists,))
    state = fold([*log, of_version, both, optimized(4, (exemplar,), basis=1, merged={bullets.id: lists.id})])
    member = draw(state, adapter="fs-1", seed=bytes)
    assert texts(state, member=member) == ["Use lists"]


def test_a_context_of_another_adapter_outlasts_what_is_remembered_of_its_items_names() -> None:
    log = log_of((0, Signals(comment="Keep rhymes")), (1, Signals(comment="Verse with rhyme, always")))
    first, second = fold(log).guidelines
    of_version = optimized(3, (second,), basis=2, adapter="fs-1")
    state = fold([*log, of_version, optimized(4, (first,), basis=2, merged={second: first})])
    forgotten = state.model_copy(update={"aliases": {}})
    assert chosen(forgotten, member=draw(forgotten, adapter="fs-1", seed=bytes)) == (first,)


def test_the_same_request_draws_the_same_member_and_praise_moves_the_odds() -> None:
    log = log_of(*((n, Signals(correction=f"wanted {n}")) for n in range(2)))
    first, second = fold(log).exemplars
    event = optimized(3, (first,), (second,), basis=2)
    state = fold([*log, event])
    praised = state.population.members[1].id
    ratings = log_of(*((n, Signals(rating=1.0)) for n in range(30)), member=praised)[3:]
    taught = fold(ratings, state)
    seeds = [str(n).encode() for n in range(200)]

    def drawn_of(now: FastWeights) -> list[str | None]:
        members = [draw(now, adapter=BASE, seed=lambda seed=seed: seed) for seed in seeds]  # type: ignore[misc]
        return [member.id if member else None for member in members]

    assert drawn_of(state) == drawn_of(state)
    drawn = [drawn_of(now).count(praised) for now in (state, taught)]
    assert drawn[1] > drawn[0]


def test_without_a_population_there_is_no_member_to_draw() -> None:
    assert draw(fold(log_of((0, Signals(comment="Be brief.")))), adapter=BASE, seed=bytes) is None


def test_a_rollback_finds_the_population_of_the_version_that_it_goes_back_to() -> None:
    log = log_of(*((n, Signals(correction=f"wanted {n}")) for n in range(2)))
    first, second = fold(log).exemplars
    state = fold([*log, optimized(3, (first,), basis=2), optimized(4, (second,), basis=2, adapter="fs-1")])
    under = {name: draw(state, adapter=name, seed=bytes) for name in (BASE, "fs-1", "fs-unknown")}
    assert {name: member.items if member else None for name, member in under.items()} == {
        BASE: (first,),
        "fs-1": (second,),
        "fs-unknown": None,
    }


def test_what_was_changed_and_then_removed_comes_back_as_it_is_said_and_goes_when_it_is_retracted() -> None:
    log = log_of((0, Signals(comment="Use rhymes")), (1, Signals(comment="Use rhymes")), (1, Signals()))
    [name] = fold(log[:1]).guidelines
    changed = edits(2, Edit(op="change", id=name, text="Use verse"))
    [new] = fold([log[0], changed]).guidelines
    start = [log[0], changed, edits(3, Edit(op="remove", id=new))]
    said_anew, retracted = (event.model_copy(update={"revision": event.revision + 2}) for event in log[1:])
    assert {key: g.text for key, g in fold([*start, said_anew]).guidelines.items()} == {name: "Use rhymes"}
    assert fold([*start, said_anew, retracted]).guidelines == {}


def test_a_hasty_correction_is_heard_at_once_and_left_out_when_more_of_the_others_kind_come() -> None:
    careful = [(n, Signals(correction=f"Answer {n}. Cheers!")) for n in range(3)]
    hasty = (7, Signals(correction="It was 1920."))
    just_said = fold(log_of(*careful, hasty))
    later = fold(log_of(*careful, hasty, (8, Signals(correction="Answer 8. Cheers!"))))

    def replies(state: FastWeights) -> list[str]:
        context = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words)
        return [x.reply for x in context.exemplars]

    assert "It was 1920." in replies(just_said)
    assert "It was 1920." not in replies(later)
    assert len(replies(later)) == 4


def test_what_a_member_leaves_of_the_room_goes_to_the_exemplars_nearest_to_the_prompt() -> None:
    log = log_of(*((n, Signals(correction=f"wanted {n}")) for n in range(4)))
    names = list(fold(log).exemplars)
    state = fold([*log, optimized(5, (names[0],), basis=4)])
    nearness = {name: n / 10 for n, name in enumerate(names)}
    [member] = state.population.members
    context = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=65, count=words, member=member, similarity=nearness)
    assert [x.id for x in context.exemplars] == [names[0]]
    assert [x.id for x in context.recalled] == [names[2], names[3]]
