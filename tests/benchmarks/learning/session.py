"""One run from its start, or from where it stopped, to its last line."""

import os
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.tokens import load_tokens
from tests.benchmarks import processes
from tests.benchmarks.learning import plots
from tests.benchmarks.learning.analysis import Results
from tests.benchmarks.learning.client import Service
from tests.benchmarks.learning.folder import Run
from tests.benchmarks.learning.peers import Peer
from tests.benchmarks.learning.plan import Plan
from tests.benchmarks.learning.report import (
    adapter_table,
    controls,
    costs,
    labels,
    readable,
    result,
    scores,
)
from tests.benchmarks.learning.run import Bench


async def execute(
    run: Run, plan: Plan, service: Service, peers: Sequence[Peer] = (), *, concurrency: int, console: Console
) -> str:
    """Do what is left of the run, write its pictures and replies, show its table; the last line."""
    count = load_tokens(processes.model_folder()).count
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting")

        def advance(what: str, steps: int) -> None:
            progress.update(task, advance=steps, description=what)

        bench = Bench(
            plan,
            service=service,
            records=run.records,
            count=count,
            prefix=run.prefix,
            peers=peers,
            concurrency=concurrency,
            advance=advance,
            note=partial(progress.console.print, markup=False, highlight=False),
        )
        progress.update(task, total=bench.steps)
        await bench.run()
        versions = await service.adapters()
    results = Results(plan, bench.people, run.records)
    matrix, swap = controls(results, bench.tests, bench.train)
    name = f"{plan.size}, {plan.users} users, {plan.tests} questions, seed {plan.seed}"
    plots.curves({arm: results.curve(arm) for arm in results.arms}, run.folder / "curves.png", title=name)
    if matrix:
        plots.swap(matrix, labels(results), run.folder / "swap.png", title=f"User swap ({name})")
    readable(results, run.folder)
    console.print(scores(results))
    console.print(costs(results))
    if any(run.records.under("consolidated")):
        console.print(adapter_table(results))
    for record in run.records.under("settled"):
        if record["unsettled"]:
            console.print(f"at {record['key'][1]}, {len(record['unsettled'])} contexts were measured unfinished")
    details = {"load_average": os.getloadavg()[0], "swap_matrix": matrix, "folder": str(run.folder)}
    line = result(results, versions, swap, details)
    (run.folder / "result.json").write_text(f"{line}\n")
    run.finished()
    return line
