"""Bounds of a mean by drawing the examples again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.bootstrap import lower95, paired

finite = st.floats(-10.0, 10.0)


def test_two_examples_of_which_one_is_worse_are_bounded_by_the_worse_one() -> None:
    # Half of the draws are of one example alone, a quarter of each.
    difference = paired([2.0, 0.9], [1.0, 1.0], seed=0)
    assert difference.mean == pytest.approx(0.45)
    assert difference.lower95 == pytest.approx(-0.1)
    assert (difference.examples, difference.positive, difference.is_few) == (2, 1, True)


def test_equal_differences_leave_nothing_to_doubt() -> None:
    difference = paired([1.5] * 6, [1.0] * 6, seed=0)
    assert difference.mean == difference.lower95 == 0.5
    assert not difference.is_few


def test_the_bound_is_near_the_normal_one_where_there_are_many_examples() -> None:
    # 200 differences, half 0 and half 1: mean 0.5, standard deviation 0.5, so 0.5 - 1.645 * 0.5 / sqrt(200).
    assert lower95([0.0, 1.0] * 100, seed=3) == pytest.approx(0.4418, abs=0.01)


def test_the_same_seed_gives_the_same_bound_and_pairs_are_kept() -> None:
    easy_and_hard = [5.0, -5.0, 4.0, -4.0]
    better = [value + 0.1 for value in easy_and_hard]
    assert paired(better, easy_and_hard, seed=1) == paired(better, easy_and_hard, seed=1)
    # Far apart as the examples are, each is better by the same.
    assert paired(better, easy_and_hard, seed=1).lower95 == pytest.approx(0.1)


@given(values=st.lists(finite, min_size=1, max_size=8), shift=finite, seed=st.integers(0, 3))
def test_a_bound_moves_with_the_values_and_is_between_the_least_and_the_mean(
    values: list[float], shift: float, seed: int
) -> None:
    bound = lower95(values, seed=seed)
    assert min(values) - 1e-9 <= bound <= sum(values) / len(values) + 1e-9
    assert lower95([value + shift for value in values], seed=seed) == pytest.approx(bound + shift, abs=1e-9)


def test_examples_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        paired([], [], seed=0)
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0], seed=0)
