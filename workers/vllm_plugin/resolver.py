"""Adapter versions by name: a request to vLLM names one as its `model`, and the first such request loads it."""

import asyncio
import hashlib
import logging
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from service.settings import Settings
from workers.vllm_plugin.local_copy import AdapterRefused, local_copy

# Below vLLM's own logger, which has the handlers.
logger = logging.getLogger("vllm.fastslow")


class StoreResolver(LoRAResolver):
    """Finds versions in the store's folder and hands vLLM a verified copy.

    vLLM asks it under a lock per name, and turns None into a 404.
    """

    def __init__(self, *, store: Path, cache: Path, base_model: str) -> None:
        self._store = store
        self._cache = cache
        self._base_model = base_model

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The version to load; None if there is none or it fails a check (which is logged)."""
        try:
            folder = await asyncio.to_thread(
                local_copy, lora_name, store=self._store, cache=self._cache, base_model=self._base_model
            )
        except AdapterRefused as refusal:
            logger.error("Adapter %s is not served: %s", lora_name, refusal)
            return None
        if folder is None:
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=stable_id(lora_name), lora_path=str(folder))


def stable_id(name: str) -> int:
    """A positive 31-bit id for a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1 or 1


def register() -> None:
    """Entry point of `vllm.general_plugins`: adapter names resolve to versions in the store."""
    settings = Settings()
    resolver = StoreResolver(
        store=settings.adapter_store_dir, cache=settings.adapter_cache, base_model=settings.model_name
    )
    LoRAResolverRegistry.register_resolver("fastslow", resolver)
