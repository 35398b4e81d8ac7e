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


class Attention:
    """Lets those be listened for whose replies take long, with one timer for all: they come in the order of their turns."""

    def __init__(self) -> None:
        self._turns: dict[Presence, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def give(self, presence: "Presence") -> None:
        """In a while, unless it is taken back."""
        loop = asyncio.get_running_loop()
        self._turns[presence] = turn = loop.time() + LISTEN_AFTER_SECONDS
        if self._timer is None:
            self._timer = loop.call_at(turn, self._ring)

    def take_back(self, presence: "Presence") -> None:
        self._turns.pop(presence, None)

    def _ring(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while turn := next(iter(self._turns.values()), None):
            if turn > now:
                self._timer = loop.call_at(turn, self._ring)
                return
            presence = next(iter(self._turns))
            del self._turns[presence]
            presence.listen()


class Presence:
    """Around what is done for a client whose request has been read.

    What takes longer is listened beside: like `asyncio.timeout`, it is cancelled, and that turned into an error.
    """

    def __init__(self, receive: Receive, attention: Attention) -> None:
        self._receive = receive
        self._attention = attention
        self._served: asyncio.Task[object] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._gone = False

    def __enter__(self) -> None:
        self._served = asyncio.current_task()
        self._attention.give(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listening is None:
            self._attention.take_back(self)
            return
        self._listening.cancel()
        if self._gone and self._served is not None and self._served.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientGone("The client closed the request.") from None

    def listen(self) -> None:
        """Begin: its turn has come."""
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._served is not None:
            self._served.cancel()
