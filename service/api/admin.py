"""The admin's calls: adapter versions, rollback and promotion, consolidations, the audit."""

import asyncio
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Query, Request, Response

from service import frontier
from service.api.auth import Caller, admin, checked_user
from service.api.schemas import (
    CohortRequest,
    ConsolidationRequest,
    ConsolidationsRequest,
    PromoteRequest,
    RollbackRequest,
)
from service.domain.affinity import affinity_of_scope
from service.domain.feedback import BASE
from service.domain.slow_weights import AdapterVersion, Scope
from service.errors import Conflict
from service.jobs import Jobs
from service.rescoring import score_again
from service.serving import Serving
from service.store import Store
from service.store.scopes import AuditEntry, ScopeState

router = APIRouter(prefix="/v1/admin", tags=["admin"])
Admin = Annotated[Caller, Depends(admin)]


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


@router.get("/adapters", summary="All adapter versions")
async def adapters(request: Request, caller: Admin) -> dict[str, Any]:
    """Every version of the tenant by scope and number, with its report and whether it is in use, barred or retired."""
    store = _store(request)
    versions = await store.scopes.versions(tenant=caller.tenant)
    states = {
        scope: await store.scopes.state(Scope.parse(scope), tenant=caller.tenant)
        for scope in sorted({version.scope for version in versions})
    }
    return {
        "object": "list",
        "data": [version.model_dump() | _standing(version, states[version.scope]) for version in versions],
    }


def _standing(version: AdapterVersion, state: ScopeState) -> dict[str, bool]:
    """Whether it serves, and what keeps it from that: it was rolled back, or its files were deleted."""
    name = version.name
    return {"in_use": state.active == name, "barred": name in state.barred, "retired": name in state.retired}


@router.get("/adapters/{name}", summary="One adapter version, with its lineage")
async def adapter(request: Request, name: str, caller: Admin) -> dict[str, Any]:
    """The version's report, and its ancestors down to the base."""
    store = _store(request)
    version = await store.scopes.find(name, tenant=caller.tenant)
    scope = Scope.parse(version.scope)
    state = await store.scopes.state(scope, tenant=caller.tenant)
    lineage, parent = [version.name], version.parent
    while parent != BASE:
        lineage.append(parent)
        parent = (await store.scopes.version(parent, scope, tenant=caller.tenant)).parent
    return version.model_dump() | _standing(version, state) | {"lineage": [*lineage, BASE]}


@router.get("/adapters/{name}/frontier.png", summary="Margin against drift over scales, drawn", response_class=Response)
async def adapter_frontier(request: Request, name: str, caller: Admin) -> Response:
    """What the version's report says of its scales, as a picture."""
    version = await _store(request).scopes.find(name, tenant=caller.tenant)
    return Response(await asyncio.to_thread(frontier.png, version), media_type="image/png")


@router.post("/scopes/{scope:path}/rollback", summary="Go back to an older version")
async def rollback(
    request: Request, scope: str, body: RollbackRequest, caller: Admin, background: BackgroundTasks
) -> dict[str, Any]:
    """In force for the next request on every gateway; streams in flight finish on the version that they began with."""
    parsed = Scope.parse(scope)
    entry = await _store(request).scopes.rollback(
        parsed, tenant=caller.tenant, to=body.to, actor=caller.label, reason=body.reason, now=time.time()
    )
    _moved(request, background, entry, tenant=caller.tenant)
    return entry.model_dump()


@router.post("/scopes/{scope:path}/promote", summary="Put a named version in use")
async def promote(
    request: Request, scope: str, body: PromoteRequest, caller: Admin, background: BackgroundTasks
) -> dict[str, Any]:
    """An admin's decision, which also lifts the bar that a rollback set."""
    parsed = Scope.parse(scope)
    entry = await _store(request).scopes.promote(
        parsed,
        tenant=caller.tenant,
        name=body.version,
        actor=caller.label,
        reason=body.reason,
        now=time.time(),
    )
    _moved(request, background, entry, tenant=caller.tenant)
    return entry.model_dump()


def _moved(request: Request, background: BackgroundTasks, entry: AuditEntry, *, tenant: str) -> None:
    """What follows when the admin has the answer: the version is loaded, and the populations of the scope's users are scored anew."""
    serving: Serving = request.app.state.serving
    scope = Scope.parse(entry.scope)
    if entry.to_version not in (None, BASE):
        background.add_task(serving.engine.preload, entry.to_version, affinity=affinity_of_scope(scope, tenant=tenant))
    background.add_task(score_again, serving.store, serving.settings, scope, tenant=tenant, now=time.time())


@router.post("/consolidations", status_code=202, summary="Start a consolidation")
async def start_consolidation(request: Request, body: ConsolidationRequest, caller: Admin) -> dict[str, Any]:
    """Queue one for a scope; watch it by its id. One at a time per scope."""
    scope = Scope.parse(body.scope)
    jobs: Jobs = request.app.state.jobs
    job, opened = await _store(request).jobs.open(scope, tenant=caller.tenant, unique=uuid.uuid4().hex, now=time.time())
    if not opened:
        raise Conflict(
            f"{scope} is being consolidated: watch {job.id}.", param="scope", code="consolidation_in_progress"
        )
    await jobs.consolidate([job.id])
    return job.model_dump()


@router.post("/consolidations/batch", status_code=202, summary="Start consolidations side by side")
async def start_consolidations(request: Request, body: ConsolidationsRequest, caller: Admin) -> dict[str, Any]:
    """Queue one for each scope, as many in one task as are trained side by side. A scope that is being consolidated keeps its job."""
    serving: Serving = request.app.state.serving
    jobs: Jobs = request.app.state.jobs
    found, new = [], []
    for scope in dict.fromkeys(map(Scope.parse, body.scopes)):
        job, opened = await serving.store.jobs.open(
            scope, tenant=caller.tenant, unique=uuid.uuid4().hex, now=time.time()
        )
        found.append(job)
        if opened:
            new.append(job.id)
    most = serving.settings.scopes_per_job
    for start in range(0, len(new), most):
        await jobs.consolidate(new[start : start + most])
    return {"object": "list", "data": [job.model_dump() for job in found]}


@router.get("/consolidations/{job_id}", summary="Watch a consolidation")
async def consolidation(request: Request, job_id: str, caller: Admin) -> dict[str, Any]:
    """Stage, step of steps, loss, KL and beta while it runs; the decision with its reasons and figures once it has ended."""
    return (await _store(request).jobs.get(job_id, tenant=caller.tenant)).model_dump()


@router.put("/users/{user:path}/cohort", summary="Put a user into a cohort")
async def cohort(request: Request, user: str, body: CohortRequest, caller: Admin) -> dict[str, Any]:
    """The cohort's adapter serves its users who have none of their own."""
    await _store(request).users.set_cohort(body.cohort, tenant=caller.tenant, user=checked_user(user, "user"))
    return {"user": user, "cohort": body.cohort}


@router.get("/audit", summary="Who moved which pointer, when and why")
async def audit(request: Request, caller: Admin, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
    """Newest first."""
    entries = await _store(request).scopes.audit(tenant=caller.tenant, limit=limit)
    return {"object": "list", "data": [entry.model_dump() for entry in entries]}
