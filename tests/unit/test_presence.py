"""What is done for a client ends when it hangs up."""

import asyncio

import pytest
from starlette.types import Message

from service.api.presence import LISTEN_AFTER_SECONDS, Attention, ClientGone, Presence


class Client:
    """Says nothing until it hangs up."""

    def __init__(self) -> None:
        self.hung_up = asyncio.Event()
        self.listened = asyncio.Event()

    async def receive(self) -> Message:
        self.listened.set()
        await self.hung_up.wait()
        return {"type": "http.disconnect"}


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_what_a_client_that_stays_waits_for_is_done() -> None:
    client = Client()
    with Presence(client.receive, Attention()):
        await client.listened.wait()
    client.hung_up.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert cancelling() == 0


async def test_what_a_client_that_hangs_up_waited_for_ends_and_the_task_goes_on() -> None:
    client, work = Client(), asyncio.get_running_loop().create_future()
    client.hung_up.set()

    async def served() -> None:
        with Presence(client.receive, Attention()):
            await asyncio.wait_for(work, 30)

    with pytest.raises(ClientGone):
        await served()
    assert work.cancelled()
    assert cancelling() == 0
    await asyncio.sleep(0)


async def test_an_error_inside_stays_what_it_was() -> None:
    client = Client()

    async def fails() -> None:
        with Presence(client.receive, Attention()):
            await client.listened.wait()
            client.hung_up.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("x") from None

    with pytest.raises(ValueError, match="x"):
        await fails()
    assert cancelling() == 0


async def test_somebody_elses_cancellation_stays_one() -> None:
    client = Client()

    async def served() -> None:
        with Presence(client.receive, Attention()):
            await asyncio.Event().wait()

    task = asyncio.create_task(served())
    await client.listened.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_timer_serves_all_and_whose_reply_was_quick_is_never_listened_for() -> None:
    attention, quick, early, late = Attention(), Client(), Client(), Client()
    listened = []

    async def served(client: Client) -> None:
        with Presence(client.receive, attention):
            await client.listened.wait()
            listened.append(client)

    with Presence(quick.receive, attention):
        pass
    first = asyncio.create_task(served(early))
    await asyncio.sleep(LISTEN_AFTER_SECONDS / 2)
    second = asyncio.create_task(served(late))
    await asyncio.wait_for(asyncio.gather(first, second), 10)
    assert listened == [early, late]
    # The timer has rung out, and is wound again for who comes now.
    await asyncio.wait_for(served(Client()), 10)
    assert not quick.listened.is_set()
