"""The least that FastAPI and aiohttp can do: a bare pass-through to the upstream, the baseline of what any gateway of theirs costs."""

import os

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

UPSTREAM = "BENCH_UPSTREAM"
SERVED = ("uvicorn", "tests.benchmarks.passthrough:make_app", "--factory", "--http", "httptools")


def make_app() -> FastAPI:
    """uvicorn's factory; the upstream's URL is in the environment."""
    app = FastAPI()
    url = os.environ[UPSTREAM]
    sessions: list[aiohttp.ClientSession] = []

    def session() -> aiohttp.ClientSession:
        if not sessions:  # aiohttp wants a running loop
            sessions.append(aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=1024)))
        return sessions[0]

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.body()
        reply = await session().post("/v1/chat/completions", data=body, headers={"Content-Type": "application/json"})
        if reply.content_type == "text/event-stream":
            return StreamingResponse(reply.content.iter_any(), media_type="text/event-stream")
        async with reply:
            return Response(await reply.read(), reply.status, media_type="application/json")

    return app
