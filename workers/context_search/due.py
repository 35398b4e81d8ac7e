"""Whose contexts are due: found every few seconds on the control queue, and sent to it one by one."""

from service.jobs import Jobs
from service.store import Store

# How long a user who was sent counts as being dealt with: the message, or its worker, may be lost.
SENT_SECONDS = 60.0


async def send_due(store: Store, jobs: Jobs, *, now: float) -> list[tuple[str, str]]:
    """Send an optimization for each (tenant, user) whose time has come."""
    due = await store.optimizations.due(now=now)
    for tenant, user in due:
        await store.optimizations.ask_for(tenant=tenant, user=user, at=now + SENT_SECONDS)
        await jobs.optimize(tenant, user)
    return due
