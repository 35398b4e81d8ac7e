"""How much a run does, and under which names."""

from dataclasses import asdict, dataclass
from typing import Any

POINTS = (0, 1, 2, 5, 10, 20)


@dataclass(frozen=True)
class Plan:
    """All that decides which requests a run makes; the same plan makes the same."""

    size: str
    seed: int
    arms: tuple[str, ...]
    users: int
    preferences: tuple[int, ...]
    """Numbers of preferences, which pairs of users have in turn."""
    points: tuple[int, ...]
    """Numbers of feedbacks per user after which is measured."""
    tests: int
    """Test questions, the same for every user and arm."""
    shuffled: int
    """Users of the control, whose feedback is somebody else's."""
    settle_seconds: float
    """Longest wait at each point for the contexts that are being optimized in the background."""
    settle_adapters_seconds: float
    """Likewise after consolidations: every promotion has its user's contexts scored again."""
    # A fifth of the default: what is asked is whether the context's help makes up for most of the drift.
    small_chat_budget_nats: float = 0.02
    """KL budget on chat anchors, nats per token, of the second consolidation that `both-small` is served by."""

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


ARMS = ("base", "last-k", "fast", "oracle")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "users": 4,
        "preferences": (1,),
        "points": (0, 2, 5),
        "tests": 4,
        "shuffled": 2,
        "settle_seconds": 30.0,
        "settle_adapters_seconds": 120.0,
    },
    "small": {
        "users": 12,
        "preferences": (1, 2),
        "points": POINTS,
        "tests": 10,
        "shuffled": 6,
        "settle_seconds": 90.0,
        "settle_adapters_seconds": 900.0,
    },
    "full": {
        "users": 36,
        "preferences": (1, 2, 3),
        "points": POINTS,
        "tests": 20,
        "shuffled": 12,
        "settle_seconds": 900.0,
        "settle_adapters_seconds": 3600.0,
    },
}


def plan(size: str, *, seed: int, arms: tuple[str, ...] = ARMS, **changes: Any) -> Plan:
    """The plan of a size, with what is changed about it."""
    return Plan(size=size, seed=seed, arms=arms, **(SIZES[size] | changes))
