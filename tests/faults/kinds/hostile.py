"""Clients that mean harm: they send what is known to kill a vLLM replica, of which nothing may get there, or hold connections open."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.faults.members import UPSTREAMS, Layout
from tests.faults.registry import fault
from tests.faults.stack import KEY_OF, TENANTS, Stack

REAL_VLLM = Layout(real_vllm=True)
SHORT_OF_PATIENCE = Layout(settings=(("client_send_seconds", 3.0),))
PAUSE_SECONDS = 0.1
SILENT_CONNECTIONS = 200
"""To each gateway."""
# On busy cores, beyond the patience.
CLOSED_SECONDS = 20.0


def _deadly(stack: Stack) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) of each request, by the known ways to kill a replica, and what else would give a client power over it."""
    chat: dict[str, Any] = {
        "model": stack.settings.model_name,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 4,
    }
    path = "/v1/chat/completions"
    adapter = (stack.adapters or ["fs-000000000000-0001-000000000000"])[0]
    return [
        (path, chat | {"prompt_logprobs": 1}),
        (path, chat | {"echo": True}),
        (path, chat | {"vllm_xargs": {"a": 1}}),
        (path, chat | {"cache_salt": "another"}),
        (path, chat | {"priority": -1}),
        (path, chat | {"model": adapter}),
        ("/v1/completions", {"model": chat["model"], "prompt": "Hello", "prompt_logprobs": 1, "max_tokens": 1}),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {"prompt_logprobs": 1}}),
        ("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": "/"}),
        ("/v1/unload_lora_adapter", {"lora_name": adapter}),
    ]


async def _attack(stack: Stack) -> None:
    """For ever: all at once, then again."""
    headers = {"Authorization": f"Bearer {KEY_OF[TENANTS[0]]}", "X-User-ID": "mallory"}
    async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=30) as http:
        while True:
            sent = _deadly(stack)
            replies = await asyncio.gather(*(http.post(path, json=body) for path, body in sent), return_exceptions=True)
            for (path, body), reply in zip(sent, replies, strict=True):
                # A connection that was idle for too long breaks, as anybody's does.
                if isinstance(reply, httpx.TransportError):
                    continue
                if isinstance(reply, BaseException):
                    raise reply
                if not httpx.codes.is_client_error(reply.status_code):
                    stack.problems.append(f"{path} {body} was answered with {reply.status_code}")
            await asyncio.sleep(PAUSE_SECONDS)


@asynccontextmanager
async def _attacked(stack: Stack) -> AsyncIterator[None]:
    names = [name for name in UPSTREAMS if name in stack.children]
    before = [stack.pid(name) for name in names]
    attack = asyncio.create_task(_attack(stack))
    try:
        yield
    finally:
        attack.cancel()
        [end] = await asyncio.gather(attack, return_exceptions=True)
        if not isinstance(end, asyncio.CancelledError):
            stack.problems.append(f"the attack ended early: {end!r}")
        if before != [stack.pid(name) for name in names]:
            stack.problems.append("an upstream died of it")


@fault("hostile-client", seamless=True)
async def hostile_client(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """A client sends what is known to kill a vLLM replica, to upstreams that die of it."""
    async with _attacked(stack):
        yield


@fault("hostile-client-vllm", layout=REAL_VLLM, seamless=True, on_request=True)
async def hostile_client_vllm(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """The same to a real vLLM."""
    async with _attacked(stack):
        yield


@fault("silent-clients", layout=SHORT_OF_PATIENCE, seamless=True, least_seconds=6.0)
async def silent_clients(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """Hundreds of connections never say what they want: half of them not a byte, the others a header that does not end."""
    opened = await asyncio.gather(
        *(
            asyncio.open_connection("127.0.0.1", port)
            for port in stack.ports.gateways
            for _ in range(SILENT_CONNECTIONS)
        )
    )
    talking = [writer for _, writer in opened[::2]]
    for writer in talking:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nX-Long: ")
    dripping = asyncio.create_task(_drip(talking))
    try:
        yield
        ends = [asyncio.wait_for(reader.read(), CLOSED_SECONDS) for reader, _ in opened]
        held = [end for end in await asyncio.gather(*ends, return_exceptions=True) if isinstance(end, TimeoutError)]
        if held:
            stack.problems.append(f"{len(held)} of {len(opened)} silent connections were still open")
    finally:
        dripping.cancel()
        for _, writer in opened:
            writer.close()


async def _drip(writers: list[asyncio.StreamWriter]) -> None:
    """A byte to each, again and again; those that are closed take none."""
    while True:
        for writer in writers:
            if not writer.is_closing():
                writer.write(b"x")
        await asyncio.sleep(PAUSE_SECONDS)
