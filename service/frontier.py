"""The frontier of an adapter version as a picture: held-out margin against drift, over scales, from its report's numbers."""

import io
import threading
from typing import TYPE_CHECKING

from service.domain.measures import FrontierPoint
from service.domain.slow_weights import AdapterVersion, TrainReport
from service.errors import NotFound

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
ALONE, WITH_CONTEXT, BUDGET = "#8a4fb0", "#1f6fb4", "#b03a2e"

# matplotlib keeps caches that threads share.
_drawing = threading.Lock()


def png(version: AdapterVersion) -> bytes:
    """The picture, in a tenth of a second or so: not for the event loop. matplotlib is imported at the first call.

    Raises:
        NotFound: the version's report has no frontier; it is older than that.
    """
    if not version.report.frontier:
        raise NotFound(
            f"The report of {version.name} holds no frontier: it was made before that was measured.",
            param="name",
            code="no_frontier",
        )
    with _drawing:
        return _drawn(version)


def _drawn(version: AdapterVersion) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    report = version.report
    points = sorted(report.frontier, key=lambda point: point.scale)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    chat, text = figure.subplots(1, 2, sharey=True)
    _panel(chat, report, [p.kl_chat_nats for p in points], points, budget=report.kl_chat.budget_nats)
    _panel(text, report, [p.kl_text_nats for p in points], points, budget=report.kl_text.budget_nats)
    chat.set(xlabel="KL from the base on chat anchors, nats per token", ylabel="held-out margin, nats per token")
    text.set(xlabel="KL from the base on plain-text anchors, nats per token")
    text.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(f"{version.name}, {report.heldout_examples} held-out examples", fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    return drawn.getvalue()


def _panel(axes: "Axes", report: TrainReport, kl: list[float], points: list[FrontierPoint], *, budget: float) -> None:
    """Both margins over one kind of drift, from the base at none to the largest scale."""
    margins = report.margins
    with_context = margins.base if margins.base_with_context is None else margins.base_with_context
    for label, colour, start, values in (
        ("without context", ALONE, margins.base, [p.margin_alone for p in points]),
        ("with context", WITH_CONTEXT, with_context, [p.margin_with_context for p in points]),
    ):
        axes.plot([0.0, *kl], [start, *values], "o-", color=colour, label=label)
    for point, x in zip(points, kl, strict=True):
        chosen = abs(point.scale - report.scale) < 1e-9
        axes.annotate(
            f"{point.scale:.2f}" + (" chosen" if chosen else ""),
            (x, point.margin_alone),
            textcoords="offset points",
            xytext=(4, -12),
            fontsize=8,
            fontweight="bold" if chosen else "normal",
        )
    axes.axvline(budget, color=BUDGET, linestyle="--", linewidth=1, label="budget")
    axes.set_xlim(left=0.0)
    axes.grid(alpha=0.3)
