"""One connection for all requests of a process, over a real server: whose answer is whose, and what happens when it breaks or hangs."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from redis.asyncio import Redis

from service.errors import StoreUnavailable
from service.store.connection import Connection
from tests.redis_servers import Server, server
from tests.waiting import PATIENCE_SECONDS, until


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path, {"save": ""}) as started:
        yield started


def url(redis: Server) -> str:
    return f"redis://127.0.0.1:{redis.port}/0"


@pytest.fixture
async def connection(redis: Server) -> AsyncIterator[Connection]:
    opened = Connection(url(redis), timeout_seconds=PATIENCE_SECONDS)
    yield opened
    await opened.close()


async def clients(redis: Server) -> int:
    """Connections of others to the server."""
    return len(await redis.client.client_list()) - 1


async def test_whoever_asks_at_the_same_time_gets_their_own_answers_over_one_connection(
    redis: Server, connection: Connection
) -> None:
    async def ask(n: int) -> list[object]:
        return await connection.brief(("SET", f"k{n}", n), *[("GET", f"k{n}")] * (n % 4), ("HGETALL", "none"))

    for _ in range(2):
        answers = await asyncio.gather(*(ask(n) for n in range(200)))
        assert answers == [[b"OK", *[b"%d" % n] * (n % 4), {}] for n in range(200)]
    assert await clients(redis) == 1


async def test_what_is_asked_at_the_same_moment_leaves_in_one_write(connection: Connection) -> None:
    await connection.brief(("SET", "a", "1"))
    assert connection._lane is not None
    wire = connection._lane._wire
    assert wire is not None
    writes, transport = [], wire._transport

    class Counted:
        def write(self, data: bytes) -> None:
            writes.append(data)
            transport.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(transport, name)

    wire._transport = cast(asyncio.Transport, Counted())
    answers = await asyncio.gather(*(connection.brief(("GET", "a")) for _ in range(20)))
    assert answers == [[b"1"]] * 20
    assert len(writes) == 1


async def test_an_error_is_its_askers_alone(connection: Connection) -> None:
    await connection.brief(("SET", "text", "x"))
    good, bad, script, after = await asyncio.gather(
        connection.brief(("GET", "text")),
        connection.brief(("GET", "text"), ("LPUSH", "text", "y")),
        connection.script("return {ARGV[1], redis.call('GET', KEYS[1])}", ["text"], 7),
        connection.brief(("GET", "text")),
        return_exceptions=True,
    )
    assert good == after == [b"x"]
    assert script == [b"7", b"x"]
    assert isinstance(bad, StoreUnavailable)
    assert "WRONGTYPE" in str(bad) or "wrong kind" in str(bad)


async def test_who_goes_away_while_asking_leaves_the_others_their_answers(
    redis: Server, connection: Connection
) -> None:
    await connection.brief(("SET", "a", "1"))
    await redis.client.client_pause(300)
    asking = [asyncio.create_task(connection.brief(("GET", "a"), ("ECHO", n))) for n in range(3)]
    await asyncio.sleep(0)
    asking[1].cancel()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert answers[::2] == [[b"1", b"0"], [b"1", b"2"]]
    assert isinstance(answers[1], asyncio.CancelledError)


async def test_a_lost_connection_is_made_again_and_the_script_is_told_again(
    redis: Server, connection: Connection
) -> None:
    source = "return ARGV[1]"
    assert await connection.script(source, ["k"], "x") == b"x"
    await redis.client.script_flush()
    assert await connection.script(source, ["k"], "y") == b"y"
    await redis.client.client_kill_filter(_type="normal", skipme=True)
    assert await connection.script(source, ["k"], "z") == b"z"
    assert await clients(redis) == 1


async def test_a_server_that_hangs_is_given_up_in_time_and_asked_over_a_new_connection(redis: Server) -> None:
    hasty = Connection(url(redis), timeout_seconds=0.3)

    async def answered() -> bool:
        """Not at once, where the machine has no time for it."""
        try:
            return await hasty.brief(("ECHO", "x")) == [b"x"]
        except StoreUnavailable:
            return False

    try:
        await until(answered, what="an answer")
        redis.process.send_signal(signal.SIGSTOP)
        answers = await asyncio.wait_for(
            asyncio.gather(*(hasty.brief(("ECHO", n)) for n in range(3)), return_exceptions=True), PATIENCE_SECONDS
        )
        assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
        with pytest.raises(StoreUnavailable):
            await hasty.brief(("ECHO", "x"))
        redis.process.send_signal(signal.SIGCONT)
        patient = Redis(port=redis.port)
        assert await patient.ping()
        await patient.aclose()
        await until(answered, what="an answer over a new connection")
    finally:
        await hasty.close()


async def test_a_server_that_is_away_is_told_as_such_to_all_who_ask(redis: Server) -> None:
    redis.process.kill()
    await redis.process.wait()
    away = Connection(url(redis), timeout_seconds=PATIENCE_SECONDS)
    answers = await asyncio.gather(*(away.brief(("ECHO", n)) for n in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
    await away.close()
