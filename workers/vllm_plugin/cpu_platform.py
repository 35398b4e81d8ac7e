"""vLLM's CPU platform, with adapters applied by `adapter_rows.py` (which vLLM imports once it knows its platform, not before)."""

from vllm.config import VllmConfig
from vllm.platforms import builtin_platform_plugins
from vllm.platforms.cpu import CpuPlatform


class Platform(CpuPlatform):
    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "workers.vllm_plugin.adapter_rows.AdapterRows"

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """The engine computes itself where one process is enough.

        vLLM's own choice has another process compute, for which the engine waits at the cost of a whole core: it spins on shared memory.
        """
        super().check_and_update_config(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"


def register() -> str | None:
    """Entry point of `vllm.platform_plugins`: ours where vLLM runs on the CPU, vLLM's own elsewhere."""
    return f"{__name__}.{Platform.__name__}" if builtin_platform_plugins["cpu"]() else None
