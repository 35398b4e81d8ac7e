"""The admin's calls about KL budgets: how far adapters may drift from the base model, per tenant and per scope."""

import time
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.api.auth import Caller, admin
from service.domain.slow_weights import Scope
from service.serving import Serving
from service.store.budgets import Budgets
from service.store.scopes import AuditEntry

router = APIRouter(prefix="/v1/admin", tags=["admin"])
Admin = Annotated[Caller, Depends(admin)]
# A whole nat per token is another model; a budget beyond it is a typing error.
MAX_NATS = 1.0
Nats = Annotated[float, Field(gt=0, le=MAX_NATS, strict=True)]


class BudgetsRequest(BaseModel):
    """`PUT /v1/admin/budgets` and `PUT /v1/admin/scopes/{scope}/budgets`. A budget that is left out stays; null clears it."""

    model_config = ConfigDict(extra="forbid")

    kl_text_nats: Nats | None = None
    """On plain text outside the chat template, nats per token."""
    kl_chat_nats: Nats | None = None
    """On chat prompts, nats per token."""

    @model_validator(mode="after")
    def _any_budget(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give kl_text_nats, kl_chat_nats or both")
        return self


class BudgetsView(BaseModel):
    """KL budgets in nats per token: what is set here (null: nothing is), and what holds."""

    object: Literal["budgets"] = "budgets"
    scope: str | None
    """null: the tenant's default."""
    own: Budgets
    in_force: Budgets
    """A scope's own, else the tenant's, else the settings'."""


@router.get("/budgets", summary="The tenant's KL budgets")
async def budgets(request: Request, caller: Admin) -> BudgetsView:
    """What holds for the tenant's scopes that have none of their own."""
    return await _view(request, None, caller)


@router.put("/budgets", summary="Set the tenant's KL budgets")
async def set_budgets(request: Request, body: BudgetsRequest, caller: Admin) -> BudgetsView:
    """For consolidations from now on; versions in use stay."""
    return await _set(request, None, body, caller)


@router.get("/scopes/{scope:path}/budgets", summary="A scope's KL budgets")
async def scope_budgets(request: Request, scope: str, caller: Admin) -> BudgetsView:
    """What is set for this scope alone, and what holds for it."""
    return await _view(request, Scope.parse(scope), caller)


@router.put("/scopes/{scope:path}/budgets", summary="Set a scope's KL budgets")
async def set_scope_budgets(request: Request, scope: str, body: BudgetsRequest, caller: Admin) -> BudgetsView:
    """For consolidations from now on; the version in use stays."""
    return await _set(request, Scope.parse(scope), body, caller)


async def _view(request: Request, scope: Scope | None, caller: Caller) -> BudgetsView:
    serving: Serving = request.app.state.serving
    store, settings = serving.store.budgets, serving.settings
    own = await store.read(scope, tenant=caller.tenant)
    set_by_admins = await store.in_force(scope, tenant=caller.tenant) if scope else own
    default = Budgets(kl_text_nats=settings.kl_text_budget_nats, kl_chat_nats=settings.kl_chat_budget_nats)
    return BudgetsView(scope=str(scope) if scope else None, own=own, in_force=set_by_admins.or_else(default))


async def _set(request: Request, scope: Scope | None, body: BudgetsRequest, caller: Caller) -> BudgetsView:
    serving: Serving = request.app.state.serving
    given = body.model_dump(exclude_unset=True)
    entry = AuditEntry(
        at=time.time(),
        action="budgets",
        tenant=caller.tenant,
        scope=str(scope or ""),
        actor=caller.label,
        set_to=tuple(f"{name}={'default' if nats is None else f'{nats:g}'}" for name, nats in given.items()),
    )
    await serving.store.budgets.write(scope, given, tenant=caller.tenant, audit=entry)
    return await _view(request, scope, caller)
