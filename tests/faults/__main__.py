"""`python -m tests.faults [NAME ...]`: breaks one thing after the other; ends with 1 where anything was lost or crossed."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.status import Status

import tests.faults.kinds  # noqa: F401  registers them
from tests.benchmarks.processes import as_command, model_folder, tidy_end
from tests.benchmarks.terminal import terminal
from tests.faults.registry import FAULTS, Fault
from tests.faults.report import markdown, result, table
from tests.faults.stack import started
from tests.faults.trial import Outcome, Pace, run


async def run_all(
    faults: Sequence[Fault], pace: Pace, *, folder: Path, console: Console, outcomes: list[Outcome]
) -> None:
    """One after the other, those of one layout on one stack; `outcomes` has those that are over."""
    for number, (layout, group) in enumerate(groupby(faults, key=lambda fault: fault.layout)):
        console.print(f"Starting stack {number + 1}...", highlight=False)
        async with started(layout, folder / str(number), Path(model_folder())) as stack:
            for fault in group:
                began = time.monotonic()
                with console.status(f"{fault.name}...") as status:
                    outcome = await run(fault, stack, pace, partial(_show, status, fault))
                outcomes.append(outcome)
                told = "well" if outcome.held else "; ".join(outcome.problems) or "not well"
                console.print(
                    f"{fault.name} ({time.monotonic() - began:.0f} s): {told}", highlight=False, soft_wrap=True
                )


def _show(status: Status, fault: Fault, step: str) -> None:
    status.update(f"{fault.name}: {step}")


def chosen(names: Sequence[str]) -> list[Fault]:
    """The faults of these names, else all that do not wait to be named; those of one layout together."""
    if unknown := set(names) - FAULTS.keys():
        sys.exit(f"no faults are called {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}")
    found = [FAULTS[name] for name in names] or [fault for fault in FAULTS.values() if not fault.on_request]
    layouts = list(dict.fromkeys(fault.layout for fault in found))
    return sorted(found, key=lambda fault: layouts.index(fault.layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; all without")
    parser.add_argument("--list", action="store_true", help="say which there are, and end")
    parser.add_argument("--seconds", type=float, default=Pace.fault_seconds, help="how long something stays broken")
    parser.add_argument("--users", type=int, default=Pace.users)
    parser.add_argument("--pause", type=float, default=Pace.pause_seconds, help="of a user between chats, seconds")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/faults.md")
    parser.add_argument("--keep", type=Path, help="an empty folder for logs and data, which stay")
    options = parser.parse_args()
    if options.list:
        for fault in FAULTS.values():
            print(f"{fault.name:28}{'(only by name) ' if fault.on_request else ''}{fault.says}")
        return
    console = terminal()
    pace = Pace(users=options.users, pause_seconds=options.pause, fault_seconds=options.seconds)
    outcomes: list[Outcome] = []
    with tidy_end(), tempfile.TemporaryDirectory(prefix="fastslow-faults-") as temporary:
        folder = options.keep or Path(temporary)
        try:
            asyncio.run(run_all(chosen(options.names), pace, folder=folder, console=console, outcomes=outcomes))
        finally:
            _tell(outcomes, pace, console, in_markdown=options.markdown)
    if not all(outcome.held for outcome in outcomes):
        sys.exit(1)


def _tell(outcomes: Sequence[Outcome], pace: Pace, console: Console, *, in_markdown: bool) -> None:
    """All that is over, also where something ended the run early."""
    console.print(table(outcomes))
    if in_markdown:
        print(markdown(outcomes))
    print(result(outcomes, pace))


if __name__ == "__main__":
    as_command(main)
