"""The admin's calls about what new users start from."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from service.api.auth import Caller, admin
from service.api.schemas import COHORT
from service.domain.cold_start import MAX_WRITTEN, ColdStart
from service.domain.slow_weights import Scope
from service.errors import InvalidFields
from service.serving import Serving
from service.store.scopes import AuditEntry

router = APIRouter(prefix="/v1/admin", tags=["admin"])
Admin = Annotated[Caller, Depends(admin)]
# A guideline keeps its first thirty words.
MAX_TEXT_CHARS = 300


class ColdStartRequest(BaseModel):
    """`PUT /v1/admin/cold-start`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    enabled: bool


class GuidelinesRequest(BaseModel):
    """`PUT /v1/admin/guidelines/{scope}`: all that the admin wants of the scope's new users; an empty list takes all back."""

    model_config = ConfigDict(extra="forbid")

    guidelines: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]], Field(max_length=MAX_WRITTEN)
    ]

    @field_validator("guidelines")
    @classmethod
    def _not_blank(cls, texts: list[str]) -> list[str]:
        if any(not text.strip() for text in texts):
            raise ValueError("a guideline is blank")
        return texts


class StartView(BaseModel):
    """One guideline that new users start from."""

    id: str
    text: str
    written: bool
    """By an admin, rather than learnt."""
    users: int
    """For how many users the optimizer kept it."""
    mean: float
    """Posterior mean of its being helpful."""


class ColdStartView(BaseModel):
    """`GET /v1/admin/cold-start`."""

    object: str = "cold_start"
    enabled: bool
    guidelines: dict[str, list[StartView]]
    """By scope. Those that an admin wrote are there even while it is off."""


@router.get("/cold-start", summary="What new users start from")
async def cold_start(request: Request, caller: Admin) -> ColdStartView:
    """Whether the tenant has opted in, and the guidelines of each scope, best first."""
    serving: Serving = request.app.state.serving
    return _view(await serving.store.cold_start.read(tenant=caller.tenant))


@router.put("/cold-start", summary="Opt in or out of cold start")
async def switch(request: Request, body: ColdStartRequest, caller: Admin) -> ColdStartView:
    """On: what users have in common is counted within `cold_start_seconds`, and what an admin wrote is served within seconds. Off: what was
    learnt is forgotten.
    """
    serving: Serving = request.app.state.serving
    before = await serving.store.cold_start.read(tenant=caller.tenant)
    after = before.switched(body.enabled)
    entry = _entry(caller, "cold-start", Scope(kind="global"), "on" if body.enabled else "off")
    await serving.store.cold_start.write(after, before=before, tenant=caller.tenant, audit=entry)
    return _view(after)


@router.put("/guidelines/{scope:path}", summary="Write what new users of a scope start from")
async def guidelines(request: Request, scope: str, body: GuidelinesRequest, caller: Admin) -> ColdStartView:
    """For `cohort:<name>` or `global`. Served to users who have not removed them, for less with each feedback of their own."""
    serving: Serving = request.app.state.serving
    parsed = _shared(scope)
    before = await serving.store.cold_start.read(tenant=caller.tenant)
    after = before.with_written(str(parsed), [serving.tokens.neutralize(text) for text in body.guidelines])
    entry = _entry(caller, "guidelines", parsed, *body.guidelines)
    await serving.store.cold_start.write(after, before=before, tenant=caller.tenant, audit=entry)
    return _view(after)


def _shared(text: str) -> Scope:
    """The scope, if it is one of several users.

    Raises:
        InvalidRequest: it is no scope.
        InvalidFields: it is one user's, or no cohort may have that name.
    """
    scope = Scope.parse(text)
    if scope.kind == "user":
        raise InvalidFields("A user's own guidelines are edited in the user's context.", param="scope")
    if scope.kind == "cohort" and not COHORT.fullmatch(scope.name):
        raise InvalidFields(f"No cohort can have this name: it must match {COHORT.pattern}.", param="scope")
    return scope


def _entry(caller: Caller, action: Any, scope: Scope, *set_to: str) -> AuditEntry:
    return AuditEntry(
        at=time.time(), action=action, tenant=caller.tenant, scope=str(scope), actor=caller.label, set_to=set_to
    )


def _view(state: ColdStart) -> ColdStartView:
    shown = {scope: [StartView(**p.model_dump()) for p in priors] for scope, priors in state.priors.items() if priors}
    return ColdStartView(enabled=state.enabled, guidelines=shown)
