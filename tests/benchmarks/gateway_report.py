"""What chats through several targets cost: the figures of the rounds, a table, a picture, the benchmark's last line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from tests.benchmarks.stats import Round, json_line, median_added_ms, median_ms, median_rps, percentile
from tests.benchmarks.targets import DIRECT, FULL, OFF, PASSTHROUGH

CONNECTIONS = (1, 16, 64)
COLOURS = {
    DIRECT: "#888888",
    PASSTHROUGH: "#333333",
    "LiteLLM": "#d98c21",
    "TensorZero": "#8a4fb0",
    "vllm-router": "#b0506a",
    OFF: "#7cc49a",
    FULL: "#1f6fb4",
}


@dataclass
class Measured:
    """All rounds, by whether they were streamed, their connections and their target; the n-th of each belong together."""

    targets: Sequence[str]
    context_tokens: int
    rounds: dict[tuple[bool, int, str], list[Round]] = field(default_factory=dict)
    cpu_ms: dict[tuple[bool, int, str], list[float]] = field(default_factory=dict)
    """Milliseconds of the target's own CPU time per chat: what a busy machine changes least."""

    def rps(self, target: str, *, stream: bool = False) -> float:
        """Replies a second at the best number of connections."""
        return max(median_rps(self.rounds[stream, connections, target]) for connections in CONNECTIONS)

    def added_ms(self, target: str, share: float, *, stream: bool = False, connections: int = 1) -> float:
        """What a whole reply takes longer than directly, at a percentile."""
        rounds = self.rounds
        return median_added_ms(rounds[stream, connections, target], rounds[stream, connections, DIRECT], share)

    def first_byte_added_ms(self, target: str) -> float:
        """What a stream's first byte takes longer than directly, at the median, on one connection."""
        pairs = zip(self.rounds[True, 1, target], self.rounds[True, 1, DIRECT], strict=True)
        return 1000 * median(percentile(a.first_bytes, 0.5) - percentile(b.first_bytes, 0.5) for a, b in pairs)

    def cpu(self, target: str, *, stream: bool = False) -> float:
        """CPU milliseconds per chat at 16 connections."""
        return median(self.cpu_ms[stream, 16, target])

    def peers(self) -> dict[str, dict[str, float]]:
        """The headline's figures of everything between client and upstream but our own full path."""
        return {
            name: {
                "rps": self.rps(name),
                "added_p50_ms": self.added_ms(name, 0.50),
                "rps_stream": self.rps(name, stream=True),
                "first_byte_added_p50_ms": self.first_byte_added_ms(name),
                "cpu_ms": self.cpu(name),
            }
            for name in self.targets
            if name not in (DIRECT, FULL)
        }


def table(measured: Measured) -> Table:
    out = Table(padding=(0, 0), title=f"Medians over repeats, ms; the context has {measured.context_tokens} tokens")
    for column in ("", "conns", "target"):
        out.add_column(column, no_wrap=True)
    for column in ("req/s", "p50 ms", "added p50", "p95", "p99", "1st byte", "CPU ms"):
        out.add_column(column, justify="right", no_wrap=True)
    for stream in (False, True):
        for connections in CONNECTIONS:
            for target in measured.targets:
                rounds = measured.rounds[stream, connections, target]
                added = [
                    f"{measured.added_ms(target, share, stream=stream, connections=connections):.2f}"
                    for share in (0.50, 0.95, 0.99)
                ]
                first = median(percentile(r.first_bytes, 0.5) for r in rounds) * 1000
                out.add_row(
                    "stream" if stream else "whole",
                    str(connections),
                    target,
                    f"{median_rps(rounds):.0f}",
                    f"{median_ms(rounds, 0.50):.2f}",
                    *(["", "", ""] if target == DIRECT else added),
                    f"{first:.2f}",
                    f"{median(measured.cpu_ms[stream, connections, target]):.2f}",
                    end_section=target == measured.targets[-1],
                )
    return out


def line(measured: Measured, *, overhead_header_ms: float, told: Mapping[str, object]) -> str:
    """The last line: added latency of one connection, not streamed; throughput at the best number of connections.

    Args:
        overhead_header_ms: the gateway's own time, as it tells it itself.
        told: what else there is to say of the run.
    """
    rps, bare = measured.rps(FULL), measured.rps(PASSTHROUGH)
    headline = {
        "added_p50_ms": measured.added_ms(FULL, 0.50),
        "added_p99_ms": measured.added_ms(FULL, 0.99),
        "rps": rps,
        "passthrough_rps": bare,
        "rps_ratio_passthrough": rps / bare,
    }
    details = {
        "peers": measured.peers(),
        "added_p95_ms": measured.added_ms(FULL, 0.95),
        "passthrough_added_p50_ms": measured.added_ms(PASSTHROUGH, 0.50),
        "passthrough_added_p99_ms": measured.added_ms(PASSTHROUGH, 0.99),
        "overhead_header_p50_ms": overhead_header_ms,
        "stream_added_p50_ms": measured.added_ms(FULL, 0.50, stream=True),
        "stream_first_byte_added_p50_ms": measured.first_byte_added_ms(FULL),
        "stream_rps": measured.rps(FULL, stream=True),
        "stream_passthrough_rps": measured.rps(PASSTHROUGH, stream=True),
        "whole_rps_by_connections": {
            target: {str(c): median_rps(measured.rounds[False, c, target]) for c in CONNECTIONS}
            for target in measured.targets
        },
        "cpu_ms": measured.cpu(FULL),
        "passthrough_cpu_ms": measured.cpu(PASSTHROUGH),
        "stream_cpu_ms": measured.cpu(FULL, stream=True),
        "stream_passthrough_cpu_ms": measured.cpu(PASSTHROUGH, stream=True),
        "context_tokens": measured.context_tokens,
    }
    return json_line("gateway", headline, details | told)


def draw(measured: Measured, path: Path) -> None:
    """Replies a second over connections, whole and streamed, and what one connection waits longer than directly."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    whole, streamed, added = figure.subplots(1, 3)
    for axes, stream, title in ((whole, False, "whole replies"), (streamed, True, "streams")):
        for target in measured.targets:
            values = [median_rps(measured.rounds[stream, connections, target]) for connections in CONNECTIONS]
            axes.plot(range(len(CONNECTIONS)), values, "o-", color=COLOURS.get(target), label=target)
        axes.set(xlabel="connections", ylabel="replies a second (log)", title=title, yscale="log")
        axes.set_xticks(range(len(CONNECTIONS)), [str(connections) for connections in CONNECTIONS])
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    _bars(added, measured)
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, measured: Measured) -> None:
    names = [name for name in measured.targets if name != DIRECT][::-1]
    for n, name in enumerate(names):
        for place, value in (
            (n + 0.2, measured.added_ms(name, 0.50)),
            (n - 0.2, measured.first_byte_added_ms(name)),
        ):
            axes.barh(place, value, height=0.36, color=COLOURS.get(name), alpha=1.0 if place > n else 0.5)
            axes.annotate(f" {value:.1f}", (max(value, 0), place), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="ms (log above 1)", title="added at one connection, p50:\nwhole reply, stream's first byte (pale)")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
