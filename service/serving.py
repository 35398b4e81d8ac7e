"""From a chat request to the request that vLLM gets: the user's context, the adapter in use, a whitelist of fields.

Degrade, never lie: without Redis the base serves unpersonalized, without its adapter the base serves with the context, and every
such step is named in the plan, in the reply's headers and in the metrics.
"""

import hmac
import logging
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from service.contexts import NO_CONTEXT, Choice, Contexts, Wanted
from service.domain.absorption import absorbed
from service.domain.affinity import affinity_of
from service.domain.context import Context, opening
from service.domain.fast_weights import FastWeights
from service.domain.feedback import BASE, Interaction, Message, VersionTuple, last_user_text
from service.domain.items import Prior
from service.domain.policy import optimize_at
from service.engine import Engine
from service.errors import NotFound, StoreUnavailable
from service.keys import Keys
from service.metrics import Metrics
from service.norm_checks import NormChecks
from service.priors import Priors
from service.recording import Recording
from service.settings import Settings
from service.store import Store
from service.store.keys import CACHED_NAMES
from service.store.users import ChatState
from service.tokens import Tokens
from service.tracing import span
from service.window import room

log = logging.getLogger(__name__)

NO_USER = "no-user"
NO_STORE = "store-unavailable"
NO_ADAPTER = "adapter-unavailable"
NO_ROOM = "context-too-long"


@dataclass(frozen=True)
class Personalization:
    """What of the user a chat is served with, by the request's own wish."""

    context: bool = True
    adapter: bool = True
    dry_run: bool = False


EVERYTHING = Personalization()


@dataclass
class Plan:
    """One chat as it will be served."""

    id: str
    """The completion's id, and the interaction's."""
    tenant: str
    user: str | None
    messages: list[Message]
    """The conversation without the context."""
    choice: Choice
    """The context."""
    version: VersionTuple
    max_tokens: int
    cohort: str | None = None
    degraded: list[str] = field(default_factory=list)

    @property
    def context(self) -> Context:
        return self.choice.context

    @property
    def served_model(self) -> str:
        """What vLLM is asked for: the adapter version, or the base model."""
        return self.version.model if self.version.adapter == BASE else self.version.adapter

    @property
    def channel(self) -> str:
        """What personalizes it: `adapter`, `context`, `adapter+context`, or `base` where nothing does."""
        parts = ["adapter"] * (self.version.adapter != BASE) + ["context"] * (self.context.tokens > 0)
        return "+".join(parts) or BASE

    @property
    def affinity(self) -> str:
        """What keeps the user's requests on one replica."""
        return affinity_of(tenant=self.tenant, user=self.user) if self.user is not None else ""


