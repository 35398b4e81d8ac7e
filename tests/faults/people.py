"""The users of a trial, their adapter versions, and what is stored of them afterwards."""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from service.domain.events import Event
from service.domain.feedback import BASE
from service.domain.slow_weights import AdapterVersion, Scope, version_name
from service.store.keys import UserKeys
from tests.factories import train_report
from tests.faults.checks import Person
from tests.faults.stack import TENANTS, Stack
from workers.archive import archived

# Larger than what a full disk still takes (`kinds/disk.py`).
WEIGHTS_BYTES = 262_144


async def people(stack: Stack, *, trial: str, count: int) -> list[Person]:
    """New users of two tenants; every other one has an adapter."""
    found = []
    stack.adapters.clear()
    for n in range(count):
        tenant, name = TENANTS[n // 2 % len(TENANTS)], f"{trial}-{n}"
        adapter = await _adapter(stack, tenant=tenant, user=name) if n % 2 == 0 and not stack.layout.real_vllm else BASE
        found.append(Person(tenant, name, f"zq{uuid.uuid4().hex[:12]}", adapter))
    return found


async def stored(stack: Stack, persons: Sequence[Person]) -> dict[Person, list[Event]]:
    """Each user's whole log, what was archived of it included."""
    found = {}
    for person in persons:
        # The log first: what is moved meanwhile is then found twice, and not missed.
        log = await stack.store.users.events(tenant=person.tenant, user=person.name)
        folder = stack.settings.archive / UserKeys(tenant=person.tenant, user=person.name).folder
        old = list(archived(folder)) if folder.is_dir() else []
        by_revision = {event.revision: event for event in (*old, *log)}
        found[person] = [by_revision[revision] for revision in sorted(by_revision)]
    return found


def adapter_folder(stack: Stack, name: str) -> Path:
    """Where a version is published."""
    store = stack.settings.adapter_store_dir
    assert store is not None, "the suite's store is a folder"
    return store / name


async def _adapter(stack: Stack, *, tenant: str, user: str) -> str:
    """Publish and promote a version of the user's own, whose weights are noise; its name."""
    scope, weights = Scope(kind="user", name=user), hashlib.shake_256(user.encode()).digest(WEIGHTS_BYTES)
    sha256 = hashlib.sha256(weights).hexdigest()
    name = version_name(scope, tenant=tenant, number=1, content_sha256=sha256)
    folder = adapter_folder(stack, name)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text("{}")
    base_model = stack.settings.model_name
    (folder / "provenance.json").write_text(
        json.dumps({"name": name, "base_model": base_model, "content_sha256": sha256})
    )
    jobs, now = stack.store.jobs, time.time()
    job, _ = await jobs.open(scope, tenant=tenant, unique=uuid.uuid4().hex, now=now)
    version = AdapterVersion(
        name=name, tenant=tenant, scope=str(scope), number=1, parent=BASE, base_model=base_model, base_sha256="0" * 64,
        content_sha256=sha256, created=now, job=job.id, watermark={}, report=train_report(),
    )  # fmt: skip
    ended = job.model_copy(update={"state": "promoted", "version": name})
    outcome = await jobs.finish(ended, token="the suite", attempted=None, version=version)
    assert outcome == "ok", outcome
    stack.adapters.append(name)
    return name
