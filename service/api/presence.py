"""Whether the client is still there: when it hangs up, what is done for it ends, and with it the generation in vLLM."""

import asyncio
from types import TracebackType

from starlette.types import Receive

from service.errors import FastslowError


class ClientGone(FastslowError):
    """The client hung up before its reply was ready."""

    status = 499
    code = "client_closed_request"


# A task for each short chat is CPU time for nothing: whoever hangs up that early has lost nothing.
LISTEN_AFTER_SECONDS = 0.05


class Presence:
    """Around what is done for a client whose request has been read.

    What takes longer is listened beside: like `asyncio.timeout`, it is cancelled, and that turned into an error.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._listening: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        self._served = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(LISTEN_AFTER_SECONDS, self._begin)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._listening is not None:
            self._listening.cancel()
        if not self._gone or self._served is None:
            return
        if self._served.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientGone("The client closed the request.") from None

    def _begin(self) -> None:
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._served is not None:
            self._served.cancel()
