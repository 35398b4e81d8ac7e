"""The feedback that judges contexts: the newest that is usable, cut to what a scoring may cost.

A comment alone has no margin: its guideline is in every context until feedback of other kinds has come after it.
"""

from collections.abc import Iterable, Sequence

from service.domain.context import TOKENS_AROUND_MESSAGE, Count
from service.domain.events import Event
from service.domain.feedback import FeedbackEvent, latest_interactions
from workers.consolidation.dataset import Example, example_of

# The newest are what the user wants now, and each costs a scoring for every candidate.
MAX_EXAMPLES = 16
# The start of a reply tells its style; a long one would cost as much as ten short ones.
SCORED_TOKENS = 64


def usable(
    events: Iterable[Event], *, user: str, count: Count, room_tokens: int
) -> tuple[tuple[Example, ...], dict[str, int]]:
    """(the newest feedback that can judge, oldest first; interaction id -> revision of its latest feedback).

    Args:
        count: tokens of a text.
        room_tokens: of the served window, without the context: a conversation must leave its replies room in it.
    """
    spoken = [event for event in events if isinstance(event, FeedbackEvent)]
    found = [example_of(interaction, user=user, new=True) for interaction in latest_interactions(spoken)]
    judging = [e for e in found if isinstance(e, Example) and e.judges]
    fitting = [e for e in judging if _conversation(e, count) + SCORED_TOKENS <= room_tokens]
    examples = tuple(shortened(example, count) for example in fitting[-MAX_EXAMPLES:])
    return examples, {event.interaction.id: event.revision for event in spoken}


def shortened(example: Example, count: Count) -> Example:
    """The example with its replies cut to about `SCORED_TOKENS`; one that was cut has no end to score."""
    reply, rejected = cut(example.reply, count), example.rejected and cut(example.rejected, count)
    return example.model_copy(
        update={
            "reply": reply,
            "rejected": rejected,
            "reply_ended": example.reply_ended and reply == example.reply,
            "rejected_ended": example.rejected_ended and rejected == example.rejected,
        }
    )


def cut(text: str, count: Count) -> str:
    """The first words of a text, about `SCORED_TOKENS` of them in tokens."""
    tokens = count(text)
    if tokens <= SCORED_TOKENS:
        return text
    start = text[: len(text) * SCORED_TOKENS // tokens]
    return start.rsplit(maxsplit=1)[0] if " " in start.strip() else start


def _conversation(example: Example, count: Count) -> int:
    texts: Sequence[str] = [message.content or "" for message in example.messages]
    return sum(count(text) + TOKENS_AROUND_MESSAGE for text in texts) + TOKENS_AROUND_MESSAGE
