"""The admin's calls about norms: what the replies to a scope's users should be like."""

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, field_validator

from service.api.auth import Caller, admin, checked_user
from service.api.schemas import COHORT
from service.domain.norms import CHECKERS, Norm, checked
from service.domain.slow_weights import Scope
from service.errors import InvalidFields
from service.serving import Serving
from service.store.norms import parsed
from service.store.scopes import AuditEntry
from service.verifiers.norms import findings

# As long as any norm waits for before it looks.
LONG_REPLY = "Rain is water that falls from clouds. " * 60

router = APIRouter(prefix="/v1/admin", tags=["admin"])
Admin = Annotated[Caller, Depends(admin)]


class NormFields(Norm):
    """One norm of `PUT /v1/admin/scopes/{scope}/norms`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NormsRequest(BaseModel):
    """`PUT /v1/admin/scopes/{scope}/norms`: all that holds for the scope from now on; an empty list removes them."""

    model_config = ConfigDict(extra="forbid")

    norms: list[NormFields]

    @field_validator("norms")
    @classmethod
    def _together(cls, norms: list[NormFields]) -> list[NormFields]:
        checked(norms)
        return norms


class NormsView(BaseModel):
    """`GET /v1/admin/scopes/{scope}/norms`."""

    object: Literal["norms"] = "norms"
    scope: str
    norms: list[Norm]
    """The scope's own. Those of the user's cohort and of `global` hold for a user besides."""


@router.get("/norms", summary="All norms, and what kinds there are")
async def all_norms(request: Request, caller: Admin) -> dict[str, Any]:
    """The norms of each scope that has any, and the arguments of each checker as a JSON schema."""
    serving: Serving = request.app.state.serving
    stored = await serving.store.norms.all(tenant=caller.tenant)
    return {
        "object": "norms",
        "scopes": {scope: [n.model_dump() for n in parsed(stored, [scope])] for scope in sorted(stored)},
        "checkers": {name: checker.arguments.model_json_schema() for name, checker in CHECKERS.items()},
    }


@router.get("/scopes/{scope:path}/norms", summary="A scope's norms")
async def norms(request: Request, scope: str, caller: Admin) -> NormsView:
    """What an admin has set for this scope itself."""
    serving: Serving = request.app.state.serving
    parsed_scope = _scope(scope)
    found = await serving.store.norms.of(tenant=caller.tenant, scopes=[parsed_scope])
    return NormsView(scope=str(parsed_scope), norms=list(found))


@router.put("/scopes/{scope:path}/norms", summary="Set a scope's norms")
async def set_norms(request: Request, scope: str, body: NormsRequest, caller: Admin) -> NormsView:
    """Replaces the list. They count in the scope's consolidations and in their gate, and in `fastslow_norm_checks_total`, within seconds
    on every gateway.
    """
    serving: Serving = request.app.state.serving
    parsed_scope = _scope(scope)
    # What can't be checked here must not be promised, and some packages are imported at a first check only. That takes a second.
    await asyncio.to_thread(findings, body.norms, "What is rain?", LONG_REPLY)
    entry = AuditEntry(
        at=time.time(),
        action="norms",
        tenant=caller.tenant,
        scope=str(parsed_scope),
        actor=caller.label,
        set_to=tuple(f"{norm.name}: {norm.text}" for norm in body.norms),
    )
    await serving.store.norms.write(body.norms, scope=parsed_scope, tenant=caller.tenant, audit=entry)
    return NormsView(scope=str(parsed_scope), norms=list(body.norms))


def _scope(text: str) -> Scope:
    """The scope, if it may be anybody's.

    Raises:
        InvalidRequest: it is no scope, or no user may have that id.
        InvalidFields: no cohort may have that name.
    """
    scope = Scope.parse(text)
    if scope.kind == "user":
        checked_user(scope.name, "scope")
    if scope.kind == "cohort" and not COHORT.fullmatch(scope.name):
        raise InvalidFields(f"No cohort can have this name: it must match {COHORT.pattern}.", param="scope")
    return scope
