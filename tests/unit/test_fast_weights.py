"""The fold of feedback into fast weights, by properties and by example."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.fast_weights import (
    MAX_ITEMS,
    FastWeights,
    apply,
    choose,
    fold,
    neutralize,
    render,
)
from service.domain.feedback import FeedbackEvent, Interaction, Message, Preference, Signals, VersionTuple

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


def log_of(*steps: tuple[int, Signals], items: tuple[str, ...] = ()) -> list[FeedbackEvent]:
    """The log of feedback on interactions by number, each step the signals that then stand."""
    standing: dict[int, Signals] = {}
    events = []
    for revision, (n, signals) in enumerate(steps, start=1):
        events.append(
            FeedbackEvent(
                revision=revision,
                at=float(revision),
                interaction=interaction(n, signals=signals, items=items),
                previous=standing.get(n, Signals()),
            )
        )
        standing[n] = signals
    return events


def without_clock(state: FastWeights) -> FastWeights:
    return state.model_copy(update={"revision": 0, "updated": 0.0})


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
        state = apply(state, FeedbackEvent.model_validate_json(event.model_dump_json()))
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
    others = [(n, signals) for n, signals in steps if n != gone]
    retracted = fold(log_of(*steps, (gone, Signals()), items=KNOWN_ITEMS))
    untouched = fold(log_of(*others, items=KNOWN_ITEMS))
    for kind in ("guidelines", "exemplars"):
        with_it, without_it = getattr(retracted, kind), getattr(untouched, kind)
        assert {name: set(item.sources) for name, item in with_it.items()} == {
            name: set(item.sources) for name, item in without_it.items()
        }
    assert retracted.credits == untouched.credits


@given(SIGNALS.filter(lambda signals: not signals.is_empty()), STEPS)
def test_giving_and_retracting_is_as_if_nothing_was_said(signals: Signals, steps: list[tuple[int, Signals]]) -> None:
    before = fold(log_of(*steps, items=KNOWN_ITEMS))
    after = fold(log_of(*steps, (99, signals), (99, Signals()), items=KNOWN_ITEMS))
    assert without_clock(after) == without_clock(before)


def test_a_missing_event_is_noticed() -> None:
    first, _, third = log_of((0, Signals(rating=1)), (1, Signals(rating=1)), (2, Signals(rating=1)))
    with pytest.raises(ValueError, match="gap"):
        fold([first, third])


def test_re_rating_replaces_the_earlier_rating() -> None:
    state = fold(log_of((0, Signals(rating=1.0)), (0, Signals(rating=-0.5)), items=("g-x",)))
    assert (state.credits["g-x"].helpful, state.credits["g-x"].harmful) == (0.0, 0.5)


def test_changing_only_the_rating_keeps_an_items_place() -> None:
    state = fold(
        log_of((0, Signals(comment="first")), (1, Signals(comment="second")), (0, Signals(comment="first", rating=1)))
    )
    chosen = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words)
    assert [g.text for g in chosen.guidelines] == ["first", "second"]


def test_an_item_that_is_blamed_more_than_praised_is_not_rendered() -> None:
    [guideline] = fold(log_of((0, Signals(comment="rhyme")))).guidelines
    blamed = log_of((0, Signals(comment="rhyme")), (1, Signals(rating=-1)), (2, Signals(rating=-1)), items=(guideline,))
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
    state = fold(log_of((0, Signals(comment="first")), (1, Signals(comment="second"))))
    first, second = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=500, count=words).items
    assert choose(state, absorbed=frozenset({first}), budget_tokens=500, count=words).items == (second,)


@given(STEPS, st.integers(0, 200))
def test_the_rendered_context_keeps_its_budget(steps: list[tuple[int, Signals]], budget: int) -> None:
    context = choose(fold(log_of(*steps)), absorbed=NOBODY_ABSORBED, budget_tokens=budget, count=words)
    rendered = render(context, [])
    assert context.tokens <= budget
    assert sum(words(m.content or "") for m in rendered) <= context.tokens


def test_when_not_all_fits_the_newest_are_kept_in_order_of_age() -> None:
    state = fold(log_of(*((n, Signals(correction=f"wanted {n}")) for n in range(10))))
    one = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=25, count=words)
    three = choose(state, absorbed=NOBODY_ABSORBED, budget_tokens=65, count=words)
    assert [x.reply for x in one.exemplars] == ["wanted 9"]
    assert [x.reply for x in three.exemplars] == ["wanted 7", "wanted 8", "wanted 9"]


def test_the_state_is_bounded_and_forgets_the_oldest() -> None:
    state = fold(log_of(*((n, Signals(comment=f"rule {n}")) for n in range(MAX_ITEMS + 3))))
    texts = {g.text for g in state.guidelines.values()}
    assert len(texts) == MAX_ITEMS
    assert "rule 0" not in texts
    assert f"rule {MAX_ITEMS + 2}" in texts


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
