"""What is done for a client ends when it hangs up."""

import asyncio

import pytest
from starlette.types import Message

from service.api.presence import ClientGone, Presence


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
    async with Presence(client.receive):
        await client.listened.wait()
    client.hung_up.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert cancelling() == 0


async def test_what_a_client_that_hangs_up_waited_for_ends_and_the_task_goes_on() -> None:
    client, work = Client(), asyncio.get_running_loop().create_future()
    client.hung_up.set()

    async def served() -> None:
        async with Presence(client.receive):
            await asyncio.wait_for(work, 30)

    with pytest.raises(ClientGone):
        await served()
    assert work.cancelled()
    assert cancelling() == 0
    await asyncio.sleep(0)


async def test_an_error_inside_stays_what_it_was() -> None:
    client = Client()

    async def fails() -> None:
        async with Presence(client.receive):
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
        async with Presence(client.receive):
            await asyncio.Event().wait()

    task = asyncio.create_task(served())
    await client.listened.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
