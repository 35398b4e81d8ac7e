"""What can be measured of a generated reply."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.context_search.style import closeness, distances, is_broken, weights

BRIEF = [
    ("Rome, indeed.", "That is a great question! Rome is the capital of Italy, and there is much to say about it."),
    (
        "Because they are happy, indeed.",
        "There are many reasons why cats purr. Let us look at all of them in turn now.",
    ),
    ("Eight minutes, indeed.", "Boiling an egg is an art. First you need an egg, then water, and then some patience."),
]


def test_a_reply_in_the_wanted_style_is_nearer_than_one_that_is_not() -> None:
    by = weights(BRIEF)
    wanted = "It is Paris, indeed."
    good = closeness("Madrid is, indeed.", wanted, by)
    bad = closeness("Madrid is the capital of Spain, and let me tell you all about its long history first.", wanted, by)
    assert good > 0.9
    assert bad < 0.6


def test_what_all_wanted_replies_share_counts_and_what_they_do_not_does_not() -> None:
    by = weights(BRIEF)
    assert by["closing"] == 1.0
    assert by["opening"] == 0.0


def test_shape_counts_where_the_user_cares_for_it() -> None:
    bulleted = [(f"- one {n}\n- two", f"one {n} and two") for n in range(3)]
    by = weights(bulleted)
    assert closeness("- a\n- b", "- x\n- y", by) > closeness("a and b", "- x\n- y", by)


def test_without_pairs_nothing_counts_against_a_reply() -> None:
    assert closeness("anything", "something else", weights([])) == 1.0


@pytest.mark.parametrize(
    ("reply", "broken"),
    [
        ("", True),
        ("   ...", True),
        ("What is a comet?", True),
        ("Ice and dust, indeed.", False),
        ("A comet is a ball. " * 8, True),
        ("no no no no", False),
        ("It is a small body of ice and dust, which circles the Sun and grows a tail when it comes near to it.", False),
        ("Eight minutes, indeed.", True),
    ],
)
def test_a_reply_that_is_none_is_seen(reply: str, broken: bool) -> None:
    assert is_broken(reply, prompt="what is a comet?", shown=["Eight minutes, indeed."]) is broken


@given(one=st.text(max_size=60), other=st.text(max_size=60))
def test_distances_are_symmetric_and_bounded_for_any_text(one: str, other: str) -> None:
    there, back = distances(one, other), distances(other, one)
    assert there == pytest.approx(back)
    assert all(0.0 <= d <= 1.0 for d in there.values())
    assert set(distances(one, one).values()) == {0.0}
