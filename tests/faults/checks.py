"""What no fault may do, looked for in what clients were told and in what is stored. Pure, so that tests can show that it is found."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.domain.events import Event
from service.domain.feedback import BASE, FeedbackEvent

SECRET = re.compile(r"\bzq[0-9a-f]{12}\b")
"""A word that one user alone has ever said, and that stands in each feedback of that user."""


@dataclass(frozen=True)
class Person:
    """A user of the load."""

    tenant: str
    name: str
    secret: str
    adapter: str = BASE
    """The version that the user's pointer shows."""


@dataclass(frozen=True)
class Acknowledged:
    """A feedback that was answered with 200."""

    person: Person
    interaction: str
    comment: str
    """Said once, by nobody else."""
    revision: int


@dataclass(frozen=True)
class Echo:
    """What the upstream was asked, as its reply tells it."""

    asked: str
    """The last message of the user's."""
    model: str
    secrets: tuple[str, ...]
    """Of all messages."""

    @classmethod
    def of(cls, model: str, messages: Sequence[Mapping[str, object]]) -> "Echo":
        texts = [str(message.get("content") or "") for message in messages]
        asked = next(t for m, t in reversed(list(zip(messages, texts, strict=True))) if m["role"] == "user")
        return cls(asked, model, tuple(sorted(set(SECRET.findall("\n".join(texts))))))

    def written(self) -> str:
        """One line of JSON, which `read` understands."""
        return json.dumps({"asked": self.asked, "model": self.model, "secrets": self.secrets})

    @classmethod
    def read(cls, reply: str) -> "Echo":
        """What a reply begins with.

        Raises:
            ValueError: it is none of the upstream's.
        """
        found = json.loads(reply.partition("\n")[0])
        return cls(found["asked"], found["model"], tuple(found["secrets"]))


def crossing(echo: Echo, person: Person, *, asked: str, base_model: str) -> str:
    """Whose else a reply was; nothing where all of it was this person's."""
    if echo.asked != asked:
        return f"{person.name} asked '{asked}' and got the answer to '{echo.asked}'"
    foreign = set(echo.secrets) - {person.secret}
    if foreign:
        return f"{person.name}'s context had {sorted(foreign)} of somebody else"
    if echo.model not in (base_model, person.adapter):
        return f"{person.name} was served by {echo.model}, which is somebody else's"
    return ""


@dataclass(frozen=True)
class Loss:
    """An acknowledged feedback that is not there exactly once."""

    acknowledged: Acknowledged
    times: int


def losses(acknowledged: Iterable[Acknowledged], events: Mapping[Person, Sequence[Event]]) -> list[Loss]:
    """What is missing, or there more than once; `events` are whole logs, the archive's part included."""
    said = {person: Counter(_said(log)) for person, log in events.items()}
    found = []
    for one in acknowledged:
        times = said[one.person][one.interaction, one.comment]
        if times != 1:
            found.append(Loss(one, times))
    return found


def doubled(events: Mapping[Person, Sequence[Event]]) -> int:
    """Feedback that is in a log more than once, acknowledged or not: every one of the load is said once."""
    return sum(times > 1 for log in events.values() for times in Counter(_said(log)).values())


def _said(log: Sequence[Event]) -> Iterable[tuple[str, str | None]]:
    for event in log:
        if isinstance(event, FeedbackEvent) and event.previous.comment != event.interaction.signals.comment:
            yield event.interaction.id, event.interaction.signals.comment


def gaps(events: Mapping[Person, Sequence[Event]]) -> int:
    """Logs whose revisions are not 1, 2, 3 and so on."""
    return sum([e.revision for e in log] != list(range(1, len(log) + 1)) for log in events.values())
