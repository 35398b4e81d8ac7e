"""Counting tokens with the served model's own tokenizer, and knowing its control tokens."""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from service.domain.context import TOKENS_AROUND_MESSAGE
from service.domain.feedback import Message
from service.errors import FastslowError

# Context items and the turns of a growing conversation come back at every chat.
CACHED_TEXTS = 20_000
# A longer text is counted in a thread, for it takes milliseconds, and remembered by its hash.
SHORT_CHARS = 4_096


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
        # Each token of such a tokenizer stands for one byte or more of the text.
        self._bytes_bound = tokenizer.normalizer is None and isinstance(tokenizer.decoder, ByteLevel)
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._short = lru_cache(CACHED_TEXTS)(self._count)
        self._long: dict[bytes, int] = {}

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        if len(text) <= SHORT_CHARS:
            return self._short(text)
        key = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
        found = self._long.get(key)
        if found is None:
            if len(self._long) >= CACHED_TEXTS:
                self._long.clear()
            found = self._long[key] = self._count(text)
        return found

    async def counted(self, texts: Sequence[str], *, most: int) -> int:
        """`count` of all together; or a lower number that is `most` already, where the bytes tell so, for a megabyte takes seconds."""
        if self._bytes_bound:
            least = sum(map(_bytes, texts)) // self._longest_token
            if least >= most:
                return least
        for text in texts:
            if len(text) > SHORT_CHARS:
                await asyncio.to_thread(self.count, text)
        return sum(map(self.count, texts))

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def neutralize(self, text: str) -> str:
        """`text` without control tokens of the chat template, which would let it end its own turn."""
        return neutralize(text, self.control_tokens) if self._control.search(text) else text

    def neutralized(self, message: Message) -> Message:
        """A message with every string in it neutralized, those in its tool calls too."""
        text = message.content
        if (text is None or not self._control.search(text)) and not message.more():
            return message
        return Message(**_mapped(message.sent(), self.neutralize))

    def most_of(self, messages: Sequence[Message], tools: str) -> int | None:
        """A number that all their tokens don't exceed, by the bytes, which costs nothing; None where these don't tell."""
        if not self._bytes_bound:
            return None
        # One more each, for tokenizers that put a space before a text.
        texts = [*texts_of(messages), tools]
        return around(messages) + _bytes("".join(texts)) + len(texts)


def texts_of(messages: Iterable[Message]) -> list[str]:
    """What a chat template renders of messages; tool calls as JSON."""
    texts = [m.content or "" for m in messages]
    return texts + [as_json(more) for m in messages if (more := m.more())]


def as_json(value: object) -> str:
    """As most chat templates write tools, and their calls."""
    return json.dumps(value, ensure_ascii=False)


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def around(messages: Sequence[Message]) -> int:
    """No fewer tokens than the chat template adds to the texts of messages."""
    return (len(messages) + 1) * TOKENS_AROUND_MESSAGE


def neutralize(text: str, control_tokens: Sequence[str]) -> str:
    """`text` with a space after the first character of each control token, so that the tokenizer no longer sees one."""
    for token in control_tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, keys of objects left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(v, change) for v in value]
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


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
