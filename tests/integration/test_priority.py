"""Who waits in a real vLLM that is full: chats of people go before background work that came earlier."""

import asyncio

import httpx
import pytest

from service.engine import BACKGROUND_PRIORITY
from tests.integration.replica import BASE, SEQUENCES, Replica
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_an_interactive_chat_overtakes_the_background_chats_that_wait(vllm_server: Replica):
    replica = vllm_server.http
    done: list[str] = []

    async with httpx.AsyncClient(base_url=replica.base_url, headers=replica.headers, timeout=120) as http:

        async def chat(who: str, *, max_tokens: int, **fields: int) -> None:
            body = {"model": BASE, "messages": [{"role": "user", "content": f"Count, {who}."}], "ignore_eos": True}
            response = await http.post("/v1/chat/completions", json=body | {"max_tokens": max_tokens} | fields)
            assert response.status_code == 200, response.text
            done.append(who)

        async def many_wait() -> bool:
            lines = (await http.get("/metrics")).text.splitlines()
            waiting = (line.split()[-1] for line in lines if line.startswith("vllm:num_requests_waiting{"))
            return sum(map(float, waiting)) >= 2 * SEQUENCES

        background = [
            asyncio.create_task(chat(f"background {n}", max_tokens=40, priority=BACKGROUND_PRIORITY))
            for n in range(4 * SEQUENCES)
        ]
        await until(many_wait, what="a queue")
        await asyncio.gather(chat("a person", max_tokens=1), *background)
    # After those that ran when it came, and at most as many that were let in before it was there; by arrival it would be the last.
    assert done.index("a person") <= 2 * SEQUENCES