class Serving:
    """Plans chats, remembers which adapters failed, records interactions."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        tokens: Tokens,
        keys: Keys,
        settings: Settings,
        metrics: Metrics,
        contexts: Contexts,
    ) -> None:
        self.store = store
        self.engine = engine
        self.tokens = tokens
        self.contexts = contexts
        self.settings = settings
        self.metrics = metrics
        self._salt_key = keys.cache_salt_secret.encode()
        self._cache_salt = lru_cache(CACHED_NAMES)(self._salt)
        self._failed: dict[str, float] = {}
        self.recording = Recording(store, settings)
        self.norm_checks = NormChecks(store.norms, settings, metrics)
        self.priors = Priors(store.cold_start, seconds=settings.cold_start_cache_seconds)

    async def plan(
        self,
        conversation: list[Message],
        *,
        interaction_id: str,
        tenant: str,
        user: str | None,
        max_tokens: int | None,
        seed: int | None = None,
        tools: str = "",
        wish: Personalization = EVERYTHING,
        without_adapter: bool = False,
        without_context: bool = False,
    ) -> Plan:
        """Choose the context and the adapter for a conversation.

        Args:
            tools: what the chat template renders beside the messages.
            without_adapter: vLLM has refused the one in use.
            without_context: to vLLM it was too long with it.

        Raises:
            ContextLengthExceeded: the conversation alone fills the window.
        """
        messages = [self.tokens.neutralized(message) for message in conversation]
        degraded: list[str] = []
        state = await self._state(tenant=tenant, user=user, degraded=degraded)
        in_use = None if without_adapter else await self.adapter_in_use(state, tenant=tenant, user=user or "")
        if not wish.adapter:
            in_use = BASE, frozenset()
        if in_use is None:
            self._degrade(degraded, NO_ADAPTER)
        adapter, unneeded = in_use or (BASE, frozenset[str]())
        left, reply_tokens = await room(
            messages, tools=tools, max_tokens=max_tokens, tokens=self.tokens, settings=self.settings
        )
        choice = NO_CONTEXT
        if without_context:
            self._degrade(degraded, NO_ROOM)
        elif user is not None and wish.context:
            priors = await self._priors(state, tenant=tenant, degraded=degraded)
            wanted = Wanted(tenant, user, state.fast_weights, adapter, unneeded, priors)
            with span("choose context"):
                choice = await self.contexts.for_chat(wanted, messages, room=left, seed=seed)
        return Plan(
            id=interaction_id,
            tenant=tenant,
            user=user,
            messages=messages,
            choice=choice,
            version=VersionTuple(
                model=self.settings.model_name,
                adapter=adapter,
                context_revision=state.fast_weights.revision,
                member=choice.context.member,
            ),
            max_tokens=max_tokens or reply_tokens,
            cohort=state.cohort,
            degraded=degraded,
        )

    def upstream_body(self, plan: Plan, sampling: dict[str, Any]) -> dict[str, Any]:
        """The request to vLLM. Nothing of the client's gets into it but `sampling`, which the whitelist picked."""
        return {
            "model": plan.served_model,
            "messages": rendered(plan),
            "max_tokens": plan.max_tokens,
            "cache_salt": self.cache_salt(plan.tenant, plan.user),
            **sampling,
        }

    def optimize_at(self, after: FastWeights, *, now: float, edited: bool = False) -> float | None:
        """When the user's contexts should be optimized, None if there is no need."""
        if not self.settings.optimize:
            return None
        return optimize_at(
            after,
            now=now,
            feedbacks=self.settings.optimize_feedbacks,
            seconds=self.settings.optimize_silence_seconds,
            edited=edited,
        )

    def cache_salt(self, tenant: str, user: str | None) -> str:
        """Keeps users apart in vLLM's prefix cache: an HMAC, so that nobody can compute another's."""
        return self._cache_salt(tenant, user)

    def _salt(self, tenant: str, user: str | None) -> str:
        return hmac.digest(self._salt_key, f"{tenant}\0{user or ''}".encode(), "sha256").hex()

    def adapter_failed(self, adapter: str, error: Exception) -> None:
        """vLLM could not serve an adapter: the base does for a while."""
        log.error("vLLM can't serve adapter %s, the base serves instead: %s", adapter, error)
        self.metrics.adapter_failures.inc()
        now = time.monotonic()
        self._failed = {name: until for name, until in self._failed.items() if until > now}
        self._failed[adapter] = now + self.settings.failed_adapter_seconds

    def _degrade(self, degraded: list[str], reason: str) -> None:
        self.metrics.degraded.labels(reason).inc()
        degraded.append(reason)

    async def record(self, plan: Plan, reply: str, finish_reason: str | None) -> None:
        """Store the interaction so that it can be given feedback; where that was not done, or in brief, the plan is degraded by it."""
        if plan.user is None:
            return
        interaction = Interaction(
            id=plan.id,
            tenant=plan.tenant,
            user=plan.user,
            created=time.time(),
            messages=tuple(plan.messages),
            reply=reply,
            finish_reason=finish_reason,
            version=plan.version,
            items=plan.choice.items,
        )
        if reason := await self.recording.keep(interaction):
            self._degrade(plan.degraded, reason)

    def sent(self, plan: Plan, reply: str) -> None:
        """What waits until the client has the reply: to hold it against the norms of the user's scopes."""
        if plan.user is not None:
            self.norm_checks.begin(
                reply,
                reply_id=plan.id,
                prompt=lambda: last_user_text(plan.messages),
                tenant=plan.tenant,
                user=plan.user,
                cohort=plan.cohort,
            )

    async def _state(self, *, tenant: str, user: str | None, degraded: list[str]) -> ChatState:
        if user is None:
            self._degrade(degraded, NO_USER)
            return ChatState(FastWeights(), None, ())
        try:
            with span("read state"):
                return await self.store.users.chat_state(tenant=tenant, user=user)
        except StoreUnavailable as error:
            log.warning("a chat is served unpersonalized: %s", error)
            self._degrade(degraded, NO_STORE)
            return ChatState(FastWeights(), None, ())

    async def _priors(self, state: ChatState, *, tenant: str, degraded: list[str]) -> tuple[Prior, ...]:
        # Without the user's own fast weights nobody knows what of them the user has removed.
        if NO_STORE in degraded:
            return ()
        try:
            return await self.priors.of(tenant=tenant, cohort=state.cohort)
        except StoreUnavailable as error:
            log.warning("a chat is served without what others of its cohort like: %s", error)
            self._degrade(degraded, NO_STORE)
            return ()

    async def adapter_in_use(self, state: ChatState, *, tenant: str, user: str) -> tuple[str, frozenset[str]] | None:
        """The version that serves a user and what it makes unnecessary, the base where there is none; None where it can't be served."""
        if not state.adapters:
            return BASE, frozenset()
        scope, name = state.adapters[0]
        if self._failed.get(name, 0.0) > time.monotonic():
            return None
        try:
            version = await self.store.scopes.version(name, scope, tenant=tenant)
        except (NotFound, StoreUnavailable) as error:
            log.error("adapter %s of %s has no record, the base serves instead: %s", name, scope, error)
            return None
        return name, absorbed(version, state.fast_weights, user=user)


def rendered(plan: Plan) -> list[dict[str, Any]]:
    """The messages as vLLM gets them, context included."""
    system, rest = opening(plan.choice.instructions, plan.messages)
    return [*_sent(system), *plan.choice.turns, *_sent(rest)]


def _sent(messages: list[Message]) -> list[dict[str, Any]]:
    return [message.sent() for message in messages]
