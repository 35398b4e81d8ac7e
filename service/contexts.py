"""Chooses the context of one chat: draws the population's member, keeps the budget, recalls exemplars for the prompt."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from service.domain.context import Context, Ranked, instructions, left_out, ranked, turns
from service.domain.events import Member
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Message, last_user_text
from service.domain.items import Exemplar, Prior
from service.domain.population import draw, leading
from service.recall import Recall
from service.settings import Settings
from service.tokens import Tokens

# Of the users whose chats come again before these many others'. A quarter of a megabyte each of those with a full history, their fast
# weights counted, which stay in memory as long as this does.
CACHED_CHOICES = 1024


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


@dataclass(frozen=True)
class Choice:
    """A context, and what a chat gets of it."""

    context: Context
    instructions: str
    turns: tuple[dict[str, Any], ...]
    """Messages as vLLM takes them."""
    items: tuple[str, ...]
    """Ids of the context's items."""


NO_CONTEXT = Choice(Context(), "", (), ())


@dataclass(frozen=True)
class _Standing:
    """What was chosen last, and for what."""

    wanted: Wanted
    member: Member | None
    budget: int
    ranked: Ranked
    choice: Choice
    """With nothing recalled."""
    by_age: Sequence[Exemplar]
    """What recall compares with the prompt; empty where it has nothing to add."""

    def serves(self, wanted: Wanted, member: Member | None, budget: int) -> bool:
        """The very same fast weights, not their like: to compare those would take as long as to choose."""
        return (
            self.wanted.state is wanted.state
            and self.member is member
            and self.budget == budget
            and self.wanted.adapter == wanted.adapter
            and self.wanted.absorbed == wanted.absorbed
            and self.wanted.priors == wanted.priors
        )


class Contexts:
    """Contexts under the settings' budget.

    Args:
        recall: finds the exemplars nearest to a prompt, where it can.
    """

    def __init__(self, tokens: Tokens, settings: Settings, recall: Recall) -> None:
        self._tokens = tokens
        self._budget_tokens = settings.most_context_tokens
        self._last: OrderedDict[tuple[str, str], _Standing] = OrderedDict()
        self.recall = recall

    def standing(self, wanted: Wanted) -> Context:
        """What a chat is served with that leaves room for all of it: by the best member, with nothing recalled."""
        return self._ranked(wanted, leading(wanted.state, adapter=wanted.adapter), self._budget_tokens).context()

    async def for_chat(self, wanted: Wanted, messages: Sequence[Message], *, room: int, seed: int | None) -> Choice:
        """The context of one chat.

        Args:
            room: tokens that the conversation and its reply leave.
            seed: the request's own; the same request with the same fast weights gets the same context.
        """
        member = draw(wanted.state, adapter=wanted.adapter, seed=lambda: request_seed(wanted, messages, seed))
        budget = min(self._budget_tokens, room)
        found = self._without_recall(wanted, member, budget)
        if not found.by_age:
            return found.choice
        similarity = await self.recall.similarities(
            last_user_text(messages), found.by_age, tenant=wanted.tenant, user=wanted.user
        )
        return chosen(found.ranked.context(similarity)) if similarity else found.choice

    def _without_recall(self, wanted: Wanted, member: Member | None, budget: int) -> _Standing:
        """As it was chosen for the user's last chat, where nothing that it depends on has changed."""
        key = wanted.tenant, wanted.user
        found = self._last.pop(key, None)
        if found is None or not found.serves(wanted, member, budget):
            order = self._ranked(wanted, member, budget)
            context = order.context()
            count, absorbed = self._tokens.count, wanted.absorbed
            out = left_out(wanted.state, context, absorbed=absorbed, budget_tokens=budget, count=count)
            exemplars = by_age(wanted.state.exemplars) if out else []
            found = _Standing(wanted, member, budget, order, chosen(context), exemplars)
        self._last[key] = found
        if len(self._last) > CACHED_CHOICES:
            self._last.popitem(last=False)
        return found

    def _ranked(self, wanted: Wanted, member: Member | None, budget: int) -> Ranked:
        return ranked(
            wanted.state,
            absorbed=wanted.absorbed,
            budget_tokens=budget,
            count=self._tokens.count,
            member=member,
            priors=wanted.priors,
        )


def chosen(context: Context) -> Choice:
    """A context as messages."""
    shown = tuple(message.sent() for message in turns(context))
    return Choice(context, instructions(context), shown, context.items)


def request_seed(wanted: Wanted, messages: Sequence[Message], seed: int | None) -> bytes:
    """What a chat's draw depends on besides the fast weights: how the conversation began, so that its later turns draw alike."""
    first = next((m.content for m in messages if m.role == "user"), None)
    return hashlib.sha256(orjson.dumps([wanted.tenant, wanted.user, seed, first])).digest()


def by_age(exemplars: Mapping[str, Exemplar]) -> list[Exemplar]:
    """Oldest first."""
    return sorted(exemplars.values(), key=lambda x: (x.born, x.id))
