"""Which context items an adapter makes unnecessary: by what their absence costs, alone and together."""

from dataclasses import replace

import pytest

from service.domain.fast_weights import FastWeights
from service.domain.items import Exemplar, Guideline
from tests.candidates import candidate, heldout, random_adapter
from tests.consolidation_data import corrections, user_log
from workers.consolidation.candidates import OwnContext
from workers.consolidation.handoff import (
    COSTS_NOTHING_NATS,
    MAX_ASKED_ALONE,
    MAX_PASSES,
    Answer,
    context_tokens,
    hand_off,
    search,
)
from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.margins import Arm, measure, rows_with
from workers.consolidation.rounds import in_rounds
from workers.consolidation.speaker import Speaker


def words(text):
    return len(text.split())


def context(count, *, budget=4000, guideline=True):
    """A user's, with so many exemplars of 10 words each; they are rendered by their age."""
    exemplars = {
        f"x-{n:02d}": Exemplar(
            id=f"x-{n:02d}",
            prompt=f"what is {n} ?",
            reply="one two three four five six",
            sources={f"i{n}": n},
            support=1,
        )
        for n in range(1, count + 1)
    }
    said = {"g-1": Guideline(id="g-1", text="be brief", sources={"i0": 1}, support=1)} if guideline else {}
    state = FastWeights(revision=count + 1, clock=count, exemplars=exemplars, guidelines=said)
    return OwnContext(state=state, absorbed=frozenset(), budget_tokens=budget)


def found(own, margin_without, *, examples=10, style_without=None, near=None, passes=lambda *_: True):
    """What becomes of each item where the margin, and the style of replies, without some of them is this; and how many rounds it took."""
    rounds = []

    def answer(left_out, newest=None):
        styled = None if newest or style_without is None else style_without(left_out)
        return Answer([margin_without(left_out)] * min(newest or examples, examples), styled)

    def answered(questions):
        rounds.append(questions[0])
        return {0: [answer(q.left_out, q.newest) for q in questions[0]]}

    now = Answer([0.0] * examples, near)
    [handed] = in_rounds([search(own, words, now, answer(frozenset()), passes)], answered)
    assert handed.whole == answer(frozenset())
    assert handed.left == answer(handed.absorbed)
    return handed, rounds


def test_an_adapter_that_carries_everything_absorbs_everything_after_one_round():
    own = context(5)
    handed, rounds = found(own, lambda left_out: 1.0)
    assert handed.absorbed == frozenset(own.state.items)
    assert len(rounds) == 1
    assert context_tokens(own, left_out=handed.absorbed, count=words) == 0


def test_an_adapter_that_carries_nothing_absorbs_nothing_and_says_what_each_item_is_worth():
    handed, _ = found(context(5), lambda left_out: 1.0 - 0.1 * len(left_out))
    assert handed.absorbed == frozenset()
    assert all(item.margin_cost_nats == pytest.approx(0.1) for item in handed.items)
    assert {item.item: item.tokens for item in handed.items}["x-03"] == 10


def test_only_the_items_whose_absence_costs_nothing_leave():
    carried = {"x-02", "x-04", "g-1"}
    handed, _ = found(context(6), lambda left_out: 1.0 - 0.2 * len(left_out - carried))
    assert handed.absorbed == carried


def test_items_that_say_the_same_do_not_all_leave_although_each_alone_would():
    # Any two exemplars are enough.
    def margin(left_out):
        return 1.0 if len({f"x-{n:02d}" for n in range(1, 9)} - left_out) >= 2 else 0.3

    handed, _ = found(context(8, guideline=False), margin)
    assert all(item.margin_cost_nats == pytest.approx(0.0) for item in handed.items)
    assert len(handed.absorbed) == 6


def test_small_losses_do_not_add_up():
    handed, _ = found(context(8), lambda left_out: 1.0 - 0.008 * len(left_out))
    assert 0 < len(handed.absorbed) * 0.008 <= COSTS_NOTHING_NATS


def test_where_a_style_is_known_items_leave_as_long_as_replies_have_it_whatever_the_margin():
    def margin(left_out):
        return 1.0 - 0.1 * len(left_out)

    def still_there_with(items):
        return lambda left_out: 0.9 - 0.2 * max(items - (9 - len(left_out)), 0)

    def handed(style_without, *, near=0.85, **more):
        return found(context(8), margin, style_without=style_without, near=near, **more)[0]

    # By the margin alone not one of them would.
    assert found(context(8), margin)[0].absorbed == frozenset()
    assert len(handed(still_there_with(0)).absorbed) == 9
    assert len(handed(still_there_with(3)).absorbed) == 6
    # Replies without an item are nearer to the style than those with all, but not as near as what serves now.
    assert handed(lambda left_out: 0.6 if left_out else 0.5, near=0.7).absorbed == frozenset()


