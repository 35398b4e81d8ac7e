"""An upstream with as many places as a vLLM's batch, and its limit on requests: `python -m tests.benchmarks.full_vllm PORT`.

It takes `PLACES` chats at a time, each for `SERVE_SECONDS`; others wait in its queue, and it answers 503 to more than `REQUESTS` in all, as
vLLM does with `--max-num-queued-reqs`.
"""

import asyncio
import sys
from collections import deque

from tests.benchmarks.mock_vllm import STREAMS, WHOLE, MockVllm

PLACES = 16
SERVE_SECONDS = 0.2
REQUESTS = 64
CAPACITY = PLACES / SERVE_SECONDS
"""Chats per second."""
ERROR = (
    b'{"error":{"message":"Server overloaded, please try again later.","type":"ServiceUnavailableError","code":503}}'
)
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nserver: mock\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    % (len(ERROR), ERROR)
)


class FullVllm(MockVllm):
    """One connection; all share the places and the queue."""

    waiting: "deque[FullVllm]" = deque()
    served = 0

    def on_message_complete(self) -> None:
        if STREAMS.search(self._body):
            raise ValueError("only whole replies are served here")
        self._body = b""
        if FullVllm.served + len(FullVllm.waiting) >= REQUESTS:
            self._transport.write(BUSY)
            return
        FullVllm.waiting.append(self)
        self._begin_next()

    def _begin_next(self) -> None:
        if FullVllm.waiting and FullVllm.served < PLACES:
            FullVllm.served += 1
            self._loop.call_later(SERVE_SECONDS, FullVllm.waiting.popleft()._end)

    def _end(self) -> None:
        FullVllm.served -= 1
        self._transport.write(WHOLE)
        self._begin_next()


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(FullVllm, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
