"""An upstream that costs as little as Python allows and answers chat completions like vLLM: `python -m tests.benchmarks.mock_vllm PORT`.

A whole reply comes after 5 ms; a stream's first chunk after 5 ms and 17 more a millisecond apart.
"""

import asyncio
import json
import re
import selectors
import sys
from typing import cast

import httptools

MODEL = "smollm2-135m-instruct"
THINK_SECONDS = 0.005
CHUNK_SECONDS = 0.001
CHUNKS = 18
# Some clients put a space there.
STREAMS = re.compile(rb'"stream": ?true')
TEXT = (
    "The shortest way is along the canal, past the two mills, and over the second stone bridge, "
    "where a path climbs to the station on the left."
)


def _completion() -> bytes:
    message = {"role": "assistant", "content": TEXT, "refusal": None, "annotations": None, "audio": None}
    message |= {"function_call": None, "tool_calls": [], "reasoning": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {"prompt_tokens": 311, "total_tokens": 341, "completion_tokens": 30, "prompt_tokens_details": None}
    body = {"id": "chatcmpl-mock", "object": "chat.completion", "created": 1765000000, "model": MODEL}
    body |= {"choices": [choice | {"token_ids": None}], "service_tier": None, "system_fingerprint": None}
    body |= {"usage": usage, "prompt_logprobs": None, "prompt_token_ids": None, "kv_transfer_params": None}
    return json.dumps(body, separators=(",", ":")).encode()


def _chunks() -> list[bytes]:
    """A chunk with the role, the text in equal pieces, an empty last one with the finish reason."""
    width = -(-len(TEXT) // (CHUNKS - 2))
    texts = [TEXT[n : n + width] for n in range(0, len(TEXT), width)]
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts), {"content": ""}]
    frame = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1765000000, "model": MODEL}
    events = []
    for n, delta in enumerate(deltas):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}
        if n == CHUNKS - 1:
            choice |= {"finish_reason": "stop", "stop_reason": None}
        events.append(b"data: " + json.dumps(frame | {"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n")
    events[-1] += b"data: [DONE]\n\n"
    assert len(events) == CHUNKS
    return events


def _transfer_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


COMPLETION = _completion()
WHOLE = b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(COMPLETION),
    COMPLETION,
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = [_transfer_chunk(event) for event in _chunks()]
STREAM[0] = STREAM_HEAD + STREAM[0]
STREAM[-1] += b"0\r\n\r\n"


class MockVllm(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        streams, self._body = STREAMS.search(self._body) is not None, b""
        pieces = STREAM if streams else [WHOLE]
        due = self._loop.time() + THINK_SECONDS
        self._loop.call_at(due, self._send, pieces, 0, due)

    def _send(self, pieces: list[bytes], n: int, due: float) -> None:
        self._transport.write(pieces[n])
        if n + 1 < len(pieces):
            due += CHUNK_SECONDS
            self._loop.call_at(due, self._send, pieces, n + 1, due)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(MockVllm, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    # select() waits to the microsecond; epoll, and uvloop's timers, would round the 5 ms to whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve(int(sys.argv[1])))
