"""What feedback and edits have in common: they append to a user's log, race with others for it, and may be sent twice."""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Header
from pydantic import BaseModel

from service.domain.events import Event
from service.domain.fast_weights import FastWeights
from service.errors import Conflict, InvalidFields, StoreUnavailable
from service.serving import Serving

# What arrives at once for one user is applied one after the other; each retry means that another one got through.
ATTEMPTS = 32

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=255, description="Makes a retry harmless; the same key with another body is a 409."
    ),
]
T = TypeVar("T")


def check_length(text: str | None, limit: int, *, param: str) -> None:
    """Refuse a text over a limit in characters.

    Raises:
        InvalidFields: names the field and the limit.
    """
    if text is not None and len(text) > limit:
        raise InvalidFields(f"'{param}' has {len(text)} characters; the limit is {limit}.", param=param)


class LogWrite:
    """One request that may append to a user's log. Its *answer* is JSON that a retry with the same key is answered from."""

    def __init__(
        self, serving: Serving, body: BaseModel, *, tenant: str, user: str, idempotency_key: str | None
    ) -> None:
        self.serving = serving
        self.tenant = tenant
        self.user = user
        self.key = idempotency_key
        sent = orjson.dumps(body.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS)
        self._fingerprint = hashlib.sha256(sent).hexdigest()

    async def through(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of `attempt`, made again as long as the log moves on between its read and its append.

        Raises:
            StoreUnavailable: it always did, or too few replicas of Redis have what was written, or what an earlier try wrote.
        """
        for _ in range(ATTEMPTS):
            try:
                result = await attempt()
                await self.serving.store.users.confirm(tenant=self.tenant, user=self.user)
                return result
            except Conflict as conflict:
                if conflict.code != "log_moved_on":
                    raise
        raise StoreUnavailable("Too much of this user arrives at once: send it again.")

    def answered(self, receipt: bytes | None) -> Any | None:
        """What this very request was answered before, if it was.

        Raises:
            Conflict: another request had the same key.
        """
        if self.key is None or receipt is None:
            return None
        before = orjson.loads(receipt)
        if before["fingerprint"] != self._fingerprint:
            raise Conflict(
                "This Idempotency-Key was used with another body: use a new key for a new request.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return before["answer"]

    async def append(self, event: Event, *, after: FastWeights, answer: Any, optimize_at: float | None) -> Any:
        """Append one event; the answer, which is the earlier one where the same request came first.

        Raises:
            Conflict: `log_moved_on`, or another request had the same key.
            NotFound: the event's interaction has expired.
        """
        receipt = await self.serving.store.users.append(
            event,
            after,
            tenant=self.tenant,
            user=self.user,
            optimize_at=optimize_at,
            idempotency_key=self.key,
            receipt=self._receipt(answer),
            idempotency_seconds=self.serving.settings.idempotency_seconds,
        )
        if receipt is not None:
            return self.answered(receipt)
        return answer

    async def remember(self, answer: Any) -> None:
        """Keep the answer to a request that changed nothing, so that its key can't be used with another body."""
        if self.key is not None:
            await self.serving.store.users.remember(
                tenant=self.tenant,
                user=self.user,
                idempotency_key=self.key,
                receipt=self._receipt(answer),
                seconds=self.serving.settings.idempotency_seconds,
            )

    def _receipt(self, answer: Any) -> bytes:
        return orjson.dumps({"fingerprint": self._fingerprint, "answer": answer})
