"""What is promoted: every way in which a candidate can fail, from its report alone."""

from collections.abc import Sequence

import pytest

from service.domain.bootstrap import paired
from service.domain.measures import Ability, Difference, Generated
from service.domain.policy import Limits, decide
from service.domain.price import price
from service.domain.slow_weights import Margins, Promote, Reject, TrainReport
from tests.factories import divergence, train_report

BETTER = (0.5, 0.4, 0.6, 0.5, 0.45, 0.55)
"""Held-out examples on which a candidate is better by so much."""
UNCLEAR = (0.08, 0.02, 0.06, -0.04, 0.05, -0.04)
"""As it would be served: better on average, which proves nothing."""
DEAR = price(kl_text_nats=0.02, kl_chat_nats=0.1, tokens_saved=0, margin_gain_nats=0.01, value_nats=-0.19)


def against(differences: Sequence[float]) -> Difference:
    return paired(differences, [0.0] * len(differences), seed=0)


def margins(differences: Sequence[float] = BETTER, **changes: object) -> Margins:
    """A candidate's without a context, which are so much better than all others'."""
    gain = sum(differences) / len(differences)
    fields = {
        "base": 0.1,
        "current": 0.1,
        "candidate": 0.1 + gain,
        "serving": 0.4,
        "would_serve": 0.5,
        "against_base": against(differences),
        "against_serving": against(UNCLEAR),
    }
    return Margins(**{**fields, **changes})


def ability(*, right: float = 0.0, nats: float = 0.0) -> Ability:
    """Sixty questions of which this share is lost, the right answers' margins falling by so many nats on each."""
    lost = round(60 * right)
    return Ability(
        questions=60,
        base_accuracy=0.8,
        accuracy=0.8 - right,
        accuracy_change=against([-1.0] * lost + [0.0] * (60 - lost)),
        margin_change=against([-nats] * 60),
    )


def said(**changes: object) -> Generated:
    fields = {
        "prompts": 10,
        "base_repetition": 0.05,
        "repetition": 0.07,
        "base_loops": 0.0,
        "loops": 0.1,
        "base_tokens": 40.0,
        "tokens": 20.0,
        "wanted_tokens": 18.0,
    }
    return Generated(**{**fields, **changes})


def report(**changes: object) -> TrainReport:
    fields = {
        "margins": margins(),
        "ability": ability(right=1 / 60, nats=0.01),
        "generated": said(),
        "price": price(kl_text_nats=0.005, kl_chat_nats=0.05, tokens_saved=0, margin_gain_nats=0.1, value_nats=0.02),
    }
    return train_report().model_copy(update={**fields, **changes})


def reasons(of: TrainReport, limits: Limits | None = None) -> str:
    decision = decide(of, limits or Limits())
    return " / ".join(decision.reasons) if isinstance(decision, Reject) else ""


def test_a_candidate_within_budget_that_helps_and_harms_nothing_is_promoted() -> None:
    assert decide(report()) == Promote()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_text": divergence(upper=0.021)}, "KL on plain-text anchors is 0.0210"),
        ({"kl_text": divergence(worst=0.21)}, "worst anchor 0.2100"),
        ({"kl_chat": divergence(upper=0.11, budget=0.1)}, "over the budget of 0.1"),
        ({"scale": 0.0}, "no scale"),
        ({"margins": margins(against_base=None)}, "not compared with the base"),
        ({"margins": margins([0.0] * 6)}, "does not beat the base's 0.1000: the difference is +0.0000"),
        ({"margins": margins([0.9, 0.9, -0.8, 0.9, -0.8, -0.8])}, "95 % bound of -"),
        ({"margins": margins(current=0.7, against_current=against([-0.1] * 6))}, "the version in use's 0.7000"),
        ({"margins": margins(pooled=0.7, against_pooled=against([-0.1] * 6))}, "the pooled adapter's 0.7000"),
        ({"margins": margins(against_serving=None)}, "not compared with what serves now"),
        ({"margins": margins(against_serving=against([-0.1, -0.2, 0.0, -0.1, -0.1, 0.0]))}, "below -0.05"),
        ({"price": DEAR}, "is not worth its drift of 0.1000 nats per token on chat"),
        ({"price": None}, "was not priced"),
        ({"ability": None}, "ability was not measured"),
        ({"ability": ability(right=0.15)}, "answers 65% of 60 general questions, the base 80%"),
        ({"ability": ability(nats=0.3)}, "lose 0.300 nats per token"),
        ({"generated": None}, "not looked at"),
        ({"generated": said(repetition=0.4)}, "repeat 40% of their 4-grams, the base's 5%"),
        ({"generated": said(loops=0.3)}, "30% of its replies end in a loop"),
        ({"generated": said(tokens=5.0)}, "replies have 5 tokens, where the base's have 40 and those that users wanted 18"),
        ({"generated": said(adherence_before=0.8, adherence=0.6)}, "hold 60% of the scope's norms, what serves now 80%"),
        ({"generated": said(style_before=0.9, style=0.7)}, "0.70 of 1 to what the user wanted, what serves now 0.90"),
    ],
)  # fmt: skip
def test_each_failing_is_a_reason_with_its_figures(changes: dict[str, object], words: str) -> None:
    assert words in reasons(report(**changes))


