"""Waits that end: one timer for all, and each task's own end."""

import asyncio
import socket
import time

import pytest

from service.api.patience import OutOfPatience, Patience


def now() -> float:
    return asyncio.get_running_loop().time()


def stand_still() -> None:
    """The loop, and with it the process."""
    time.sleep(0.5)


async def quick(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def test_what_comes_in_time_is_returned_however_often() -> None:
    patience = Patience()
    assert [await patience.wait(quick(n), until=now() + 30) for n in range(3)] == [0, 1, 2]
    patience.close()


async def test_what_does_not_come_is_not_waited_for() -> None:
    patience, never = Patience(), asyncio.get_running_loop().create_future()
    with pytest.raises(OutOfPatience):
        await patience.wait(never, until=now() + 0.01)
    assert never.cancelled()
    # The task goes on as if nothing had been cancelled.
    assert await quick(1) == 1
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_time_between_waits_does_not_count_and_a_shorter_wait_ends_earlier() -> None:
    patience = Patience()
    await patience.wait(quick(1), until=now() + 0.02)
    await asyncio.sleep(0.05)
    assert await patience.wait(quick(2), until=now() + 30) == 2
    with pytest.raises(OutOfPatience):
        await asyncio.wait_for(patience.wait(asyncio.Event().wait(), until=now() + 0.01), timeout=10)


async def test_a_timer_of_an_earlier_wait_is_wound_again() -> None:
    patience, event = Patience(), asyncio.Event()
    await patience.wait(quick(1), until=now() + 0.01)
    asyncio.get_running_loop().call_later(0.05, event.set)
    assert await patience.wait(event.wait(), until=now() + 30)
    patience.close()


async def test_whose_time_is_up_ends_and_nobody_else() -> None:
    patience, event = Patience(), asyncio.Event()
    ends = []

    async def waits(name: str, seconds: float) -> None:
        try:
            await patience.wait(event.wait(), until=now() + seconds)
            ends.append((name, "there"))
        except OutOfPatience:
            ends.append((name, "out"))

    # The longest first and last, so that a shorter one winds the timer earlier, and it is wound again after each that rings.
    tasks = [asyncio.ensure_future(waits(*of)) for of in (("a", 30.0), ("b", 0.01), ("c", 0.03), ("d", 30.0))]
    done, _ = await asyncio.wait([tasks[1], tasks[2]], timeout=10)
    assert len(done) == 2
    assert ends == [("b", "out"), ("c", "out")]
    event.set()
    await asyncio.gather(*tasks)
    assert ends[2:] == [("a", "there"), ("d", "there")]
    patience.close()


async def test_what_came_while_the_process_stood_still_is_read() -> None:
    patience, ends = Patience(), []
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)

    async def waits(seconds: float) -> None:
        ends.append(await patience.wait(reader.readexactly(4), until=now() + seconds))

    task = asyncio.ensure_future(waits(0.2))
    await asyncio.sleep(0)
    theirs.send(b"body")
    stand_still()
    await task
    assert ends == [b"body"]
    # Who sends nothing in as long again is given up.
    task = asyncio.ensure_future(waits(0.2))
    await asyncio.sleep(0)
    stand_still()
    with pytest.raises(OutOfPatience):
        await asyncio.wait_for(task, timeout=10)
    writer.close()
    theirs.close()


async def test_somebody_elses_cancellation_stays_one() -> None:
    patience = Patience()
    task = asyncio.ensure_future(patience.wait(asyncio.Event().wait(), until=now() + 30))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    patience.close()


async def test_errors_pass_through() -> None:
    async def fails() -> None:
        raise ValueError("x")

    patience = Patience()
    with pytest.raises(ValueError, match="x"):
        await patience.wait(fails(), until=now() + 30)
    patience.close()
