"""Runs a plan in a folder: what the command, the queue and the benchmark call."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from service.errors import InvalidRequest
from service.settings import Settings
from service.verifiers import Task, task
from workers.consolidation.anchors import load_anchors
from workers.consolidation.base import Base
from workers.fst import folder as folders
from workers.fst import policy as policies
from workers.fst.curves import Curves, conclude
from workers.fst.folder import CHECKPOINT, Ground, State, read_ground
from workers.fst.loop import Loop
from workers.fst.plan import Plan
from workers.fst.problems import Problems
from workers.fst.rollouts import Rollers, in_process
from workers.fst.served import served

OnPoint = Callable[[State, dict[str, Any]], None]


def train(
    plan: Plan,
    out: Path,
    *,
    base: Callable[[], Base],
    settings: Settings,
    find: Callable[[str], Task] = task,
    on_point: OnPoint = lambda state, record: None,
    on_step: Callable[[int], None] = lambda step: None,
    limit_seconds: float = float("inf"),
    most_attempts: int | None = None,
) -> dict[str, Any] | None:
    """Go on with the run in `out`, or begin it. Its result, or None where the time ended first: the same call goes on then.

    Args:
        base: gives the frozen base; called only where there is something to do.
        find: the registry of tasks.
        limit_seconds: no cycle is begun after these.
        most_attempts: so many processes may die at it without a checkpoint; None counts none.

    Raises:
        InvalidRequest: an unknown task, or another base model or shape of adapters than the run began with.
        Conflict: the folder holds another run, or another process is at work in it.
        JobFailed: too many attempts, no model, a loss that is not finite, or a vLLM that can't be given the adapters.
        EngineUnavailable: no vLLM, where the plan wants one.
    """
    end = time.monotonic() + limit_seconds
    problems = Problems(plan, find)
    with folders.opened(out, plan) as run, ExitStack() as held:
        if run.result is not None:
            return run.result
        if most_attempts is not None:
            held.enter_context(run.attempt(most=most_attempts))
        frozen = base()
        ground = Ground.of(plan, settings, base_sha256=frozen.sha256)
        run.stand_on(ground)
        anchors = load_anchors(
            frozen, cache=settings.data_dir / "anchors", limit=settings.anchors, progress=lambda done, of: None
        )
        with (
            policies.opened(frozen, plan, settings) as policy,
            _rollers(policy, plan, out=out, settings=settings) as rollers,
        ):
            _start(policy, plan, ground)
            curves = Curves(run, policy, rollers, problems, anchors, on_point=on_point)
            loop = Loop(run, policy, rollers, problems, settings=settings, measure=curves.point, on_step=on_step)
            if not loop.go(enough=lambda: time.monotonic() > end):
                return None
            return conclude(run, loop.state, policy, rollers, problems, anchors, settings=settings)


def _rollers(policy: policies.Policy, plan: Plan, *, out: Path, settings: Settings) -> AbstractContextManager[Rollers]:
    if plan.rollouts_by == "vllm":
        return served(policy, out=out, settings=settings)
    return nullcontext(in_process(policy))


def _start(policy: policies.Policy, plan: Plan, ground: Ground) -> None:
    """Begin with another run's weights, as it learnt them (its export may be scaled down).

    Raises:
        InvalidRequest: there are none, or they are of another kind.
    """
    if not plan.start:
        return
    path = Path(plan.start) / CHECKPOINT
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["weights"]
    except (OSError, KeyError, RuntimeError) as error:
        raise InvalidRequest(f"--start {plan.start}: there is no run with a checkpoint.", param="start") from error
    there = read_ground(Path(plan.start))
    differ = there.differences(ground) if there else []
    if differ or [w.shape for w in weights] != [p.shape for p in policy.parameters]:
        told = f": {', '.join(differ)}" if differ else ""
        raise InvalidRequest(
            f"--start {plan.start}: its weights are of another model, rank or kind{told}.", param="start"
        )
    policies.restore(policy, weights)
