"""What is asked for chats side by side: where it listens, and how it wants to be asked."""

import http.client
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks import processes
from tests.benchmarks.material import CHAT, chat_requests, conversation, headers
from tests.benchmarks.mock_vllm import MODEL

DIRECT, PASSTHROUGH, FULL = "direct", "pass-through", "full path"
OFF = "personalization off"
"""The gateway, asked to leave context and adapter out; the interaction is recorded all the same."""
USERS = 16


@dataclass(frozen=True)
class Target:
    """One server that answers chats as OpenAI's does."""

    service: processes.Service
    key: str
    path: str = CHAT
    body: Mapping[str, Any] = field(default_factory=dict)
    """What its requests have besides, or instead of, what all others have."""

    def requests(self, n: int, numbers: Iterator[int], *, stream: bool) -> Iterator[bytes]:
        """The chats of the `n`-th connection, without end."""
        return chat_requests(self.key, f"user-{n % USERS}", numbers, stream=stream, path=self.path, other=self.body)

    def says(self, question: str, *, stream: bool) -> tuple[str, http.client.HTTPMessage]:
        """The text of one reply, of a stream all pieces of it, and the reply's headers.

        Raises:
            RuntimeError: it is no reply.
        """
        body = {"model": MODEL, "messages": conversation(question)} | self.body | ({"stream": True} if stream else {})
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=60)
        try:
            connection.request("POST", self.path, json.dumps(body), headers(self.key, "user-0"))
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        try:
            return (streamed_text(content) if stream else _text(json.loads(content), "message")), reply.headers
        except (LookupError, TypeError, ValueError) as error:
            raise RuntimeError(f"{self.path}: {reply.status} {content[:500]!r}") from error


def streamed_text(content: bytes) -> str:
    """The text of a stream of server-sent events.

    Raises:
        ValueError: an event is no JSON, or the stream does not end as OpenAI's do.
        LookupError: an event is no chunk of a completion.
    """
    *chunks, last = [line.removeprefix(b"data: ") for line in content.splitlines() if line.startswith(b"data: ")]
    if last != b"[DONE]":
        raise ValueError(f"the last event is {last!r}")
    return "".join(_text(chunk, "delta") for chunk in map(json.loads, chunks) if chunk["choices"])


def _text(reply: dict[str, Any], part: str) -> str:
    return reply["choices"][0][part].get("content") or ""