def test_a_needed_item_that_seemed_to_cost_least_keeps_none_of_those_behind_it():
    def margin(left_out):
        return 1.0 - 0.01 * sum(int(name[2:]) for name in left_out)

    def handed(needed):
        return found(
            context(8, guideline=False),
            margin,
            style_without=lambda left_out: 0.3 if needed & left_out else 0.9,
            near=0.9,
        )

    everything = {f"x-{n:02d}" for n in range(1, 9)}
    for needed in ({"x-01"}, {"x-04"}, {"x-08"}, {"x-04", "x-05"}):
        one, rounds = handed(needed)
        assert one.absorbed == everything - needed
        assert len(rounds) <= 2 + MAX_PASSES


def test_nothing_leaves_for_which_the_gate_would_refuse_the_candidate():
    def handed(passes, **more):
        return found(context(8), lambda left_out: 1.0 - 0.001 * len(left_out), passes=passes, **more)[0]

    def few(left_out, margins):
        assert margins == [1.0 - 0.001 * len(left_out)] * 10
        return len(left_out) <= 4

    assert len(handed(few).absorbed) == 4
    assert len(handed(few, style_without=lambda _: 0.9, near=0.9).absorbed) == 4
    assert handed(lambda *_: False).absorbed == frozenset()


def test_what_waits_for_room_leaves_with_what_it_waited_for_so_that_the_context_gets_shorter():
    own = context(12, budget=110, guideline=False)
    before = context_tokens(own, left_out=frozenset(), count=words)
    carried = {f"x-{n:02d}" for n in range(1, 13)} - {"x-12"}
    handed, _ = found(own, lambda left_out: 1.0 - 0.5 * len(left_out - carried))
    rendered = {item.item for item in handed.items if item.margin_cost_nats is not None}
    assert "x-12" in rendered < {item.item for item in handed.items}
    assert handed.absorbed == carried
    assert 0 < context_tokens(own, left_out=handed.absorbed, count=words) < before


def test_what_waits_for_room_stays_where_nothing_leaves():
    handed, _ = found(context(12, budget=110), lambda left_out: 1.0 - 0.5 * len(left_out))
    assert handed.absorbed == frozenset()


def test_however_many_items_there_are_the_passes_are_few():
    handed, rounds = found(context(40), lambda left_out: 1.0 - 0.004 * len(left_out))
    assert len(rounds) <= 2 + MAX_PASSES
    assert len(rounds[1]) <= MAX_ASKED_ALONE
    assert len(handed.absorbed) * 0.004 <= COSTS_NOTHING_NATS


def test_a_pinned_item_stays_and_is_not_asked_about():
    own = context(5)
    items = own.state.exemplars
    pinned = {**items, "x-03": items["x-03"].model_copy(update={"pinned": True})}
    own = replace(own, state=own.state.model_copy(update={"exemplars": pinned}))
    handed, _ = found(own, lambda left_out: 1.0)
    assert handed.absorbed == frozenset(own.state.items) - {"x-03"}
    assert context_tokens(own, left_out=handed.absorbed, count=words) > 0


def test_without_a_context_there_is_nothing_to_ask():
    for own in (context(0, guideline=False), None):
        handed, rounds = found(own, lambda left_out: 1.0)
        assert (handed.items, len(rounds)) == ((), 0)


def test_scopes_are_asked_about_side_by_side_and_those_of_many_users_not_at_all(tiny_base, tiny_settings, tmp_path):
    log = user_log(corrections("ann", count=6))
    own = OwnContext(state=log.fast_weights, absorbed=frozenset(), budget_tokens=1200)
    held = heldout(tiny_base, log, last=2, budget_tokens=1200)
    passes = []
    with LoraStack.attached(tiny_base, Shape.of(tiny_settings), slots=2) as judges:
        random_adapter(judges, 1, size=0.05)
        candidates = [
            candidate(tmp_path / "ann", slot=0, heldout=held, context=own),
            candidate(tmp_path / "all", slot=1, heldout=held),
            candidate(tmp_path / "bob", slot=1, heldout=held, context=own),
        ]
        speaker, now = Speaker(tiny_base, judges), Answer([0.0, 0.0])

        def handed(some, on_pass):
            arms = [Arm(held, rows_with(tiny_base, c), c.slot) for c in some]
            whole = [Answer(margins) for margins in measure(tiny_base, judges, arms)]
            asked = {"scales": [1.0] * len(some), "passes": [lambda *_: True] * len(some)}
            return hand_off(speaker, some, [now] * len(some), whole, **asked, on_pass=on_pass)

        together = handed(candidates, lambda: passes.append(1))
        alone = handed(candidates[2:], lambda: None)
    assert together[1].items == ()
    assert [item.item for item in together[0].items] == [item.item for item in together[2].items]
    assert [item.absorbed for item in together[2].items] == [item.absorbed for item in alone[0].items]
    assert together[2].whole.margins == pytest.approx(alone[0].whole.margins, abs=1e-4)
    assert together[2].left.margins == pytest.approx(alone[0].left.margins, abs=1e-4)
    assert together[0].whole.margins != pytest.approx(together[2].whole.margins, abs=1e-4)
    assert together[1].left == together[1].whole
    assert len(passes) <= 2 + MAX_PASSES
