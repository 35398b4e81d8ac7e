"""Who is let in: rate limits by tenant and user, a number of chats in flight, the length of vLLM's queue.

A chat that is refused has cost little: nothing was read of its user, and what it took out of a bucket was put back.
"""

import logging
import math
import time
from collections.abc import Awaitable, Callable

from fastapi import Request

from service.domain.rate_limits import RateLimits, spelled
from service.engine import Engine
from service.errors import Overloaded, RateLimited, StoreUnavailable
from service.gate import Gate
from service.keys import Keys
from service.metrics import Metrics
from service.settings import Settings
from service.store.keys import rate_limit
from service.store.rate_limits import Bucket, RateLimitStore, Take

log = logging.getLogger(__name__)

# What OpenAI calls what is limited, in headers and errors.
NAMES = {"chats": "requests", "tokens": "tokens", "feedback": "requests"}
NO_LIMITS = RateLimits()
# Redis away is noticed by a chat that waits for it in vain. Those after it don't, for a moment.
UNCHECKED_SECONDS = 1.0


class Admission:
    """Lets requests in or raises why not. One a process; the buckets are shared by all, through Redis."""

    def __init__(
        self, rate_limits: RateLimitStore, engine: Engine, keys: Keys, settings: Settings, metrics: Metrics
    ) -> None:
        self._rate_limits = rate_limits
        self._engine = engine
        self._metrics = metrics
        self._most_waiting = settings.vllm_most_waiting
        self._default = _or_none(RateLimits(**{name: getattr(settings, name) for name in RateLimits.model_fields}))
        self._tenants = {tenant: _or_none(self._default.overridden(limits)) for tenant, limits in keys.limits.items()}
        self._unchecked_until = 0.0
        self.gate = Gate(
            places=settings.chats_at_once, line=settings.chats_waiting, wait_seconds=settings.chat_wait_seconds
        )
        metrics.chats_in_flight.set_function(lambda: self.gate.in_flight)
        metrics.chats_waiting.set_function(lambda: self.gate.waiting)

    async def chat(
        self, request: Request, *, tenant: str, user: str | None, tokens: Callable[[], Awaitable[int]]
    ) -> None:
        """Let a chat in; its place is given up when the reply's last byte has left, or its client.

        Args:
            tokens: counts the prompt and the longest reply; asked where a limit needs it.

        Raises:
            RateLimited: the tenant or the user is over a limit, or the request is larger than one.
            Overloaded: too many chats are in flight, or in vLLM's queue.
        """
        if self._most_waiting and (self._engine.waiting() or 0) > self._most_waiting:
            self._refuse("engine-queue", Overloaded(f"More than {self._most_waiting} requests wait for the model."))
        try:
            await self.gate.enter(tenant=tenant, user=user or "")
        except Overloaded:
            self._metrics.refused.labels("gate").inc()
            raise
        request.state["ended"].append(self.gate.leave)
        limits = self._tenants.get(tenant, self._default)
        if limits is not NO_LIMITS:
            takes = self._takes(limits, "chats", 1, tenant=tenant, user=user)
            if limits.most("tokens", of="tenant") or limits.most("tokens", of="user"):
                takes |= self._takes(limits, "tokens", await tokens(), tenant=tenant, user=user)
            await self._check(request, takes)

    async def feedback(self, request: Request, *, tenant: str, user: str) -> None:
        """Let a feedback in.

        Raises:
            RateLimited: the tenant or the user has given too much of late.
        """
        limits = self._tenants.get(tenant, self._default)
        await self._check(request, self._takes(limits, "feedback", 1, tenant=tenant, user=user))

    def _takes(
        self, limits: RateLimits, what: str, cost: int, *, tenant: str, user: str | None
    ) -> dict[tuple[str, str], Take]:
        """By whose it is and of what: what this request takes of each limit that is on."""
        takes: dict[tuple[str, str], Take] = {}
        for whose in ("tenant",) if user is None else ("tenant", "user"):
            if limit := limits.most(what, of=whose):
                key = rate_limit(what, tenant=tenant, user=user if whose == "user" else None)
                takes[whose, what] = Take(key, per_minute=limit, cost=cost)
        return takes

    async def _check(self, request: Request, takes: dict[tuple[str, str], Take]) -> None:
        if not takes:
            return
        for (whose, what), take in takes.items():
            if take.cost > take.per_minute:
                message = (
                    f"This request may take {take.cost} {what}; its {whose} has {take.per_minute} a minute: shorten it."
                )
                self._refuse(f"{whose}-{what}", RateLimited(message, kind=NAMES[what], retry_after_seconds=None))
        buckets = await self._take(list(takes.values()))
        if buckets is None:
            self._metrics.limits_unchecked.inc()
            request.state.headers["x-fastslow-limits"] = "unchecked"
            return
        found = dict(zip(takes, buckets, strict=True))
        request.state.headers.update(rate_limit_headers(found))
        refused = {name: bucket for name, bucket in found.items() if bucket.refused}
        if refused:
            (whose, what), bucket = max(refused.items(), key=lambda one: one[1].room_after_seconds)
            wait = bucket.room_after_seconds
            message = (
                f"Rate limit reached: this {whose} has {bucket.limit} {what} a minute, and {bucket.remaining} are left. "
                f"Try again in {spelled(wait)}."
            )
            again = max(1, math.ceil(wait))
            self._refuse(f"{whose}-{what}", RateLimited(message, kind=NAMES[what], retry_after_seconds=again))

    async def _take(self, takes: list[Take]) -> list[Bucket] | None:
        """None where Redis is away: then nobody is refused."""
        if time.monotonic() < self._unchecked_until:
            return None
        try:
            return await self._rate_limits.take(takes)
        except StoreUnavailable as error:
            log.warning("rate limits are not checked: %s", error)
            self._unchecked_until = time.monotonic() + UNCHECKED_SECONDS
            return None

    def _refuse(self, reason: str, error: RateLimited | Overloaded) -> None:
        self._metrics.refused.labels(reason).inc()
        raise error


def _or_none(limits: RateLimits) -> RateLimits:
    return NO_LIMITS if limits == NO_LIMITS else limits


def rate_limit_headers(buckets: dict[tuple[str, str], Bucket]) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*`, of requests and of tokens: of the tenant's and the user's bucket the one with less left."""
    headers: dict[str, str] = {}
    for name in dict.fromkeys(NAMES[what] for _, what in buckets):
        bucket = min((b for (_, what), b in buckets.items() if NAMES[what] == name), key=lambda b: b.remaining)
        headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
        headers[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining)
        headers[f"x-ratelimit-reset-{name}"] = spelled(bucket.full_after_seconds)
    return headers
