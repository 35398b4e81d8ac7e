"""What new users start from: what counts as common, what is never shared, and how it gives way to the user's own word."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.cold_start import MAX_PRIORS, ColdStart, Evidence, offered, posterior, starting
from service.domain.context import choose
from service.domain.events import Edit, EditEvent
from service.domain.fast_weights import FastWeights
from service.domain.fold import apply
from service.domain.inference import Pair, infer, is_shareable
from service.domain.items import Credit, Guideline, Prior, guideline_id

BULLETS, LOWER, BRIEF = "Use bullet points.", "Write everything in lowercase letters.", "Answer in one sentence."
PHRASE = 'End every reply with "Cheers, Bob"'


def prior(text: str, *, mean: float = 0.8, written: bool = False) -> Prior:
    return Prior(id=guideline_id(text), text=text, mean=mean, written=written)


def user(
    *inferred: str, said: Sequence[str] = (), credit: dict[str, Credit] | None = None, removed: Sequence[str] = ()
) -> FastWeights:
    items = [Guideline(id=guideline_id(text), text=text, origin="inferred") for text in inferred]
    items += [Guideline(id=guideline_id(text), text=text, sources={"i": 1}, support=1) for text in said]
    return FastWeights(
        guidelines={item.id: item for item in items},
        credits={guideline_id(text): value for text, value in (credit or {}).items()},
        removed={guideline_id(text): 1 for text in removed},
    )


def counted(*users: FastWeights, standing: Sequence[Prior] = (), min_users: int = 3) -> dict[str, Prior]:
    evidence = Evidence({p.id for p in standing}, shareable=is_shareable)
    for state in users:
        evidence.add(state)
    return {p.text: p for p in evidence.priors(standing, min_users=min_users)}


@pytest.mark.parametrize(("users", "shared"), [(2, False), (3, True)])
def test_an_inferred_guideline_is_shared_when_enough_users_have_it(users: int, shared: bool) -> None:
    assert (BULLETS in counted(*[user(BULLETS)] * users)) is shared


def test_what_a_user_wrote_is_never_shared_even_in_words_of_the_vocabulary() -> None:
    assert counted(*[user(said=[BULLETS, "Call me Bob."])] * 5) == {}


def test_a_guideline_with_words_of_a_users_corrections_is_never_shared() -> None:
    assert counted(*[user(PHRASE, "Mention my dog Rex.")] * 5) == {}


def test_praise_and_blame_of_all_users_move_the_mean() -> None:
    alone = counted(*[user(BULLETS)] * 3)[BULLETS].mean
    praised = counted(*[user(BULLETS, credit={BULLETS: Credit(helpful=2.0)})] * 3)[BULLETS].mean
    blamed = counted(*[user(BULLETS, credit={BULLETS: Credit(harmful=2.0)})] * 3)[BULLETS].mean
    assert blamed < alone < praised


def test_one_user_alone_can_not_make_or_break_a_guideline() -> None:
    loud = user(BULLETS, credit={BULLETS: Credit(harmful=50.0)})
    assert counted(*[user(BULLETS)] * 9, loud)[BULLETS].mean > 0.5


def test_users_who_were_served_a_prior_and_blame_or_remove_it_count_against_it() -> None:
    keep, standing = [user(BULLETS)] * 3, [prior(BULLETS)]
    content = counted(*keep, standing=standing)[BULLETS].mean
    blamed = counted(*keep, user(credit={BULLETS: Credit(harmful=1.0)}), standing=standing)[BULLETS].mean
    removed = counted(*keep, user(removed=[BULLETS]), standing=standing)[BULLETS].mean
    assert removed < blamed < content


def test_what_an_admin_wrote_stays_whoever_has_it_and_learns_from_ratings() -> None:
    written = [prior("Cite the paragraph.", written=True)]
    alone = counted(standing=written)["Cite the paragraph."]
    blamed = counted(*[user(credit={"Cite the paragraph.": Credit(harmful=1.0)})] * 9, standing=written)
    assert (alone.written, alone.mean) == (True, pytest.approx(5 / 6, abs=1e-3))
    assert blamed["Cite the paragraph."].mean < 0.4


def test_a_scope_has_a_bounded_number_of_guidelines() -> None:
    texts = [f"Keep replies under about {5 * n} words." for n in range(1, 40)]
    assert len(counted(*[user(*texts)] * 3)) == MAX_PRIORS


def test_the_cohort_comes_before_the_tenant_and_an_admin_before_both() -> None:
    ours, theirs = [prior(LOWER)], [prior("Write everything in capital letters."), prior(BULLETS)]
    written = [prior("Write in prose, without bullet points or lists.", written=True)]
    texts = [p.text for p in starting(ours, [*theirs, *written])]
    assert texts == ["Write in prose, without bullet points or lists.", LOWER]


def test_of_two_learnt_limits_the_better_one_is_offered() -> None:
    limits = [prior("Keep replies under about 20 words."), prior("Keep replies under about 30 words.", mean=0.7)]
    assert starting([], limits) == (limits[0],)


def test_new_texts_replace_the_old_ones_and_leave_what_was_learnt() -> None:
    state = ColdStart(priors={"global": (prior(BULLETS), prior("Cite sources.", mean=0.6, written=True))})
    after = state.with_written("global", ["Cite sources.", "Name the author."]).priors["global"]
    assert {p.text: (p.written, p.mean) for p in after} == {
        "Name the author.": (True, pytest.approx(5 / 6, abs=1e-3)),
        "Cite sources.": (True, 0.6),
        BULLETS: (False, 0.8),
    }


def test_switching_off_forgets_what_was_learnt_and_keeps_what_was_written() -> None:
    state = ColdStart(enabled=True, priors={"global": (prior(BULLETS), prior(BRIEF, written=True))})
    assert [p.text for p in state.switched(False).priors["global"]] == [BRIEF]


def rendered(state: FastWeights, *priors: Prior) -> list[str]:
    context = choose(
        state,
        absorbed=frozenset(),
        budget_tokens=500,
        count=lambda text: len(text.split()),
        priors=priors,
    )
    return [g.text for g in context.guidelines]


def test_a_new_user_starts_with_what_helps_others_and_not_with_what_does_not() -> None:
    assert rendered(FastWeights(), prior(BULLETS), prior(LOWER, mean=0.2)) == [BULLETS]


def test_it_gives_way_as_the_user_gives_feedback_of_another_kind() -> None:
    served = [bool(rendered(FastWeights(clock=n, revision=n), prior(BULLETS))) for n in range(20)]
    assert served == sorted(served, reverse=True)
    assert served[3] is True
    assert served[8] is False


def test_the_users_own_praise_keeps_it_and_own_blame_drops_it_sooner() -> None:
    praised = FastWeights(clock=12, revision=12, credits={guideline_id(BULLETS): Credit(helpful=4.0, clock=12)})
    blamed = FastWeights(clock=3, revision=3, credits={guideline_id(BULLETS): Credit(harmful=3.0, clock=3)})
    assert rendered(praised, prior(BULLETS)) == [BULLETS]
    assert rendered(blamed, prior(BULLETS)) == []


def test_the_users_own_word_outranks_others() -> None:
    said = user(said=["Write in prose, no bullet points."])
    assert rendered(said, prior(BULLETS)) == ["Write in prose, no bullet points."]


@given(st.floats(0, 1), st.integers(0, 200), st.floats(0, 20), st.floats(0, 20))
def test_a_prior_starts_at_the_others_mean_and_only_falls_with_feedback_about_other_things(
    mean: float, clock: int, helpful: float, harmful: float
) -> None:
    others, own = prior(BULLETS, mean=mean), Credit(helpful=helpful, harmful=harmful, clock=clock)
    assert posterior(others, Credit(), clock=0) == pytest.approx(mean)
    assert posterior(others, own, clock=clock + 1) <= posterior(others, own, clock=clock)
    assert 0 <= posterior(others, own, clock=clock) <= 1


def edited(state: FastWeights, *edits: Edit, adopted: Sequence[Prior]) -> FastWeights:
    guidelines = tuple(Guideline(id=p.id, text=p.text) for p in adopted)
    event = EditEvent(revision=state.revision + 1, at=0.0, by="user", edits=edits, adopted=guidelines)
    return apply(state, EditEvent.model_validate_json(event.model_dump_json()))


def test_a_removed_prior_is_not_offered_again() -> None:
    others = prior(BULLETS)
    state = edited(FastWeights(), Edit(op="remove", id=others.id), adopted=[others])
    assert (offered(state, [others]), rendered(state, others)) == ([], [])


def test_a_changed_prior_is_the_users_own_and_the_original_is_not_offered_again() -> None:
    others = prior(BULLETS)
    state = edited(FastWeights(), Edit(op="change", id=others.id, text="Use numbered lists."), adopted=[others])
    assert rendered(state, others) == ["Use numbered lists."]


def test_a_pinned_prior_stays_however_much_feedback_comes() -> None:
    others = prior(BULLETS)
    state = edited(FastWeights(), Edit(op="pin", id=others.id), adopted=[others])
    assert rendered(state.model_copy(update={"clock": 100})) == [BULLETS]


STYLES = [
    str.lower,
    str.upper,
    lambda text: f"- {text}\n- {text}",
    lambda text: f"1. {text}\n2. {text}",
    lambda text: f"{text} Cheers, Bob",
    lambda text: f"Ahoy! {text}",
    lambda text: f'"{text}"',
    lambda text: f"{text}\n\nP.S. {text}",
    lambda text: f"## Title\n\n{text}",
    lambda text: text.split(".", maxsplit=1)[0] + ".",
    lambda text: text * 4,
    lambda text: f"{text} 😀!",
    lambda text: f"```\n{text}\n```",
    lambda text: "Der Regen ist nicht mehr als Wasser und das fällt aus den Wolken auf die Erde.",
]
TEXTS = ["A noun, we say, names a thing. It's common!", "Rain falls, and it is wet. Is it not?", "Cats purr. They do."]


@given(st.lists(st.tuples(st.sampled_from(STYLES), st.sampled_from(STYLES), st.permutations(TEXTS)), min_size=1))
def test_the_vocabulary_is_what_the_rules_can_say_without_quoting_anybody(styles: list) -> None:
    for wanted, unwanted, texts in styles:
        pairs = [
            Pair("Why?", wanted(text), unwanted(other))
            for text, other in zip(texts, texts[1:] + texts[:1], strict=True)
        ]
        for candidate in infer(pairs):
            assert is_shareable(candidate.text) == candidate.shareable, candidate


@pytest.mark.parametrize("text", [PHRASE, f"{BULLETS}\n{BULLETS}", f"{BULLETS} Call me Bob.", BULLETS.upper(), ""])
def test_what_only_looks_like_the_vocabulary_is_not_of_it(text: str) -> None:
    assert not is_shareable(text)
