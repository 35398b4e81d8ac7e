"""Chooses the context of one chat: draws the population's member, keeps the budget, recalls exemplars for the prompt."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from service.domain.context import Context, choose, left_out
from service.domain.events import Member
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Message, last_user_text
from service.domain.items import Exemplar, Prior
from service.domain.population import draw, leading
from service.recall import Recall
from service.settings import Settings
from service.tokens import Tokens


@dataclass(frozen=True)
class Wanted:
    """For whom and for what a context is chosen."""

    tenant: str
    user: str
    state: FastWeights
    adapter: str
    """The version in use, or `base`."""
    absorbed: frozenset[str]
    """What it makes unnecessary."""
    priors: Sequence[Prior] = ()


class Contexts:
    """Contexts under the settings' budget.

    Args:
        recall: finds the exemplars nearest to a prompt, where it can.
    """

    def __init__(self, tokens: Tokens, settings: Settings, recall: Recall) -> None:
        self._tokens = tokens
        self._budget_tokens = settings.most_context_tokens
        self.recall = recall

    def standing(self, wanted: Wanted) -> Context:
        """What a chat is served with that leaves room for all of it: by the best member, with nothing recalled."""
        return self._choose(wanted, leading(wanted.state, adapter=wanted.adapter), self._budget_tokens)

    async def for_chat(self, wanted: Wanted, messages: Sequence[Message], *, room: int, seed: int | None) -> Context:
        """The context of one chat.

        Args:
            room: tokens that the conversation and its reply leave.
            seed: the request's own; the same request with the same fast weights gets the same context.
        """
        member = draw(wanted.state, adapter=wanted.adapter, seed=request_seed(wanted, messages, seed))
        budget = min(self._budget_tokens, room)
        context = self._choose(wanted, member, budget)
        if not self._left_out(wanted, context, budget):
            return context
        similarity = await self.recall.similarities(
            last_user_text(messages), by_age(wanted.state.exemplars), tenant=wanted.tenant, user=wanted.user
        )
        return self._choose(wanted, member, budget, similarity) if similarity else context

    def prepare_recall(self, wanted: Wanted) -> None:
        """Begin to embed the exemplars of a user for whom not all of them fit; nobody waits for it."""
        if self._left_out(wanted, self.standing(wanted), self._budget_tokens):
            self.recall.remember(by_age(wanted.state.exemplars), tenant=wanted.tenant, user=wanted.user)

    def _left_out(self, wanted: Wanted, context: Context, budget: int) -> list[Exemplar]:
        count = self._tokens.count
        return left_out(wanted.state, context, absorbed=wanted.absorbed, budget_tokens=budget, count=count)

    def _choose(
        self, wanted: Wanted, member: Member | None, budget: int, similarity: dict[str, float] | None = None
    ) -> Context:
        return choose(
            wanted.state,
            absorbed=wanted.absorbed,
            budget_tokens=budget,
            count=self._tokens.count,
            member=member,
            similarity=similarity,
            priors=wanted.priors,
        )


def request_seed(wanted: Wanted, messages: Sequence[Message], seed: int | None) -> bytes:
    """What a chat's draw depends on besides the fast weights: how the conversation began, so that its later turns draw alike."""
    first = next((m.content for m in messages if m.role == "user"), None)
    return hashlib.sha256(orjson.dumps([wanted.tenant, wanted.user, seed, first])).digest()


def by_age(exemplars: Mapping[str, Exemplar]) -> list[Exemplar]:
    """Oldest first."""
    return sorted(exemplars.values(), key=lambda x: (x.born, x.id))
