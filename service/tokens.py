"""Counting tokens with the served model's own tokenizer, and knowing its control tokens."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from service.domain.context import TOKENS_AROUND_MESSAGE, neutralize
from service.domain.feedback import Message
from service.errors import FastslowError

# Context items and the turns of a growing conversation come back at every chat.
CACHED_TEXTS = 20_000


class TokenizerUnavailable(FastslowError):
    """The served model's tokenizer can't be read."""


class Tokens:
    """The tokenizer of a model folder or hub id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        # Longest first, so that a token inside another does not hide it.
        self.control_tokens: tuple[str, ...] = tuple(
            sorted((t.content for t in added if t.special and len(t.content) > 1), key=len, reverse=True)
        )
        self._control = re.compile("|".join(map(re.escape, self.control_tokens)) or "(?!)")
        self.count = lru_cache(CACHED_TEXTS)(self._count)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def neutralize(self, text: str) -> str:
        """`text` without control tokens of the chat template, which would let it end its own turn."""
        return neutralize(text, self.control_tokens) if self._control.search(text) else text

    def count_messages(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation, with an upper bound for what the chat template adds."""
        return sum(self.count(m.content or "") + TOKENS_AROUND_MESSAGE for m in messages) + TOKENS_AROUND_MESSAGE


def load_tokens(model: str) -> Tokens:
    """The tokenizer of a model folder, or of a hub id where there is no such folder.

    Raises:
        TokenizerUnavailable: neither can be read.
    """
    file = Path(model) / "tokenizer.json"
    try:
        return Tokens(Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(model))
    except Exception as error:  # tokenizers raises plain Exception for every failure
        raise TokenizerUnavailable(
            f"No tokenizer for the model '{model}': set FASTSLOW_MODEL to a folder with tokenizer.json or to a hub id ({error})."
        ) from error
