"""The pictures of the benchmark. Colours are Okabe and Ito's, which colour-blind people can tell apart; each arm has a mark of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks.fst.analysis import Point, Results
from tests.benchmarks.fst.plan import second_task

LOOKS = {
    "fst": ("#0072B2", "o"),
    "rl": ("#D55E00", "s"),
    "context": ("#009E73", "^"),
    "distill": ("#CC79A7", "D"),
    "base": ("#777777", "x"),
}
DPI = 120


def draw(results: Results, folder: Path) -> list[Path]:
    """Write those of which there are runs; their files. Tasks without any have no panel."""
    pictures = {
        "reward.png": (_rewards, "curve"),
        "kl.png": (_drifts, "curve"),
        "switch.png": (_switches, "switch"),
        "second-task.png": (_seconds, "second"),
        "two-by-two.png": (_squares, "curve"),
    }
    files = []
    for name, (picture, role) in pictures.items():
        tasks = [task for task in results.tasks if any(results.of(role, task, arm) for arm in LOOKS)]
        if not tasks:
            continue
        figure = Figure(figsize=(5 * len(tasks) + 1, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            picture(axes, results, task)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            axes.set_title(axes.get_title() or task, fontsize=10)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
        figure.savefig(folder / name, dpi=DPI)
        files.append(folder / name)
    return files


def _line(axes: Any, curve: Sequence[Point], label: str, arm: str, *, x: Sequence[float], band: bool = True) -> None:
    colour, mark = LOOKS[arm]
    axes.plot(x, [p.reward for p in curve], marker=mark, markersize=4, color=colour, label=label)
    if band:
        axes.fill_between(
            x, [p.lowest for p in curve], [p.highest for p in curve], color=colour, alpha=0.12, linewidth=0
        )


def _rewards(axes: Any, results: Results, task: str) -> None:
    for arm in LOOKS:
        curve = results.curve("curve", task, arm)
        if not curve:
            continue
        _line(axes, curve, arm, arm, x=[p.samples for p in curve])
        if found := results.fit(task, arm):
            axes.axhline(found.asymptote, color=LOOKS[arm][0], linestyle=":", linewidth=1)
    axes.set(xlabel="scored replies (steps and evolution)", ylabel="reward on test problems (dotted: fitted asymptote)")


def _drifts(axes: Any, results: Results, task: str) -> None:
    for arm in LOOKS:
        if curve := results.curve("curve", task, arm):
            _line(axes, curve, arm, arm, x=[p.kl_nats for p in curve], band=False)
    axes.set(xlabel="KL(trained || base), nats per token", ylabel="reward on test problems")


def _switches(axes: Any, results: Results, task: str) -> None:
    for arm in LOOKS:
        if curve := results.curve("switch", task, arm):
            second = curve[-1].task
            # The two tasks' rewards are no one line.
            for label, which in ((arm, task), ("", second)):
                part = [p for p in curve if p.task == which]
                _line(axes, part, label, arm, x=[p.step for p in part])
            at = max(p.step for p in curve if p.task == task)
            axes.axvline(at, color="#777777", linewidth=1)
            axes.set_title(f"{task}, then {second}")
    axes.set(xlabel="steps (line: the task switches)", ylabel="reward on the task at hand")


def _seconds(axes: Any, results: Results, task: str) -> None:
    for start, curve in results.after(task).items():
        if curve:
            _line(axes, curve, f"from {start}", start, x=[p.samples for p in curve])
    axes.set(
        xlabel="scored replies of rl on the second task",
        ylabel="reward on the second task",
        title=f"{second_task(results.tasks, task)} after {task}",
    )


def _squares(axes: Any, results: Results, task: str) -> None:
    cells = results.two_by_two(task)
    names = [f"{c['weights']}\n{'with' if c['context'] else 'no'} context" for c in cells]
    colours = [LOOKS["fst" if c["weights"] == "slow" else "base"][0] for c in cells]
    axes.bar(names, [c["reward"] for c in cells], color=colours, width=0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(xlabel="weights and context of fst", ylabel="reward on test problems")
