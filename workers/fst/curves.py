"""What a run writes down and concludes with."""

from collections.abc import Callable, Sequence
from typing import Any

from service.settings import Settings
from workers.consolidation.anchors import Anchors
from workers.fst.budget import fitted
from workers.fst.contexts import EMPTY, TaskContext
from workers.fst.evolution import Evolved
from workers.fst.folder import CURVE, REPLIES, Run, State
from workers.fst.measure import drift, examine
from workers.fst.plan import Plan
from workers.fst.policy import Policy
from workers.fst.problems import Problems
from workers.fst.rollouts import Rollers, scored
from workers.fst.slow import Step

OnPoint = Callable[[State, dict[str, Any]], None]


class Curves:
    """The points of a run's curves.

    Args:
        on_point: told of each.
    """

    def __init__(
        self,
        run: Run,
        policy: Policy,
        rollers: Rollers,
        problems: Problems,
        anchors: Anchors,
        *,
        on_point: OnPoint,
    ) -> None:
        self._run = run
        self._policy = policy
        self._rollers = rollers
        self._anchors = anchors
        self._problems = problems
        self._on_point = on_point

    def point(self, state: State, evolved: Evolved | None, steps: Sequence[Step]) -> None:
        """Measure and write one point, on the task at hand, with the contexts in use."""
        plan = self._run.plan
        name = plan.task_at(max(state.step - 1, 0))
        population = serving(plan, state)
        tested = examine(self._policy, self._rollers, population, self._problems.test(name), plan, base=False)
        rewards = [step.reward for step in steps if step.reward is not None]
        anchors = drift(self._policy, self._anchors, "steer")
        with self._policy.frozen() as base:
            tokens = [context.tokens(base.tokens.count) for context in population]
        record = {
            "kind": "cycle",
            "task": name,
            "step": state.step,
            "samples": state.samples,
            "evolution_samples": evolved.samples if evolved else 0,
            "train_reward": sum(rewards) / len(rewards) if rewards else None,
            "test_reward": tested.reward,
            "kl_nats": tested.kl_nats,
            "kl_text_nats": anchors["text"],
            "kl_chat_nats": anchors["chat"],
            "population": [context.model_dump() for context in state.population],
            "population_rewards": list(evolved.rewards) if evolved else None,
            "tried": evolved.tried if evolved else 0,
            "context_tokens": sum(tokens) / len(tokens),
        }
        self._run.write(CURVE, record)
        for rollout in tested.rollouts:
            self._run.write(REPLIES, {"step": state.step, **scored(rollout)})
        self._on_point(state, record)


def conclude(
    run: Run,
    state: State,
    policy: Policy,
    rollers: Rollers,
    problems: Problems,
    anchors: Anchors,
    *,
    settings: Settings,
) -> dict[str, Any]:
    """The result, written: base and trained model, each with and without the contexts (the 2x2), then what fits the KL budget."""
    plan = run.plan
    name = plan.task_at(plan.steps - 1)
    asked = problems.test(name)

    def cell(population: Sequence[TaskContext], *, base: bool) -> dict[str, Any]:
        tested = examine(policy, rollers, population, asked, plan, base=base)
        context = tuple(population) != (EMPTY,)
        return {
            "weights": "base" if base else "slow",
            "context": context,
            "reward": tested.reward,
            "kl_nats": tested.kl_nats,
        }

    populations = [(EMPTY,), *([state.population] if plan.evolves else [])]
    cells = [cell(p, base=base) for base in ((True, False) if plan.trains else (True,)) for p in populations]
    result: dict[str, Any] = {
        "arm": plan.arm,
        "task": name,
        "steps": state.step,
        "samples": state.samples,
        "seconds": state.seconds,
        "two_by_two": cells,
        "population": [context.model_dump() for context in state.population],
    }
    if plan.trains:
        chosen = fitted(policy, anchors, out=run.folder, settings=settings)
        within = examine(policy, rollers, serving(plan, state), asked, plan, base=False)
        result["budgeted"] = {
            "scale": chosen.scale,
            "reward": within.reward,
            "kl_nats": within.kl_nats,
            "kl": {kind: measured.model_dump() for kind, measured in chosen.kl.items()},
        }
    run.finish(result)
    return result


def serving(plan: Plan, state: State) -> tuple[TaskContext, ...]:
    """The contexts that a run's model answers with: a distilled one must do without."""
    return (EMPTY,) if plan.arm == "distill" else state.population
