"""What a task with a checkable reward is made of."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from pydantic import Field, model_validator

from service.domain.feedback import Frozen

Split = Literal["train", "test"]

# One problem in so many is for testing.
TEST_SHARE = 5


class Verdict(Frozen):
    """What a check says of a reply.

    Raises:
        ValueError: the reply is not all right, and the feedback does not say why.
    """

    reward: float = Field(ge=0.0, le=1.0)
    feedback: str
    """What was right or wrong and what to do, for an optimizer that reflects; never empty when the reward is below 1."""

    @model_validator(mode="after")
    def _explained(self) -> Self:
        if self.reward < 1.0 and not self.feedback.strip():
            raise ValueError("a reply that is not all right needs feedback")
        return self


@dataclass(frozen=True)
class Problem:
    """One prompt, and the check of replies to it."""

    id: str
    """Of the task and the prompt: equal where both are."""
    prompt: str
    check: Callable[[str], Verdict]


class Task(Protocol):
    """A source of problems of one kind."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str:
        """One sentence for people."""

    def problems(self, split: Split, *, count: int, seed: int) -> list[Problem]:
        """The same arguments give the same problems; no prompt of one split is in the other, whatever the seeds and counts.

        A task of few prompts repeats them, each with the same id, after all were given once.

        Raises:
            InvalidRequest: there are not so many different problems.
        """


def split_of(prompt: str) -> Split:
    """Which split a prompt belongs to: by its hash, so for all seeds and counts alike."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def problem_id(task: str, prompt: str) -> str:
    return f"{task}/{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"
