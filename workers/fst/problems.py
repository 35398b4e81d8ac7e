"""The order of a run's problems: shuffled epochs of a pool, the same for all arms of a seed."""

from collections.abc import Callable, Sequence
from random import Random

from service.verifiers import Problem, Task
from workers.fst.plan import Plan


class Problems:
    """Training minibatches and test problems of a plan's tasks.

    Args:
        find: the registry of tasks. Raises InvalidRequest for an unknown name.

    Raises:
        InvalidRequest: a task has not so many problems.
        VerifiersMissing: the packages behind it are not installed.
    """

    def __init__(self, plan: Plan, find: Callable[[str], Task]) -> None:
        self._plan = plan
        self._pools: dict[str, list[Problem]] = {}
        self._test: dict[str, list[Problem]] = {}
        for name in dict.fromkeys(plan.tasks):
            task = find(name)
            drawn = task.problems("train", count=plan.train_problems, seed=plan.seed)
            # A task of few prompts repeats them.
            self._pools[name] = list({problem.id: problem for problem in drawn}.values())
            self._test[name] = task.problems("test", count=plan.test_problems, seed=0)

    def minibatch(self, step: int) -> list[Problem]:
        """The problems of a step, counted from 0."""
        plan, name = self._plan, self._plan.task_at(step)
        pool = self._pools[name]
        places = range(step * plan.batch_problems, (step + 1) * plan.batch_problems)
        epochs = {n // len(pool): _shuffled(pool, f"{name} {plan.seed} {n // len(pool)}") for n in places}
        return [epochs[n // len(pool)][n % len(pool)] for n in places]

    def anchors(self, steps: Sequence[int]) -> list[Problem]:
        """The anchor subset of the coming steps: the first ones, each once."""
        coming = {problem.id: problem for step in steps for problem in self.minibatch(step)}
        return list(coming.values())[: self._plan.anchor_problems]

    def test(self, name: str) -> list[Problem]:
        """The same for every arm and seed."""
        return self._test[name]


def _shuffled(pool: Sequence[Problem], seed: str) -> list[Problem]:
    return Random(seed).sample(pool, len(pool))
