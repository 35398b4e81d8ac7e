"""Scopes, adapter versions and the reports of how they were trained.

An adapter version is immutable and named by its scope, its number and its content, so a name is never written twice. The version in
use is a pointer; a version's `parent` is what the pointer showed when it was trained, which is where a rollback goes.
"""

import hashlib
import re
from typing import Literal, Self

from pydantic import Field

from service.domain.feedback import BASE, Frozen
from service.domain.measures import Ability, Difference, FrontierPoint, Generated, Handed, Price
from service.errors import InvalidRequest

NAME = re.compile(r"fs-[0-9a-f]{12}-[0-9]{4,}-[0-9a-f]{12}")
"""Every adapter version's name matches this in full; anything else is refused before it reaches a file system or vLLM."""

ScopeKind = Literal["user", "cohort", "global"]


class Scope(Frozen):
    """Whom an adapter serves, inside one tenant."""

    kind: ScopeKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """`user:<id>`, `cohort:<name>` or `global`.

        Raises:
            InvalidRequest: anything else.
        """
        if text == "global":
            return cls(kind="global")
        kind, _, name = text.partition(":")
        if kind == "user" and name:
            return cls(kind="user", name=name)
        if kind == "cohort" and name:
            return cls(kind="cohort", name=name)
        raise InvalidRequest(
            f"'{text[:80]}' is not a scope: give user:<id>, cohort:<name> or global.",
            param="scope",
            code="invalid_scope",
        )

    def __str__(self) -> str:
        return self.kind if self.kind == "global" else f"{self.kind}:{self.name}"

    def digest(self, tenant: str) -> str:
        """12 hex digits that stand for this scope of this tenant in an adapter's name."""
        return hashlib.sha256(f"{tenant}\0{self}".encode()).hexdigest()[:12]


def version_name(scope: Scope, *, tenant: str, number: int, content_sha256: str) -> str:
    """The immutable name of a version: scope, number, content."""
    return f"fs-{scope.digest(tenant)}-{number:04d}-{content_sha256[:12]}"


class Divergence(Frozen):
    """Forward KL(base || adapter) in nats per token over a set of judge anchors, exact over the vocabulary."""

    mean_nats: float
    upper95_nats: float
    """Mean plus its one-sided 95 % bound over anchors."""
    worst_nats: float
    """The worst single anchor."""
    anchors: int
    tokens: int
    budget_nats: float
    base_loss_nats: float | None = None
    """Mean loss of the base on the anchors' completions, which it sampled itself, nats per token."""
    loss_nats: float | None = None
    """The adapter's. The rise is what the KL is the expectation of."""

    @property
    def within(self) -> bool:
        """Under budget as a bound, and no anchor over ten times it (facts: the gate of the KL budget)."""
        return self.upper95_nats <= self.budget_nats and self.worst_nats <= 10 * self.budget_nats


class Margins(Frozen):
    """Mean held-out margins in nats per token, by what serves; the higher the better.

    Of a pair: mean log p(wanted) - mean log p(unwanted). Of a rating r: r * mean log p(reply).
    """

    base: float
    current: float
    """The version in use (equal to base where there is none)."""
    candidate: float
    base_with_context: float | None = None
    """With the whole context: with the three others of this kind it is the 2x2 of weights and context."""
    candidate_with_context: float | None = None
    pooled: float | None = None
    """The cohort's or the tenant's version that serves a user without one of their own."""
    serving: float | None = None
    """What serves now: the version in use, else the pooled one, else the base, with the context that it is served with."""
    would_serve: float | None = None
    """The candidate with the context that is left when what it absorbed is out."""
    against_base: Difference | None = None
    """The candidate less the base, without a context, example by example."""
    against_current: Difference | None = None
    """None where no version is in use."""
    against_pooled: Difference | None = None
    """None where none would serve instead."""
    against_serving: Difference | None = None
    """What would serve less what serves now, each with its context."""


class TrainReport(Frozen):
    """What a consolidation did and measured; the gate decides on it alone."""

    train_examples: int
    heldout_examples: int
    steps: int
    first_loss: float
    last_loss: float
    scale: float = Field(ge=0.0, le=1.0)
    """What the trained LoRA was multiplied by to fit the budget; 0 if nothing else did."""
    kl_text: Divergence
    kl_chat: Divergence
    margins: Margins
    absorbed: tuple[str, ...] = ()
    """Ids of context items whose absence costs nothing under the candidate."""
    handed: tuple[Handed, ...] = ()
    """What leaving out each item cost: the decision behind `absorbed`."""
    context_tokens_before: int = 0
    context_tokens_after: int = 0
    frontier: tuple[FrontierPoint, ...] = ()
    """Satisfaction against KL at quarters of the largest scale that fits the budgets."""
    price: Price | None = None
    ability: Ability | None = None
    generated: Generated | None = None
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know, for people."""
    seconds: float
    stage_seconds: dict[str, float] = {}
    peak_memory_bytes: int = 0
    device: str


class AdapterVersion(Frozen):
    """One trained LoRA. Also the provenance file beside its weights."""

    name: str
    tenant: str
    scope: str
    number: int
    parent: str = BASE
    """The version in use when this one was trained."""
    base_model: str
    """The served base model's name."""
    base_sha256: str
    """Hash of the base model's weights."""
    content_sha256: str
    """Hash of this adapter's weights file."""
    created: float
    job: str
    watermark: dict[str, int]
    """User id -> revision of the log up to which this version has consolidated feedback."""
    report: TrainReport
    hyperparameters: dict[str, float | int | str] = {}


class Promote(Frozen):
    """The candidate may be served."""

    decision: Literal["promote"] = "promote"


class Reject(Frozen):
    """The candidate is not served; every reason, for people."""

    decision: Literal["reject"] = "reject"
    reasons: tuple[str, ...]
