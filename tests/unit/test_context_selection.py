"""From scored candidates to a population."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.population import MAX_MEMBERS
from workers.context_search.candidates import Candidate
from workers.context_search.judge import noise, trimmed_mean
from workers.context_search.selection import clearly_worse, difference, members, ranked, standing


def candidate(*names):
    return Candidate((), names)


A, B, C = candidate("x-1", "x-2"), candidate("x-3", "x-4"), candidate("x-5", "x-6")
FREE = dict.fromkeys((A, B, C), 0.0)


def test_the_median_ranks_and_one_lucky_example_does_not() -> None:
    gains = {A: [0.5, 0.5, 0.5, 0.5], B: [0.1, 0.1, 0.1, 9.0]}
    assert ranked(gains, FREE) == [A, B]


def test_equal_medians_are_told_apart_by_what_remains_without_the_extremes() -> None:
    gains = {A: [0.1, 0.2, 0.5, 0.6, 0.7], B: [0.1, 0.4, 0.5, 0.6, 0.7]}
    assert ranked(gains, FREE) == [B, A]


def test_tokens_cost_and_a_tie_leaves_what_serves_now() -> None:
    gains = {A: [0.5] * 3, B: [0.5] * 3}
    assert ranked(gains, {A: 0.02, B: 0.0})[0] == B
    assert ranked(gains, FREE, incumbents=[B])[0] == B
    assert ranked(gains, FREE, incumbents=[A])[0] == A


def test_what_is_clearly_worse_than_the_best_does_not_stand() -> None:
    gains = {A: [1.0, 1.1, 0.9, 1.0], B: [0.5, 0.6, 0.4, 0.5], C: [0.98, 1.12, 0.88, 1.02]}
    assert clearly_worse(B, A, gains)
    assert standing([A, C, B], gains) == [A, C]


def test_what_is_nowhere_the_best_does_not_stand() -> None:
    gains = {A: [1.0, 0.0, 1.0, 0.0], B: [0.0, 1.0, 0.0, 1.0], C: [0.4, 0.4, 0.4, 0.4]}
    assert C not in standing([A, B, C], gains)


def test_what_is_much_like_a_better_one_does_not_stand() -> None:
    names = [f"x-{n}" for n in range(10)]
    full, less, reordered = candidate(*names), candidate(*names[:9]), candidate(*names[::-1])
    gains = {key: [1.0, 1.0, 1.0] for key in (full, less, reordered)}
    assert standing([full, less, reordered], gains) == [full]
    assert difference(full, reordered) == 0.0


def test_a_member_that_is_best_everywhere_still_has_a_doubt() -> None:
    gains = {A: [1.0] * 4, B: [0.0] * 4}
    best, other = members([A, B], gains)
    assert 0.5 < best.win < 1.0
    assert 0.0 < other.win < 0.5
    assert (best.score, other.score) == (1.0, 0.0)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_noise_and_trimmed_means_are_finite_and_within_bounds(values: list[float]) -> None:
    assert noise(values) > 0
    assert min(values) - 1e-9 <= trimmed_mean(values) <= max(values) + 1e-9


@given(st.lists(st.lists(st.floats(-2, 2), min_size=4, max_size=4), min_size=1, max_size=8))
def test_a_population_has_the_best_first_and_is_bounded(rows: list[list[float]]) -> None:
    gains = {candidate(f"x-{n}", f"y-{n}"): row for n, row in enumerate(rows)}
    order = ranked(gains, dict.fromkeys(gains, 0.0))
    found = members(standing(order, gains), gains)
    assert 1 <= len(found) <= MAX_MEMBERS
    assert found[0].items == order[0].items
    assert found[0].score == pytest.approx(max(sorted(row)[1] / 2 + sorted(row)[2] / 2 for row in rows), abs=2e-3)
