"""What the benchmark shows: a table, pictures, the replies to read, the last line."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.benchmarks.fst.analysis import Results, drifts
from tests.benchmarks.stats import json_line
from workers.fst.plan import ARMS


def table(results: Results) -> Table:
    """A row a task and arm."""
    out = Table(title="Fast-Slow Training, on test problems (means over seeds)")
    for column in (
        "task",
        "arm",
        "seeds",
        "samples",
        "first",
        "last",
        "best",
        "asymptote",
        "KL nats",
        "in budget",
        "seconds",
    ):
        out.add_column(column, justify="left" if column in ("task", "arm") else "right")
    for task in results.tasks:
        for arm in ARMS:
            curve, runs = results.curve("curve", task, arm), results.of("curve", task, arm)
            if not curve:
                continue
            fitted = results.fit(task, arm)
            budgeted = [run.result["budgeted"]["reward"] for run in runs if "budgeted" in run.result]
            out.add_row(
                task,
                arm,
                str(len(runs)),
                f"{curve[-1].samples:.0f}",
                f"{curve[0].reward:.3f}",
                f"{curve[-1].reward:.3f}",
                f"{max(p.reward for p in curve):.3f}",
                f"{fitted.asymptote:.3f}" if fitted else "-",
                f"{curve[-1].kl_nats:.3f}",
                f"{sum(budgeted) / len(budgeted):.3f}" if budgeted else "-",
                f"{sum(run.result['seconds'] for run in runs) / len(runs):.0f}",
            )
    return out


def line(results: Results, *, size: str) -> str:
    """The last line."""
    tasks: Any = {task: results.headline(task) for task in results.tasks}
    return json_line("fst", {"size": size, "tasks": tasks}, {})  # type: ignore[dict-item]


def details(results: Results, folder: Path) -> Path:
    """All points of all curves and the drifts, for whoever wants to look closer."""
    curves = {
        f"{role} {task} {arm}": [vars(point) for point in results.curve(role, task, arm)]
        for role in ("curve", "second", "switch")
        for task in results.tasks
        for arm in ARMS
        if results.of(role, task, arm)
    }
    path = folder / "details.json"
    path.write_text(json.dumps({"curves": curves, "kl_at_the_end": drifts(results)}, indent=1))
    return path
