"""Fast-Slow Training as one page (arXiv 2605.12484).

Cycle: take the next T minibatches. With the weights fixed, evolve the population of K contexts on an anchor subset of them. With the
contexts fixed, take T steps with G rollouts a problem, exactly G/K under each context, pooled into one group for the advantage. Repeat.
"""

import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from service.settings import Settings
from service.verifiers import Problem
from workers.fst.contexts import EMPTY, TaskContext
from workers.fst.edits import Edits
from workers.fst.evolution import Evolved, evolve
from workers.fst.folder import CURVE, Run, State
from workers.fst.measure import sampling
from workers.fst.plan import Plan
from workers.fst.policy import Policy, restore, snapshot
from workers.fst.problems import Problems
from workers.fst.promise import Evidence, promises
from workers.fst.reflection import Reflection
from workers.fst.rollouts import Asked, Drawn, Rollers, Rollout, roll_groups, scored
from workers.fst.slow import Learner, Step
from workers.fst.standing import Standings

Measure = Callable[[State, Evolved | None, Sequence[Step]], None]
"""Told of the state before the first cycle and after each one, with what that one did."""


class Loop:
    """One run: from its last checkpoint, or from the beginning."""

    def __init__(
        self,
        run: Run,
        policy: Policy,
        rollers: Rollers,
        problems: Problems,
        *,
        settings: Settings,
        measure: Measure,
        on_step: Callable[[int], None],
    ) -> None:
        self.plan: Plan = run.plan
        self.state = State(population=(EMPTY,) * run.plan.population)
        self._run = run
        self._policy = policy
        self._rollers = rollers
        self._learner = Learner(policy, run.plan)
        self._problems = problems
        self._reflection = Reflection.configured(settings)
        self._measure = measure
        self._on_step = on_step
        self._drawn: Drawn = {}
        """Replies of the evolution to problems of this cycle that no step has had yet."""
        self._standings = Standings()
        self._resume()

    def go(self, *, enough: Callable[[], bool] = lambda: False) -> bool:
        """Cycle after cycle, until the plan is done (True) or, after a cycle, it is enough for now (False)."""
        if not self._run.curve():
            self._measure(self.state, None, [])
            self._save()
        while self.state.step < self.plan.steps:
            if enough():
                return False
            self._cycle()
        return True

    def _cycle(self) -> None:
        began = time.monotonic()
        coming = range(self.state.step, min(self.state.step + self.plan.steps_per_cycle, self.plan.steps))
        if self.plan.task_at(coming.start - 1) != self.plan.task_at(coming.start):
            self._move(standings=(), evidence=Evidence())
        evolved = self._evolve(coming) if self.plan.evolves else None
        # What the evolution has drawn and paid for is rollouts of the steps, whose importance ratio knows by which weights.
        of_members = evolved.replies if evolved and self.plan.arm == "fst" else ()
        self._drawn = {(reply.asked.problem.id, reply.asked.context): reply for reply in of_members}
        self._standings = Standings()
        steps = [self._step(step) for step in coming] if self.plan.trains else []
        self._move(step=coming.stop, standings=self._standings.found())
        self._measure(self.state, evolved, steps)
        self._move(seconds=self.state.seconds + time.monotonic() - began)
        self._save()

    def _evolve(self, coming: range) -> Evolved:
        """The fast half: the weights are fixed."""
        edits = Edits(self.state.material, fits=self._fits, random=Random(f"{self.plan.seed} {coming.start}"))
        first, replies = self.state.samples, []
        # A distilled model learns from the frozen base with the context, so it is the base that the context must help.
        of_base = self.plan.arm == "distill"
        roller = self._rollers.frozen if of_base else self._rollers.trained

        def rolled(asked: Sequence[Asked]) -> list[Rollout]:
            found = roller.roll(asked, sampling(self.plan), samples=1, seed=f"{self.plan.seed} evolve {coming.start}")
            for rollout in found:
                self._move(samples=self.state.samples + 1)
                edits.material = edits.material.with_reply(at=self.state.samples, **scored(rollout))
            replies.extend(found)
            return found

        def promise(parent: TaskContext, children: Sequence[TaskContext]) -> list[float]:
            with self._policy.frozen() if of_base else self._policy.trained() as model:
                return promises(model, self.state.evidence, parent, children)

        evolved = evolve(
            self.state.population,
            self._problems.anchors(coming),
            size=self.plan.population,
            budget=self.plan.evolution_calls,
            roll=rolled,
            edits=edits,
            price=self._tokens,
            reflection=self._reflection,
            seed=self.plan.seed + coming.start,
            standings=self.state.standings,
            promise=promise if self.state.evidence.groups else None,
        )
        assert self.state.samples == first + evolved.samples
        evidence = self.state.evidence.with_replies(replies)
        self._move(population=evolved.population, material=edits.material, evidence=evidence)
        return evolved

    def _step(self, step: int) -> Step:
        """One step of the slow half: the contexts are fixed."""
        problems = self._problems.minibatch(step)
        if self.plan.arm == "distill":
            rollouts = self._rolled(problems, (EMPTY,), step, rewarded=False)
            done = self._learner.distill(rollouts, self.state.population[0], step=step)
        else:
            known = set(map(id, self._drawn.values()))
            rollouts = self._rolled(problems, self.state.population, step, rewarded=True)
            done = self._learner.reinforce(rollouts, step=step)
            new = [rollout for rollout in rollouts if id(rollout) not in known]
            material = self.state.material
            for number, rollout in enumerate(new, start=self.state.samples + 1):
                material = material.with_reply(at=number, **scored(rollout))
            evidence = self.state.evidence.with_replies(rollouts)
            self._move(samples=self.state.samples + len(new), material=material, evidence=evidence)
            for first in range(0, len(rollouts), self.plan.rollouts):
                group = rollouts[first : first + self.plan.rollouts]
                self._standings.add([rollout for rollout in group if id(rollout) not in known])
        self._run.write(CURVE, {"kind": "step", "step": step + 1, "samples": self.state.samples, **vars(done)})
        self._on_step(step + 1)
        return done

    def _rolled(
        self, problems: Sequence[Problem], population: Sequence[TaskContext], step: int, *, rewarded: bool
    ) -> list[Rollout]:
        return roll_groups(
            self._rollers.trained,
            problems,
            population,
            sampling(self.plan, rewarded=rewarded),
            rollouts=self.plan.rollouts,
            seed=f"{self.plan.seed} step {step}",
            drawn=self._drawn,
        )

    def _tokens(self, context: TaskContext) -> int:
        with self._policy.frozen() as base:
            return context.tokens(base.tokens.count)

    def _fits(self, context: TaskContext) -> bool:
        return self._tokens(context) <= self.plan.context_tokens

    def _move(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)

    def _save(self) -> None:
        self._run.save(
            self.state, {"weights": snapshot(self._policy), "optimizer": self._learner.optimizer.state_dict()}
        )

    def _resume(self) -> None:
        saved = self._run.resume()
        if saved is not None:
            self.state, tensors = saved
            restore(self._policy, tensors["weights"])
            self._learner.optimizer.load_state_dict(tensors["optimizer"])
