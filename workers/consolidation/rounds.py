"""Searches of many scopes in step: in each round, the questions of all that still search are answered together, in one pass.

A search is a generator: it yields what it wants measured, gets the answer sent back, and returns what it found.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")
FoundT = TypeVar("FoundT")


def in_rounds(
    searches: Sequence[Generator[QuestionT, AnswerT, FoundT]],
    answered: Callable[[dict[int, QuestionT]], Mapping[int, AnswerT]],
) -> list[FoundT]:
    """What each search found, in their order.

    Args:
        answered: called once a round with the questions by the search's index; it answers each.
    """
    found: dict[int, FoundT] = {}
    questions: dict[int, QuestionT] = {}

    def advance(index: int, answer: AnswerT | None) -> None:
        try:
            # Sending None starts a generator.
            questions[index] = searches[index].send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            questions.pop(index, None)
            found[index] = end.value

    for index in range(len(searches)):
        advance(index, None)
    while questions:
        answers = answered(dict(questions))
        for index in list(questions):
            advance(index, answers[index])
    return [found[index] for index in range(len(searches))]
