"""The fast weights of a task: contexts of guidelines and exemplars, put before every problem."""

from collections.abc import Callable

from service.domain.feedback import Frozen, Message
from workers.consolidation.base import Base

# What the chat template adds around a message, at most.
TOKENS_AROUND_MESSAGE = 8
HEADING = "Follow these guidelines in every reply:"


class Shown(Frozen):
    """A problem with a reply that its verifier found good."""

    prompt: str
    reply: str


class TaskContext(Frozen):
    """One context; the same text for all problems of a task."""

    guidelines: tuple[str, ...] = ()
    exemplars: tuple[Shown, ...] = ()

    def messages(self, prompt: str) -> list[Message]:
        """The conversation: guidelines, exemplars as turns, the problem. A problem is never shown with its own solution."""
        system = "\n".join([HEADING, *(f"- {text}" for text in self.guidelines)])
        messages = [Message(role="system", content=system)] if self.guidelines else []
        for shown in self.exemplars:
            if shown.prompt != prompt:
                messages.append(Message(role="user", content=shown.prompt))
                messages.append(Message(role="assistant", content=shown.reply))
        return [*messages, Message(role="user", content=prompt)]

    def encode(self, base: Base, prompt: str) -> tuple[int, ...]:
        """The prompt's tokens, up to where the reply begins."""
        return base.encode_chat(self.messages(prompt))

    def tokens(self, count: Callable[[str], int]) -> int:
        """Tokens that it adds to a prompt, about."""
        before = self.messages("")[:-1]
        return sum(count(message.content or "") + TOKENS_AROUND_MESSAGE for message in before)


EMPTY = TaskContext()
