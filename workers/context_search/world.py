"""What a search asks of the world, as it is: vLLM scores and generates, the embedder compares, the reflection endpoint proposes."""

import hashlib
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from service.domain.affinity import affinity_of
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Message
from service.domain.items import Guideline
from service.embedding import Embedder
from service.engine import BACKGROUND_PRIORITY, MAX_SCORED_REPLIES, Candidates, Engine
from service.errors import EmbedderUnavailable
from service.settings import Settings
from service.store import Store
from service.tokens import Tokens
from workers.context_search import duplicates
from workers.context_search.candidates import Pool
from workers.context_search.duplicates import Duplicates
from workers.context_search.embedded import embed_exemplars
from workers.context_search.judge import Asked
from workers.context_search.reflection import Reflection, ask
from workers.context_search.run import Optimizing
from workers.context_search.search import Means

log = logging.getLogger(__name__)

T = TypeVar("T")


class OnVllm:
    """The scorer and the generator of one user's search.

    Args:
        cache_salt: keeps the user's texts apart from others' in the prefix cache.
        affinity: of the user, whose replica has the user's adapter.
        neutralize: takes control tokens out of a reply.
    """

    def __init__(
        self, engine: Engine, *, cache_salt: str, neutralize: Callable[[str], str], affinity: str = ""
    ) -> None:
        self._engine = engine
        self._affinity = affinity
        self._salt = cache_salt
        self._neutralize = neutralize

    async def score(self, model: str, items: Sequence[Asked]) -> list[list[float]]:
        # The route takes replies of one kind to a conversation: those that ended, or those that were cut off.
        asked = [
            (n, places, self._candidates(messages, [replies[place] for place in places]))
            for n, (messages, replies) in enumerate(items)
            for ended in (True, False)
            if (places := [place for place, reply in enumerate(replies) if reply[1] is ended])
        ]
        found = [[0.0] * len(replies) for _, replies in items]
        for part in _within(asked, MAX_SCORED_REPLIES):
            scores = await self._engine.score(
                [candidates for _, _, candidates in part],
                model=model,
                cache_salt=self._salt,
                request_id=f"optimize-{uuid.uuid4().hex}",
                affinity=self._affinity,
            )
            for (n, places, _), scored in zip(part, scores, strict=True):
                for place, score in zip(places, scored, strict=True):
                    found[n][place] = score.mean
        return found

    def _candidates(self, messages: Sequence[Message], replies: Sequence[tuple[str, bool]]) -> Candidates:
        return Candidates(messages, [self._neutralize(text) for text, _ in replies], ended=replies[0][1])

    async def reply(self, model: str, messages: Sequence[Message], *, max_tokens: int) -> str:
        body = {
            "model": model,
            "messages": [message.sent() for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            "cache_salt": self._salt,
            "priority": BACKGROUND_PRIORITY,
        }
        completion = await self._engine.complete(
            body, request_id=f"optimize-{uuid.uuid4().hex}", affinity=self._affinity
        )
        return completion["choices"][0]["message"]["content"] or ""


def optimizing(
    store: Store, engine: Engine, *, tokens: Tokens, embedder: Callable[[], Embedder | None], settings: Settings
) -> Optimizing:
    """Optimizing over these.

    Args:
        embedder: loads the embedding model when it is first needed; None where there is none.
    """

    async def without(what: str) -> None:
        await store.counts.add("optimize_without", what)

    async def find_duplicates(guidelines: Sequence[Guideline]) -> Duplicates:
        if len(guidelines) < 2:
            return Duplicates()
        model = embedder()
        if model is None:
            await without("embedder")
            return Duplicates()
        try:
            return duplicates.find(guidelines, model)
        except EmbedderUnavailable as error:
            log.warning("near-duplicate guidelines stay apart: %s", error)
            await without("embedder")
            return Duplicates()

    async def embed(tenant: str, user: str, state: FastWeights) -> None:
        if not settings.recall:
            return
        model = embedder()
        if model is None:
            await without("recall")
            return
        try:
            await embed_exemplars(state, store=store.embeddings, embedder=model, tenant=tenant, user=user)
        except EmbedderUnavailable as error:
            log.warning("the exemplars of %s can't be recalled: %s", user, error)
            await without("recall")

    def reflection(pool: Pool) -> Reflection | None:
        if not settings.reflection_url:
            return None
        return Reflection(
            pool,
            ask=lambda prompt: ask(prompt, settings=settings),
            failed=lambda: without("reflection"),
            neutralize=tokens.neutralize,
        )

    def means(tenant: str, user: str, cancelled: Callable[[], bool]) -> Means:
        on_vllm = OnVllm(
            engine,
            cache_salt=_salt(tenant, user),
            neutralize=tokens.neutralize,
            affinity=affinity_of(tenant=tenant, user=user),
        )
        return Means(
            scorer=on_vllm,
            generator=on_vllm,
            find_duplicates=find_duplicates,
            reflection=reflection,
            metric_calls=settings.optimize_metric_calls,
            cancelled=cancelled,
        )

    return Optimizing(store=store, settings=settings, count=tokens.count, means=means, embed=embed)


def _within(asked: Sequence[T], most_replies: int) -> Iterator[Sequence[T]]:
    """In parts for one request each: an item has two replies at most."""
    size = most_replies // 2
    return (asked[start : start + size] for start in range(0, len(asked), size))


def _salt(tenant: str, user: str) -> str:
    """Not the one that the user's chats have, which only the gateway can compute: nothing that is scored is seen in a chat's timing."""
    return hashlib.sha256(f"optimize\0{tenant}\0{user}".encode()).hexdigest()