def test_every_failing_is_told_not_only_the_first() -> None:
    found = decide(report(kl_text=divergence(upper=0.021), ability=ability(nats=0.3), generated=said(repetition=0.4)))
    assert isinstance(found, Reject)
    assert len(found.reasons) == 3


def test_an_odd_one_out_of_two_held_out_examples_does_not_promote() -> None:
    found = reasons(report(margins=margins([3.0, -0.01])))
    assert "with so few, all must be better, and 1 are (2 examples)" in found
    assert reasons(report(margins=margins([3.0, 0.2]))) == ""


def test_of_few_examples_all_must_be_better_even_where_the_bound_is_positive() -> None:
    differences = [0.9, 0.9, 0.9, -0.1]
    assert against(differences).lower95 > 0.0
    assert "all must be better" in reasons(report(margins=margins(differences)))
    assert reasons(report(margins=margins([*differences, 0.9]))) == ""


def test_a_single_example_proves_nothing() -> None:
    assert "single example" in reasons(report(margins=margins([2.0])))


def test_short_replies_are_no_drift_where_users_want_them_short() -> None:
    assert reasons(report(generated=said(base_tokens=48.0, tokens=9.0, wanted_tokens=12.0))) == ""
    assert "replies have 9 tokens" in reasons(report(generated=said(base_tokens=48.0, tokens=9.0, wanted_tokens=40.0)))
    # Nobody said how long a reply should be: the base's length is what there is.
    assert "replies have 20 tokens" in reasons(
        report(generated=said(base_tokens=48.0, tokens=20.0, wanted_tokens=None))
    )


def test_replies_that_run_on_are_a_drift() -> None:
    assert "replies have 48 tokens" in reasons(
        report(generated=said(base_tokens=20.0, tokens=48.0, wanted_tokens=15.0))
    )


def test_the_limits_can_be_set() -> None:
    loose = Limits(ability_loss_nats=1.0, repetition_rise=1.0)
    assert reasons(report(ability=ability(nats=0.3), generated=said(repetition=0.4)), loose) == ""


def test_a_report_from_before_all_this_still_reads() -> None:
    old = train_report().model_dump(exclude={"handed", "frontier", "price", "ability", "generated", "notes"})
    old["margins"] = {"base": 0.1, "current": 0.2, "candidate": 0.5}
    read = TrainReport.model_validate(old)
    assert (read.frontier, read.ability, read.margins.against_base) == ((), None, None)


NOISY = (1.6, 1.4, 1.2, -0.4, -0.9)
"""Five ratings, of which two went the other way: +0.58 on average, and no proof."""


def nearer(*differences: float) -> Generated:
    """Replies as they would be served, whose style is nearer to what the user wants by so much, prompt by prompt."""
    gain = sum(differences) / len(differences)
    return said(style_before=0.6, style=0.6 + gain, style_change=against(differences))


def test_replies_that_are_nearer_to_what_the_user_wants_prove_what_noisy_ratings_do_not() -> None:
    unproved = report(margins=margins(NOISY))
    assert "does not beat the base's" in reasons(unproved)
    proved = unproved.model_copy(update={"generated": nearer(0.2, 0.1, 0.2, 0.1, 0.1)})
    assert decide(proved) == Promote()


def test_a_margin_that_is_surely_higher_as_served_proves_what_noisy_ratings_alone_do_not() -> None:
    served = against([0.3, 0.1, 0.2, 0.4, 0.3])
    assert decide(report(margins=margins(NOISY, against_serving=served))) == Promote()
    # Not where the adapter alone makes it worse: then it is the context that does it.
    assert "does not beat the base's" in reasons(
        report(margins=margins([-gain for gain in NOISY], against_serving=served))
    )


@pytest.mark.parametrize(
    ("gains", "styles"),
    [
        (NOISY, (0.2, -0.2, 0.1, 0.0, 0.1)),
        (NOISY, (0.2, 0.1, -0.01)),
        ([-gain for gain in NOISY], (0.2, 0.1, 0.2, 0.1, 0.1)),
    ],
    ids=["a style that may be chance", "too few prompts", "a margin that falls"],
)
def test_a_style_proves_nothing_by_chance_or_against_the_margin(
    gains: Sequence[float], styles: Sequence[float]
) -> None:
    assert "does not beat the base's" in reasons(report(margins=margins(gains), generated=nearer(*styles)))
