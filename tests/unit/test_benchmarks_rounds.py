"""The benchmark of ten rounds has what it needs; what the rounds do is in `test_consolidation_rounds.py`."""

from tests.benchmarks.rounds import ROUNDS, corrections_of, to_teach


def test_there_are_questions_for_all_corrections_of_the_default_and_none_comes_twice() -> None:
    asks = [prompt.ask for prompt in to_teach()]
    assert len(set(asks)) == len(asks) >= corrections_of(ROUNDS)
