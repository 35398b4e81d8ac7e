"""Vectors of a user's exemplars where not all of them fit into the context: what recall compares a chat's prompt with."""

from collections.abc import Sequence

from service.contexts import by_age
from service.domain.context import Count, left_out, ranked
from service.domain.events import Member
from service.domain.fast_weights import FastWeights
from service.embedding import Embedder
from service.store.embeddings import EmbeddingStore


def wants_recall(
    state: FastWeights, *, adapter: str, absorbed: frozenset[str], budget_tokens: int, count: Count
) -> bool:
    """Whether any member leaves some exemplars out, in a chat that leaves room for all of the context."""

    def leaves_out(member: Member | None) -> bool:
        order = ranked(state, absorbed=absorbed, budget_tokens=budget_tokens, count=count, member=member)
        return bool(left_out(state, order.context(), absorbed=absorbed, budget_tokens=budget_tokens, count=count))

    members: Sequence[Member | None] = state.population_under(adapter).members or (None,)
    return any(map(leaves_out, members))


async def embed_exemplars(
    state: FastWeights, *, store: EmbeddingStore, embedder: Embedder, tenant: str, user: str
) -> None:
    """Store a vector of each exemplar's prompt, and drop those of exemplars that are gone.

    Raises:
        EmbedderUnavailable: the model failed.
        StoreUnavailable: Redis is away.
    """
    exemplars = by_age(state.exemplars)
    ids = [e.id for e in exemplars]
    await store.keep(ids, tenant=tenant, user=user, model=embedder.name)
    stored = await store.get(ids, tenant=tenant, user=user, model=embedder.name)
    missing = [e for e in exemplars if e.id not in stored]
    rows = embedder.embed([e.prompt for e in missing])
    made = {e.id: row for e, row in zip(missing, rows, strict=True)}
    await store.put(made, tenant=tenant, user=user, model=embedder.name)
