"""Which runs a size is made of, under which names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.fst.plan import ARMS, Plan

SECOND_ARMS = ("rl", "fst")
"""Arms whose weights go on to another task, and that are trained while the task switches."""

# What a plan of Fast-Slow Training takes, and: tasks, seeds, and how many of the tasks are followed by a second one.
SIZES: dict[str, dict[str, Any]] = {
    # Minutes on two cores: it shows that everything works, and no more.
    "smoke": {
        "tasks": ("gym-easy:chain_sum", "gym-easy:spell_backward"),
        "followed": 1,
        "seeds": (0,),
        "steps": 2,
        "steps_per_cycle": 1,
        "contexts": 2,
        "rollouts": 4,
        "batch_problems": 2,
        "new_tokens": 16,
        "context_tokens": 128,
        "evolution_calls": 4,
        "anchor_problems": 2,
        "train_problems": 48,
        "test_problems": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
    },
    # For two cores too, with several times the samples: four to twelve minutes a run where each has one (docs/fst.md).
    "small": {
        "tasks": ("norms:no-commas", "gym-easy:chain_sum", "norms-told:brief"),
        "followed": 1,
        "seeds": (0, 1, 2),
        "steps": 12,
        "steps_per_cycle": 3,
        "contexts": 2,
        "rollouts": 8,
        "batch_problems": 2,
        "new_tokens": 32,
        "context_tokens": 128,
        "evolution_calls": 16,
        "anchor_problems": 6,
        "train_problems": 64,
        "test_problems": 32,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
    },
    # Minutes a run on one GPU with the default model, and as many runs at once as fit it.
    "medium": {
        "tasks": ("gym-easy:chain_sum", "norms-told:brief"),
        "followed": 0,
        "seeds": (0, 1, 2),
        "steps": 36,
        "steps_per_cycle": 6,
        "contexts": 4,
        "rollouts": 8,
        "batch_problems": 8,
        "new_tokens": 32,
        "context_tokens": 192,
        "evolution_calls": 64,
        "anchor_problems": 12,
        "train_problems": 256,
        "test_problems": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 4,
    },
    # An hour or two on one GPU with the default model.
    "full": {
        "tasks": ("gym-easy:chain_sum", "gym-easy:spell_backward", "norms-told:brief"),
        "followed": 3,
        "seeds": (0, 1, 2),
        "steps": 90,
        "steps_per_cycle": 6,
        "contexts": 4,
        "rollouts": 8,
        "batch_problems": 32,
        "new_tokens": 64,
        "context_tokens": 384,
        "evolution_calls": 128,
        "anchor_problems": 24,
        "train_problems": 256,
        "test_problems": 32,
        "test_samples": 4,
        "learning_rate": 3e-4,
        "warmup_steps": 10,
    },
}


@dataclass(frozen=True)
class Named:
    """One run of the benchmark."""

    role: str
    """`curve`, `second` or `switch`."""
    task: str
    """The first task."""
    arm: str
    seed: int
    plan: Plan
    folder: Path


def runs(size: str, root: Path, *, arms: Sequence[str] = ARMS, **changes: Any) -> list[Named]:
    """The runs, in an order in which each finds what it starts from.

    Args:
        changes: to the size's fields.
    """
    fields = SIZES[size] | changes
    tasks, seeds, followed = fields.pop("tasks"), fields.pop("seeds"), fields.pop("followed")
    found = []
    # Seed by seed, so that a benchmark that is cut short has something to show of everything.
    for seed in seeds:
        common = {**fields, "seed": seed}
        for task in tasks:
            found += [_named(root, "curve", task, arm, seed, Plan(tasks=(task,), arm=arm, **common)) for arm in arms]
        for task, following in _pairs(tasks)[:followed]:
            for arm in (arm for arm in SECOND_ARMS if arm in arms):
                start = _folder(root, "curve", task, arm, seed)
                plan = Plan(tasks=(following,), arm="rl", **{**common, "start": str(start)})
                found.append(_named(root, "second", task, arm, seed, plan))
                each = fields["steps"]
                switched = {**common, "steps": 2 * each, "switch_steps": each}
                plan = Plan(tasks=(task, following), arm=arm, **switched)
                found.append(_named(root, "switch", task, arm, seed, plan))
    return found


def _pairs(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Each task with the one that follows it."""
    return list(zip(tasks, (*tasks[1:], tasks[0]), strict=True)) if len(tasks) > 1 else []


def second_task(tasks: Sequence[str], task: str) -> str | None:
    """The task that follows this one; None where there is only one."""
    return dict(_pairs(tasks)).get(task)


def _named(root: Path, role: str, task: str, arm: str, seed: int, plan: Plan) -> Named:
    return Named(role, task, arm, seed, plan, _folder(root, role, task, arm, seed))


def _folder(root: Path, role: str, task: str, arm: str, seed: int) -> Path:
    return root / task.replace(":", "-") / f"{role}-{arm}-{seed}"
