"""The pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks.learning.analysis import Interval

COLOURS = {
    "base": "#888888",
    "last-k": "#d98c21",
    "fast": "#1f6fb4",
    "slow": "#8a4fb0",
    "pooled": "#b0a04f",
    "both": "#2a9d5c",
    "both-small": "#7cc49a",
    "oracle": "#333333",
}
DASHED = ("base", "oracle")
DPI = 120
ASIDE = 0.12
"""Between arms with a single point, in distances between points."""


def curves(found: Mapping[str, Mapping[int, Interval]], path: Path, *, title: str) -> None:
    """Satisfaction over feedbacks, a line an arm with its interval; the points stand at equal distances.

    Arms with a single point stand beside each other, to the right of the others.
    """
    points = sorted({point for curve in found.values() for point in curve})
    places = {point: place for place, point in enumerate(points)}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    aside = 0.0
    for arm, curve in found.items():
        aside += ASIDE if len(curve) == 1 else 0.0
        x = [places[point] + (aside if len(curve) == 1 else 0.0) for point in curve]
        colour = COLOURS.get(arm)
        [line] = axes.plot(
            x,
            [i.mean for i in curve.values()],
            "--" if arm in DASHED else "o-",
            color=colour,
            label=arm,
        )
        low, high = [i.low for i in curve.values()], [i.high for i in curve.values()]
        if len(x) > 1:
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        else:
            mean = curve[points[-1]].mean
            axes.errorbar(x, [mean], [[mean - low[0]], [high[0] - mean]], color=line.get_color(), capsize=4)
    axes.set(ylim=(-0.02, 1.02), xlabel="feedbacks per user", ylabel="share of replies that satisfy", title=title)
    axes.set_xticks(range(len(points)), [str(point) for point in points])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def swap(matrix: Sequence[Sequence[float]], labels: Sequence[str], path: Path, *, title: str) -> None:
    """The user-swap matrix: rows judge, columns were taught."""
    side = 3 + 0.35 * len(labels)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="served with the context of", ylabel="judged by", title=title)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of replies that satisfy")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
