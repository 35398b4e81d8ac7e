"""`python -m tests.benchmarks.consolidation`: adapters of many users trained side by side, against one by one with peft and against TRL.

Three arms train on the same users' corrections, each in a process of its own; they take short turns, and nobody is always first:

    sequential  peft's layers and torch's AdamW, one user after the other, with our objective on the same rows, each a sequence
    stacked     our trainer: all users in one stack, what rows of one user begin with in common run once
    trl         TRL's DPOTrainer with peft, one user after the other, on the same pairs and steps; it does less: no anchors, no samples

One by one does not depend on how many users there are, so each turn measures a few of them, others in each repeat.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import workers.consolidation  # noqa: F401  tells OpenMP how to wait, here and in the arms' processes
from service.settings import Settings
from tests.benchmarks.consolidation.process import ArmFailed, Remote, arms
from tests.benchmarks.consolidation.report import Measured, details, headline, table
from tests.benchmarks.consolidation.turns import Order, chosen
from tests.benchmarks.stats import json_line
from tests.benchmarks.terminal import terminal

# On a CPU a step of one user takes some seconds.
CPU_USERS, CUDA_USERS, QUICK_USERS = "1,4,8,16", "1,4,8,16,32", "1,2"
# Of users with data of their own: their preparing takes longer than a step. The others have the data of the first ones again.
CPU_DISTINCT = 4
# Losses of the first step under arms that compute the same: float32 on the CPU, bfloat16 on CUDA.
SAME_LOSS = {"cpu": 1e-3, "cuda": 0.1}
MIN_FEEDBACKS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", help=f"default: {CPU_USERS}; on CUDA {CUDA_USERS}")
    parser.add_argument("--repeats", type=int, help="default: 2; on CUDA 5")
    parser.add_argument("--steps", type=int, help="of each turn; default: 1; on CUDA 5")
    parser.add_argument(
        "--one-by-one", type=int, help="users of a turn of the arms that go one by one; default: 1; on CUDA 2"
    )
    parser.add_argument("--model", default="", help="folder or hub id; default: the default model")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds the model and the anchors' cache")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--anchors", type=int, default=48, help="of each kind; they are made once, which takes a minute or two"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: one repeat at one and two users")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    changes = {"model": options.model, "model_name": Path(options.model).name} if options.model else {}
    return Settings(
        _env_file=None,
        data_dir=options.data_dir,
        worker_device=options.device,
        anchors=options.anchors,
        user_min_feedbacks=MIN_FEEDBACKS,
        **changes,
    )


def measure(
    remotes: dict[str, Remote],
    measured: Measured,
    *,
    distinct: int,
    repeats: int,
    steps: int,
    few: int,
    told: Progress,
) -> None:
    task = told.add_task("preparing", total=len(remotes) + repeats * len(measured.users) * len(remotes))
    for name, remote in remotes.items():
        count = distinct if name == "stacked" else min(distinct, few * repeats)
        told.update(task, description=f"{name}: preparing {count} users, warming up")
        measured.prepared[name] = remote.prepare(count)
        remote.turn(Order((0,), first=0, steps=1))
        told.advance(task)
    for repeat in range(repeats):
        for users in measured.users:
            for name in measured.arms if repeat % 2 else reversed(measured.arms):
                told.update(task, description=f"{name} at {users}")
                everybody = range(users)
                who = tuple(everybody) if name == "stacked" else chosen(everybody, few, repeat=repeat)
                first = (repeat * steps) % (measured.settings.train_steps - steps + 1)
                measured.add(name, users, remotes[name].turn(Order(who, first=first, steps=steps)))
                told.advance(task)
            check_same(measured, users)


def check_same(measured: Measured, users: int) -> None:
    """The last turns of the two arms with our objective began at the same loss for the same users.

    Raises:
        ArmFailed: they did not, so they don't do the same.
    """
    theirs, ours = (measured.turns[name, users][-1] for name in ("sequential", "stacked"))
    for job, loss in theirs.losses.items():
        if not abs(loss - ours.losses[job]) <= SAME_LOSS[device_of(measured.settings)] * max(abs(loss), 1.0):
            raise ArmFailed(f"{job} began at a loss of {loss} one by one and {ours.losses[job]} in the stack")


def device_of(settings: Settings) -> str:
    return "cuda" if settings.worker_device != "cpu" and torch.cuda.is_available() else "cpu"


def names(console: Console) -> Sequence[str]:
    if importlib.util.find_spec("trl") is None:
        console.print("trl is not installed, so its arm is left out", highlight=False)
        return ("sequential", "stacked")
    return ("sequential", "stacked", "trl")


def main() -> int:
    options = arguments()
    console = terminal()
    settings = settings_of(options)
    device = device_of(settings)
    cuda = device == "cuda" and not options.quick
    users = options.users or (QUICK_USERS if options.quick else CUDA_USERS if cuda else CPU_USERS)
    measured = Measured(settings, [int(n) for n in users.split(",")], names(console))
    distinct = max(measured.users) if cuda else min(max(measured.users), CPU_DISTINCT)
    columns = (TextColumn("{task.description:<42}"), BarColumn(), TimeElapsedColumn())
    console.print(
        f"{device}, {torch.get_num_threads()} threads; load average {os.getloadavg()[0]:.1f}", highlight=False
    )
    try:
        with (
            arms(measured.arms, settings, distinct=distinct) as remotes,
            Progress(*columns, console=console) as told,
        ):
            measure(
                remotes,
                measured,
                distinct=distinct,
                repeats=options.repeats or (5 if cuda else 1 if options.quick else 2),
                steps=options.steps or (5 if cuda else 1),
                few=options.one_by_one or (2 if cuda else 1),
                told=told,
            )
    except ArmFailed as failed:
        console.print(str(failed), highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; everything is stopped")
        return 130
    console.print(table(measured))
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    loaded = {"load_average": os.getloadavg()[0]}
    print(json_line("consolidation", headline(measured, device=name), details(measured) | loaded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
