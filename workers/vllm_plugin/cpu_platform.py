"""vLLM's CPU platform, with adapters applied by `adapter_rows.py` (which vLLM imports once it knows its platform, not before)."""

from vllm.platforms import builtin_platform_plugins
from vllm.platforms.cpu import CpuPlatform


class Platform(CpuPlatform):
    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "workers.vllm_plugin.adapter_rows.AdapterRows"


def register() -> str | None:
    """Entry point of `vllm.platform_plugins`: ours where vLLM runs on the CPU, vLLM's own elsewhere."""
    return f"{__name__}.{Platform.__name__}" if builtin_platform_plugins["cpu"]() else None
