"""A task for the tests of Fast-Slow Training that a random model of a byte vocabulary can learn: to say a certain letter."""

from contextlib import nullcontext
from dataclasses import dataclass

from service.errors import InvalidRequest
from service.verifiers import Problem, Verdict
from workers.fst.rollouts import InProcess

ADVICE = "Say the letter more often in the reply."


@dataclass(frozen=True)
class SayTheLetter:
    """Rewarded is the share of a reply's characters that are the letter, in a reply that is not empty."""

    name: str
    letter: str
    about: str = "Say one letter."

    def problems(self, split, *, count, seed):
        start = 1000 if split == "test" else 0
        return [
            Problem(f"{self.name}/{n}", f"Ask {n}", self.check)
            for n in range(start + 100 * seed, start + 100 * seed + count)
        ]

    def check(self, reply):
        share = reply.count(self.letter) / max(len(reply), 1)
        return Verdict(reward=share, feedback=f"{ADVICE} Say it {reply.count(self.letter) + 1} times or more.")


def find(name):
    if not name.startswith("say-"):
        raise InvalidRequest(f"There is no task '{name}'.", param="task")
    return SayTheLetter(name, name.removeprefix("say-"))


def roller(base):
    """Gives replies of this model."""
    return InProcess(lambda: nullcontext(base))
