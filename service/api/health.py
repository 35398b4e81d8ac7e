"""For the machines that run the service: liveness, readiness by dependency, metrics, and the list of models."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api.auth import Caller, authenticated
from service.errors import EngineUnavailable, ModelNotFound, StoreUnavailable
from service.metrics import Metrics
from service.serving import Serving

router = APIRouter()


@router.get("/health/live", summary="Whether the process runs")
async def live() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/health/ready", summary="Whether each dependency answers")
async def ready(request: Request) -> JSONResponse:
    """200 when all do, else 503; each is named with what is wrong with it."""
    serving: Serving = request.app.state.serving
    checks: dict[str, str] = {}
    try:
        durable = await serving.store.connection.append_only()
        checks["redis"] = "ok" if durable else "no append-only file: acknowledged feedback would not survive a restart"
    except StoreUnavailable as error:
        checks["redis"] = error.message
    try:
        await serving.engine.ready()
        checks["vllm"] = "ok"
    except EngineUnavailable as error:
        checks["vllm"] = error.message
    all_ok = set(checks.values()) == {"ok"}
    return JSONResponse({"status": "ok" if all_ok else "unavailable", "checks": checks}, 200 if all_ok else 503)


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """What this gateway has counted, what all workers have (with Redis away, as much of that as it last saw), and what waits for them."""
    found: Metrics = request.app.state.metrics
    await found.stored.refresh(request.app.state.store, now=time.time())
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", summary="What a client may name as model")
async def models(request: Request, caller: Annotated[Caller, Depends(authenticated)]) -> dict[str, Any]:
    """The base model alone: which adapter serves is the service's business."""
    return {"object": "list", "data": [_model(request.app.state.serving)]}


@router.get("/v1/models/{model:path}", summary="One model")
async def model(request: Request, model: str, caller: Annotated[Caller, Depends(authenticated)]) -> dict[str, Any]:
    serving: Serving = request.app.state.serving
    if model != serving.settings.model_name:
        raise ModelNotFound(f"The model '{model[:100]}' does not exist.", param="model")
    return _model(serving)


def _model(serving: Serving) -> dict[str, Any]:
    settings = serving.settings
    return {
        "id": settings.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "fastslow",
        "max_model_len": settings.max_model_len,
    }
