"""Fixtures that start real servers, once a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.replica import Replica


@pytest.fixture(scope="session")
def vllm_server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """vLLM on the CPU with our plugin, started as `fastslow up` starts it; half a minute or more."""
    replica = Replica(tmp_path_factory.mktemp("vllm"), Path(model_path))
    try:
        replica.wait()
        yield replica
    finally:
        replica.stop()
