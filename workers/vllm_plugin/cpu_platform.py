"""vLLM's CPU platform, with adapters applied by `adapter_rows.py` (which vLLM imports once it knows its platform, not before).

And with no need of a C++ compiler: vLLM would compile some small functions when they are first used (the ranks of log-probabilities),
and where none is installed, as in a slim image, its engine would die of that.
"""

from vllm.platforms import builtin_platform_plugins
from vllm.platforms.cpu import CpuPlatform


class Platform(CpuPlatform):
    simple_compile_backend = "eager"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "workers.vllm_plugin.adapter_rows.AdapterRows"


def register() -> str | None:
    """Entry point of `vllm.platform_plugins`: ours where vLLM runs on the CPU, vLLM's own elsewhere."""
    return f"{__name__}.{Platform.__name__}" if builtin_platform_plugins["cpu"]() else None
