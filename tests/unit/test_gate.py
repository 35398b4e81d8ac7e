"""Places for chats: who gets one, who waits, who is told no."""

import asyncio

import pytest

from service.errors import Overloaded
from service.gate import Gate


def gate(*, places: int = 1, line: int = 4, wait_seconds: float = 30.0) -> Gate:
    return Gate(places=places, line=line, wait_seconds=wait_seconds)


async def in_line(gate: Gate, *, tenant: str = "acme", user: str = "alice") -> "asyncio.Task[None]":
    """A request that waits for a place by now."""
    task = asyncio.ensure_future(gate.enter(tenant=tenant, user=user))
    # It runs up to where it waits.
    await asyncio.sleep(0)
    return task


async def test_a_place_that_is_left_is_the_next_ones() -> None:
    one = gate()
    await one.enter(tenant="acme", user="alice")
    first, second = await in_line(one), await in_line(one)
    one.leave()
    await first
    assert (one.in_flight, one.waiting, second.done()) == (1, 1, False)
    one.leave()
    await second
    one.leave()
    assert (one.in_flight, one.waiting) == (0, 0)


async def test_a_full_line_is_a_plain_no() -> None:
    one = gate(line=1)
    await one.enter(tenant="acme", user="alice")
    waiting = await in_line(one)
    with pytest.raises(Overloaded):
        await one.enter(tenant="acme", user="alice")
    assert (one.in_flight, one.waiting) == (1, 1)
    one.leave()
    await waiting


async def test_without_a_line_nobody_waits() -> None:
    one = gate(line=0)
    await one.enter(tenant="acme", user="alice")
    with pytest.raises(Overloaded):
        await one.enter(tenant="acme", user="bob")
    one.leave()
    await one.enter(tenant="acme", user="bob")


async def test_who_floods_the_line_makes_room_for_others() -> None:
    one = gate(line=3)
    await one.enter(tenant="acme", user="alice")
    flood = [await in_line(one, user="mallory") for _ in range(3)]
    bob = await in_line(one, user="bob")
    with pytest.raises(Overloaded):
        await flood[2]
    one.leave()
    await flood[0]
    one.leave()
    await bob
    assert not flood[1].done()
    one.leave()
    await flood[1]


async def test_a_wait_ends_and_takes_no_place() -> None:
    one = gate(wait_seconds=0.01)
    await one.enter(tenant="acme", user="alice")
    with pytest.raises(Overloaded):
        await one.enter(tenant="acme", user="bob")
    assert (one.in_flight, one.waiting) == (1, 0)


async def test_who_goes_away_while_it_waits_takes_no_place() -> None:
    one = gate()
    await one.enter(tenant="acme", user="alice")
    gone, stays = await in_line(one), await in_line(one)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    one.leave()
    await stays
    assert (one.in_flight, one.waiting) == (1, 0)


async def test_a_place_given_to_who_goes_away_at_that_moment_is_passed_on() -> None:
    one = gate()
    await one.enter(tenant="acme", user="alice")
    gone, stays = await in_line(one), await in_line(one)
    one.leave()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await stays
    assert (one.in_flight, one.waiting) == (1, 0)


async def test_no_place_is_ever_lost_or_given_twice() -> None:
    one, most, inside = gate(places=3, line=8, wait_seconds=0.02), 0, 0

    async def visit(number: int) -> bool:
        nonlocal most, inside
        try:
            await one.enter(tenant=f"t{number % 3}", user=f"u{number % 5}")
        except Overloaded:
            return False
        inside += 1
        most = max(most, inside)
        try:
            await asyncio.sleep(0.001 * (number % 4))
        finally:
            inside -= 1
            one.leave()
        return True

    tasks = [asyncio.ensure_future(visit(number)) for number in range(100)]
    for task in tasks[::7]:
        asyncio.get_running_loop().call_later(0.002, task.cancel)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert (most, inside, one.in_flight, one.waiting) == (3, 0, 0, 0)
    assert True in ends
    assert False in ends
