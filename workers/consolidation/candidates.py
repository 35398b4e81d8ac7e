"""What a candidate is measured with: where its adapter and those beside it lie, its held-out feedback, its user's context."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.domain.fast_weights import FastWeights
from workers.consolidation.anchors import Kind
from workers.consolidation.prepare import Prepared

Adherence = Callable[[str, str], float]
"""(prompt, reply) -> share of a scope's norms that the reply holds, in [0, 1]."""
Style = Callable[[str, str], float]
"""(prompt, reply) -> how near the reply is to what the user wants, by what a program sees of a text, in [0, 1]."""


@dataclass(frozen=True)
class OwnContext:
    """The context of the one user whom a user's scope serves; scopes of many users have none that could be handed over."""

    state: FastWeights
    absorbed: frozenset[str]
    """Items that the version in use has made unnecessary, so that they are not rendered now."""
    budget_tokens: int


@dataclass(frozen=True)
class Candidate:
    """One scope's trained adapter, about to be measured.

    Slots are those of a second stack, which holds what was loaded from folders; None stands for the base.
    """

    trained: int
    """Its slot in the stack that was trained."""
    slot: int
    """Where its exports are loaded for measuring."""
    folder: Path
    """Holds its last export."""
    budgets: dict[Kind, float]
    """Nats per token."""
    heldout: list[Prepared]
    current: int | None = None
    """The version in use."""
    pooled: int | None = None
    """What would serve without a version of its own; None also for scopes of many users."""
    context: OwnContext | None = None
    adherence: Adherence | None = None
    """Of the norms attached to the scope."""
    style: Style | None = None
    """Of the user whom the scope serves."""

    @property
    def serving(self) -> int | None:
        """The slot of what serves now."""
        return self.pooled if self.current is None else self.current
