"""Random adapters of many users, published and in use as if consolidation had made them."""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save

from service.domain.slow_weights import AdapterVersion, Scope, version_name
from service.settings import Settings
from service.store import Store
from tests.adapters import random_lora
from tests.benchmarks.mock_vllm import MODEL
from tests.factories import train_report

RANK = 8
# Where training leaves some 1e-2: the work is an adapter's, the replies are nearly the base's.
B_STD = 2e-4


def write_adapters(store: Path, config: dict[str, int], users: Sequence[str], *, tenant: str) -> list[AdapterVersion]:
    """A random adapter of each user, in the store's folder as consolidation would have published it.

    Args:
        config: of a Llama model, as its config.json.
    """
    versions = []
    for seed, user in enumerate(users):
        weights = save(random_lora(config, rank=RANK, seed=seed, b_std=B_STD), metadata={"format": "pt"})
        sha256, scope = hashlib.sha256(weights).hexdigest(), Scope(kind="user", name=user)
        version = AdapterVersion(
            name=version_name(scope, tenant=tenant, number=1, content_sha256=sha256),
            tenant=tenant,
            scope=str(scope),
            number=1,
            base_model=MODEL,
            base_sha256="0" * 64,
            content_sha256=sha256,
            created=time.time(),
            job="bench",
            watermark={},
            report=train_report(),
        )
        folder = store / version.name
        folder.mkdir(parents=True)
        targets = Settings.model_fields["lora_target_modules"].default
        peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text(json.dumps(peft | {"target_modules": list(targets)}))
        (folder / "provenance.json").write_text(version.model_dump_json())
        versions.append(version)
    return versions


async def put_in_use(store: Store, versions: Sequence[AdapterVersion]) -> None:
    """Promote each version in its scope, by a job that ends at once."""
    for version in versions:
        scope, now = Scope.parse(version.scope), time.time()
        job, _ = await store.jobs.open(scope, tenant=version.tenant, unique=uuid.uuid4().hex, now=now)
        await store.jobs.acquire(job, token="bench", lease_seconds=60)
        done = job.model_copy(update={"state": "promoted", "version": version.name})
        ended = await store.jobs.finish(done, token="bench", attempted=None, version=version)
        if ended != "ok":
            raise RuntimeError(f"{version.name} can't be put in use: {ended}")
