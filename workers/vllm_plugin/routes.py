"""Our routes inside vLLM: list and evict adapters, score replies; and the guard around all of vLLM's."""

import asyncio
import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm import envs
from vllm.lora.resolver import LoRAResolverRegistry

from service.domain.slow_weights import NAME
from service.engine import SCORE_PATH
from workers.vllm_plugin import resolver
from workers.vllm_plugin.eviction import Adapters, Readers
from workers.vllm_plugin.guard import Guard
from workers.vllm_plugin.held_copies import HeldCopies
from workers.vllm_plugin.score_route import Scorer, score

logger = logging.getLogger("vllm.fastslow")

# Long replies may hold an adapter for minutes: the caller learns so, and the eviction goes on.
EVICTION_WAIT_SECONDS = 5.0
# How often it is looked whether the copies of adapters take more of the disk than they may.
ROOM_SECONDS = 5.0


class Routes:
    """Our endpoint plugin (vLLM's protocol `EndpointPlugin`)."""

    name = "fastslow_routes"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._readers = Readers()
        # The event loop holds tasks weakly.
        self._evictions: set[asyncio.Task[bool]] = set()
        self._room: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Called once, after vLLM's own routes."""
        tokens = [key for key in (app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
        if not tokens:
            logger.warning("No API key is set: whoever reaches this port can use every user's adapter.")
        app.add_middleware(Guard, tokens=tokens, readers=self._readers, seen=lambda body: _copies().seen(body))
        app.add_api_route("/fastslow/adapters", self.list_adapters, methods=["GET"])
        app.add_api_route("/fastslow/adapters/{name}", self.evict_adapter, methods=["DELETE"])
        app.add_api_route(SCORE_PATH, score, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called once, when the engine is up."""
        state.fastslow_adapters = Adapters(
            models=state.openai_serving_models, engine=engine_client, readers=self._readers, copies=_copies()
        )
        self._room = asyncio.create_task(state.fastslow_adapters.keep_room(seconds=ROOM_SECONDS))
        state.fastslow_scorer = Scorer(
            engine=engine_client, chat=state.openai_serving_chat, models=state.openai_serving_models
        )
        await state.fastslow_scorer.warm_up()

    async def list_adapters(self, request: Request) -> JSONResponse:
        """200 `{"adapters": [name, ...]}`: what is loaded here."""
        return JSONResponse({"adapters": request.app.state.fastslow_adapters.names()})

    async def evict_adapter(self, name: str, request: Request) -> JSONResponse:
        """200 `{"name", "evicted"}` (false: it was asked for again meanwhile), or 202 while replies in flight may use it."""
        if not NAME.fullmatch(name):
            return JSONResponse({"name": name[:80], "evicted": False}, status_code=404)
        eviction = asyncio.ensure_future(request.app.state.fastslow_adapters.evict(name))
        self._evictions.add(eviction)
        eviction.add_done_callback(self._ended)
        done, _ = await asyncio.wait({eviction}, timeout=EVICTION_WAIT_SECONDS)
        evicted = done == {eviction} and eviction.result()
        return JSONResponse({"name": name, "evicted": evicted}, status_code=200 if done else 202)

    def _ended(self, eviction: "asyncio.Task[bool]") -> None:
        self._evictions.discard(eviction)
        if not eviction.cancelled() and (error := eviction.exception()):
            logger.error("An adapter could not be evicted: %r", error)


def _copies() -> HeldCopies:
    """Those that our resolver hands to vLLM in this process."""
    found: resolver.StoreResolver = LoRAResolverRegistry.get_resolver(resolver.NAME)
    return found.copies


def make_routes() -> Routes:
    """Entry point of `vllm.endpoint_plugins`."""
    return Routes()
