"""Adapters whose files are spoilt."""

import shutil
from collections.abc import AsyncIterator

from tests.faults.members import UPSTREAMS, adapter_cache
from tests.faults.people import adapter_folder
from tests.faults.registry import fault
from tests.faults.stack import Stack


@fault("corrupt-adapter")
async def corrupt_adapter(stack: Stack, seconds: float) -> AsyncIterator[None]:
    """One byte of each adapter in the store differs, the upstreams' copies are gone, and both start anew."""
    files = [adapter_folder(stack, name) / "adapter_model.safetensors" for name in stack.adapters]
    true_bytes = [file.read_bytes() for file in files]
    for file, content in zip(files, true_bytes, strict=True):
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for name in UPSTREAMS:
        shutil.rmtree(adapter_cache(name, stack.settings), ignore_errors=True)
    stack.kill(*UPSTREAMS)
    try:
        yield
    finally:
        for file, content in zip(files, true_bytes, strict=True):
            file.write_bytes(content)
