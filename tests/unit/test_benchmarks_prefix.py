"""The prefix benchmark's naive layouts have the very items of ours, and its shares are of tokens."""

import pytest

from service.domain.context import GUIDELINES_HEADING
from tests.benchmarks.prefix import BY_LIKENESS, NAIVE, NEWEST_FIRST, Asked, Messages, lessons, naive, share

SKY, FISH = "Why is the sky blue?", "How do fish breathe?"
RENDERED: Messages = [
    {"role": "system", "content": f"{GUIDELINES_HEADING}\n- Be brief.\n- Rhyme."},
    {"role": "user", "content": "Why is the sea salty?"},
    {"role": "assistant", "content": "Rivers bring salt."},
    {"role": "user", "content": "How do bees fly?"},
    {"role": "assistant", "content": "With four wings."},
]


@pytest.mark.parametrize(
    ("layout", "question", "order"),
    [
        (NEWEST_FIRST, SKY, [3, 1]),
        (NEWEST_FIRST, FISH, [3, 1]),
        (BY_LIKENESS, SKY, [3, 1]),
        (BY_LIKENESS, FISH, [1, 3]),
    ],
)
def test_naive_layouts_put_exemplars_first_and_guidelines_last(layout: str, question: str, order: list[int]) -> None:
    asked = {"role": "user", "content": question}
    turns = [RENDERED[n + m] for n in order for m in (0, 1)]
    guidelines = {"role": "system", "content": f"{GUIDELINES_HEADING}\n- Rhyme.\n- Be brief."}
    assert naive([*RENDERED, asked], NAIVE[layout]) == [*turns, guidelines, asked]


def test_without_items_every_layout_is_the_question() -> None:
    asked = [{"role": "user", "content": SKY}]
    assert all(naive(asked, order) == asked for order in NAIVE.values())


def test_a_share_is_of_all_tokens_and_not_of_chats() -> None:
    assert share([Asked(100, 0, 1.0), Asked(300, 200, 1.0)]) == 0.5


def test_the_lessons_mix_comments_corrections_and_ratings() -> None:
    kinds = [tuple(said) for _, said in lessons()]
    assert set(kinds) == {("comment",), ("correction",), ("correction", "rating")}
    assert len(kinds) == 36
