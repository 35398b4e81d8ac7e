"""`python -m tests.benchmarks.fst`: Fast-Slow Training against its arms, on the paper's axes.

Reward against samples, samples to rl's peak, KL at matched reward, a second task afterwards, the task switched on the fly, the 2x2. An
interrupted run, or one that `--limit-seconds` ended, is taken up where it stopped: give the same command again (exit status 75 until
all is done; until then what is finished is shown, and `--limit-seconds 0` does no more than that). Needs torch, transformers and peft
beside the tree; pictures are drawn where matplotlib is.
"""

import argparse
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from service.errors import FastslowError
from service.keys import with_own_vllm_key
from service.settings import Settings
from tests.benchmarks.fst.analysis import Finished, Results
from tests.benchmarks.fst.plan import SIZES, Named, runs
from tests.benchmarks.fst.report import details, line, table
from tests.benchmarks.terminal import terminal
from workers.consolidation.base import Base, load_base
from workers.fst.command import line_of
from workers.fst.folder import Run, State
from workers.fst.plan import ARMS, RolloutsBy
from workers.fst.run import train

# "Try again", of sysexits.h.
EX_TEMPFAIL = 75
# Anchors of each kind and use; they are made first, which takes minutes for all of them on a CPU.
ANCHORS = {"smoke": 8, "small": 16, "medium": 24, "full": 48}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smoke")
    parser.add_argument("--folder", type=Path, help="default: data/bench-fst/SIZE")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no cycle after these")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--tasks", help="names, separated by commas; the size's by default, as for the next ones")
    parser.add_argument("--seeds", help="such as 0,1,2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rollouts-by", choices=get_args(RolloutsBy), help="as of `fastslow fst run`")
    return parser.parse_args()


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the options change of the size."""
    found: dict[str, Any] = {}
    if options.tasks:
        found["tasks"] = tuple(options.tasks.split(","))
    if options.seeds:
        found["seeds"] = tuple(int(seed) for seed in options.seeds.split(","))
    if options.steps:
        found["steps"] = options.steps
    if options.rollouts_by:
        found["rollouts_by"] = options.rollouts_by
    return found


def main() -> int:
    options = arguments()
    folder = (options.folder or Path("data") / "bench-fst" / options.size).absolute()
    settings = Settings(anchors=ANCHORS[options.size])
    if settings.own_vllm:
        settings = with_own_vllm_key(settings)
    console = terminal()
    end = time.monotonic() + options.limit_seconds

    @cache
    def base() -> Base:
        return load_base(settings)

    named = runs(options.size, folder, arms=options.arms.split(","), **changes(options))
    finished: list[Finished] = []
    for number, one in enumerate(named, start=1):
        left = end - time.monotonic()
        if left > 0 and Run(one.folder, one.plan).result is None:
            about = f"{number} of {len(named)}: {one.role} {one.arm} on {', '.join(one.plan.tasks)}, seed {one.seed}"
            console.print(about, highlight=False)
            try:
                go_on(one, base=base, settings=settings, console=console, limit_seconds=left)
            except FastslowError as error:
                console.print(error.message, highlight=False)
                return 1
        if (done := finished_run(one)) is not None:
            finished.append(done)
    if not finished:
        console.print(f"The time is up before any run was: the same command goes on in {folder}.", highlight=False)
        return EX_TEMPFAIL
    show(Results(finished), folder, console)
    if len(finished) < len(named):
        told = (
            f"The time is up, and {len(finished)} of {len(named)} runs are shown: the same command goes on in {folder}."
        )
        console.print(told, highlight=False)
    print(line(Results(finished), size=options.size))
    return 0 if len(finished) == len(named) else EX_TEMPFAIL


def go_on(one: Named, *, base: Any, settings: Settings, console: Console, limit_seconds: float) -> None:
    """Go on with a run, to its end or that of the time."""

    def on_point(state: State, record: dict[str, Any]) -> None:
        console.print(f"  {line_of(record)}", highlight=False)

    train(one.plan, one.folder, base=base, settings=settings, on_point=on_point, limit_seconds=limit_seconds)


def finished_run(one: Named) -> Finished | None:
    """A run that has ended, from its folder."""
    run = Run(one.folder, one.plan)
    if run.result is None:
        return None
    return Finished(one, [record for record in run.curve() if record["kind"] == "cycle"], run.result)


def show(results: Results, folder: Path, console: Console) -> None:
    console.print(table(results))
    details(results, folder)
    try:
        from tests.benchmarks.fst.plots import draw
    except ImportError:
        console.print("matplotlib is not installed: no pictures.")
        return
    for path in draw(results, folder):
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
