"""How the served model's window is shared out: conversation, tools, context, reply."""

from collections.abc import Sequence

from service.domain.feedback import Message
from service.errors import ContextLengthExceeded
from service.settings import Settings
from service.tokens import Tokens, around, texts_of


async def room(
    messages: Sequence[Message], *, tools: str, max_tokens: int | None, tokens: Tokens, settings: Settings
) -> tuple[int, int]:
    """Tokens left for the context, and tokens set aside for the reply.

    Of a longer reply than the default no more is set aside: many clients ask for as much as there may be, and vLLM ends a reply
    at the window.

    Args:
        tools: what the chat template renders beside the messages.

    Raises:
        ContextLengthExceeded: the conversation alone fills the window.
    """
    window, default = settings.max_model_len, settings.default_max_tokens
    wanted = min(max_tokens or default, default)
    most = tokens.most_of(messages, tools)
    if most is not None and most + wanted + settings.most_context_tokens <= window:
        # There is room for all; how much more need not be known.
        return window - most - wanted, wanted
    # Not every chat template renders tools and calls of them: only vLLM knows whether it is too long with these.
    content = await tokens.counted([m.content or "" for m in messages], most=window)
    if content >= window:
        raise ContextLengthExceeded(
            f"The messages have {content} tokens or more and the window of {settings.model_name} is {window}, "
            "the reply included: shorten the conversation.",
            param="messages",
        )
    left = window - around(messages)
    wanted = min(wanted, max(1, left - content))
    conversation = await tokens.counted([*texts_of(messages), tools], most=window)
    return max(0, left - conversation - wanted), wanted
