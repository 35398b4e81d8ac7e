"""What the turns say: speeds, their ratios within a repeat, and the line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.table import Table

from service.settings import Settings
from tests.benchmarks.consolidation.turns import Prepared, Turn

GB = 1e9
Figure = Callable[[Turn], float]
# A training draws samples anew every so many steps (`trainer.CHECKPOINT_STEPS`, whose module imports torch).
STEPS_PER_DRAW = 5


@dataclass
class Measured:
    """All turns, by arm and number of users; a repeat's turns have the same place in each list."""

    settings: Settings
    users: Sequence[int]
    arms: Sequence[str]
    prepared: dict[str, Prepared] = field(default_factory=dict)
    turns: dict[tuple[str, int], list[Turn]] = field(default_factory=dict)

    def add(self, arm: str, users: int, turn: Turn) -> None:
        self.turns.setdefault((arm, users), []).append(turn)

    def over_sequential(self, users: int, *, cpu: bool = False) -> float:
        """Stacked over one by one in real tokens per second: both run the very same rows."""

        def speed(turn: Turn) -> float:
            return turn.tokens_per_cpu_second if cpu else turn.tokens_per_second

        return self._ratio("sequential", users, speed)

    def over_trl(self, users: int, *, tokens: bool = False) -> float:
        """Stacked over TRL in adapters (or in tokens) per second: the same pairs and steps, but not the same tokens."""
        return self._ratio("trl", users, lambda t: t.tokens_per_second if tokens else 1 / t.adapter_step_seconds)

    def _ratio(self, other: str, users: int, speed: Figure) -> float:
        pairs = zip(self.turns["stacked", users], self.turns[other, users], strict=True)
        return median(speed(ours) / speed(theirs) for ours, theirs in pairs)

    def middle(self, arm: str, users: int, figure: Figure) -> float:
        return median(figure(turn) for turn in self.turns[arm, users])

    def adapters_per_hour(self, arm: str, users: int) -> float:
        """Of training steps alone, as many as the settings say: preparing, judging and publishing come on top."""
        return 3600 / (self.middle(arm, users, lambda t: t.adapter_step_seconds) * self.settings.train_steps)

    def training_seconds(self, arm: str, users: int) -> float:
        """One adapter's whole training at so many users: set up, prepared, its samples drawn, its steps taken."""
        once, steps = self.prepared[arm], self.settings.train_steps
        draws = -(-steps // STEPS_PER_DRAW) if once.draws else 0
        setup = self.middle(arm, users, lambda t: t.setup_seconds / t.users)
        step = self.middle(arm, users, lambda t: t.adapter_step_seconds)
        return setup + once.preparing_seconds + draws * once.drawing_seconds + steps * step

    def peak_gb(self, arm: str, users: int) -> float:
        return max(turn.peak_bytes for turn in self.turns[arm, users]) / GB


def table(measured: Measured) -> Table:
    """All arms at all numbers of users."""
    found = Table(title="Training steps, medians over repeats; x: how many times faster the stack is")
    for name in ("users", "arm", "tok/s", "tok/CPU s", "adapters/h", "GB", "x", "x in CPU s", "x in tok"):
        found.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for users in measured.users:
        for arm in measured.arms:
            figures = (
                f"{measured.middle(arm, users, lambda t: t.tokens_per_second):,.0f}",
                f"{measured.middle(arm, users, lambda t: t.tokens_per_cpu_second):,.0f}",
                f"{measured.adapters_per_hour(arm, users):,.1f}",
                f"{measured.peak_gb(arm, users):.2f}",
            )
            found.add_row(str(users), arm, *figures, *_times(measured, arm, users))
        found.add_section()
    return found


def _times(measured: Measured, arm: str, users: int) -> tuple[str, str, str]:
    if arm == "sequential":
        faster = f"{measured.over_sequential(users):.2f}"
        return faster, f"{measured.over_sequential(users, cpu=True):.2f}", faster
    if arm == "trl":
        return f"{measured.over_trl(users):.2f}", "", f"{measured.over_trl(users, tokens=True):.2f}"
    return "", "", ""


def headline(measured: Measured, *, device: str) -> dict[str, object]:
    """The line's first keys, in their order."""
    most = max(measured.users)
    trl = "trl" in measured.arms
    return {
        "device": device,
        "stacked_over_sequential": {str(u): measured.over_sequential(u) for u in measured.users},
        "stacked_over_trl": {str(u): measured.over_trl(u) for u in measured.users} if trl else {},
        "adapters_per_hour": {str(u): measured.adapters_per_hour("stacked", u) for u in measured.users},
        "peak_gb": measured.peak_gb("stacked", most),
    }


def details(measured: Measured) -> dict[str, object]:
    most = max(measured.users)
    ours = [arm for arm in measured.arms if arm != "trl"]
    found: dict[str, object] = {
        "tokens_per_second": {
            arm: {str(u): measured.middle(arm, u, lambda t: t.tokens_per_second) for u in measured.users}
            for arm in measured.arms
        },
        "stacked_over_sequential_cpu_time": {str(u): measured.over_sequential(u, cpu=True) for u in measured.users},
        "adapters_per_hour_by_arm": {
            arm: {str(u): measured.adapters_per_hour(arm, u) for u in measured.users} for arm in measured.arms
        },
        "peak_gb_by_arm": {arm: measured.peak_gb(arm, most) for arm in measured.arms},
        "preparing_seconds": {arm: measured.prepared[arm].preparing_seconds for arm in ours},
        "drawing_seconds": {arm: measured.prepared[arm].drawing_seconds for arm in ours},
        "whole_training_over_sequential": measured.training_seconds("sequential", most)
        / measured.training_seconds("stacked", most),
        "train_steps": measured.settings.train_steps,
    }
    if "trl" in measured.arms:
        found["stacked_over_trl_tokens"] = {str(u): measured.over_trl(u, tokens=True) for u in measured.users}
    return found
