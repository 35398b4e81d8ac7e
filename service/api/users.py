"""What the service has learnt of a user."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from service.api.auth import Caller, authenticated, path_user
from service.api.schemas import ContextReply, item_views
from service.domain.feedback import BASE
from service.serving import Serving

router = APIRouter(prefix="/v1/users")


@router.get("/{user:path}/context", summary="A user's fast weights")
async def context(request: Request, user: str, caller: Annotated[Caller, Depends(authenticated)]) -> ContextReply:
    """All items with their counts, and which of them the next chat renders. A user without feedback has none."""
    serving: Serving = request.app.state.serving
    user = path_user(request, caller, user)
    state = await serving.store.users.chat_state(tenant=caller.tenant, user=user)
    adapter, absorbed = await serving.adapter_in_use(state, tenant=caller.tenant) or (BASE, frozenset[str]())
    chosen = serving.context(state.fast_weights, absorbed=absorbed)
    return ContextReply(
        user=user,
        revision=state.fast_weights.revision,
        adapter=adapter,
        tokens=chosen.tokens,
        budget_tokens=serving.settings.context_budget_tokens,
        items=item_views(state.fast_weights, chosen=frozenset(chosen.items), absorbed=absorbed),
    )
