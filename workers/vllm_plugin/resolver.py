"""Adapter versions by name: a request to vLLM names one as its `model`, and the first such request loads it."""

import hashlib
import logging

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from service.settings import Settings
from workers.adapter_store import AdapterRefused, adapter_store, local_copies
from workers.vllm_plugin.held_copies import HeldCopies

# Below vLLM's own logger, which has the handlers.
logger = logging.getLogger("vllm.fastslow")

NAME = "fastslow"
"""Under which it is registered."""


class StoreResolver(LoRAResolver):
    """Finds versions in the store and hands vLLM a verified copy.

    vLLM asks it under a lock per name, and turns None into a 404.

    Args:
        copies: held for as long as the engine may need them.
        fetch_seconds: longest that a request waits for a copy. The fetch goes on, for the next request.
    """

    def __init__(self, copies: HeldCopies, *, fetch_seconds: float) -> None:
        self.copies = copies
        self._fetch_seconds = fetch_seconds

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The version to load; None if there is none, it fails a check or is not there in time (which is logged)."""
        try:
            folder = await self.copies.taken(lora_name, seconds=self._fetch_seconds)
        except AdapterRefused as refusal:
            logger.error("Adapter %s is not served: %s", lora_name, refusal)
            return None
        except TimeoutError:
            logger.error("Adapter %s is not served yet: it takes over %g s to fetch", lora_name, self._fetch_seconds)
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
    copies = HeldCopies(local_copies(settings), adapter_store(settings))
    LoRAResolverRegistry.register_resolver(NAME, StoreResolver(copies, fetch_seconds=settings.adapter_fetch_seconds))
