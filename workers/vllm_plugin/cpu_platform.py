"""vLLM's CPU platform, with adapters applied by `adapter_rows.py` (which vLLM imports once it knows its platform, not before).

And with no need of a C++ compiler: vLLM has some small functions compiled when they are first used (the ranks of log-probabilities), and
where none is installed, as in a slim image, its engine would die of that. There they run as they are written.
"""

import os
import shutil
import sysconfig
from pathlib import Path

from vllm.platforms import builtin_platform_plugins
from vllm.platforms.cpu import CpuPlatform


def compile_backend() -> str:
    """torch.compile's `inductor` where it finds what it compiles with, else `eager`."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "inductor" if compiler and header.is_file() else "eager"


class Platform(CpuPlatform):
    simple_compile_backend = compile_backend()

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "workers.vllm_plugin.adapter_rows.AdapterRows"


def register() -> str | None:
    """Entry point of `vllm.platform_plugins`: ours where vLLM runs on the CPU, vLLM's own elsewhere."""
    return f"{__name__}.{Platform.__name__}" if builtin_platform_plugins["cpu"]() else None
