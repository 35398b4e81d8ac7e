"""Fixtures that start real servers, once a session."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.replica import Replica, publish_adapter


@pytest.fixture(scope="session")
def vllm_server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """vLLM on the CPU with our plugin, started as `fastslow up` starts it; half a minute or more."""
    replica = Replica(tmp_path_factory.mktemp("vllm"), Path(model_path))
    try:
        replica.wait()
        yield replica
    finally:
        replica.stop()


@pytest.fixture(scope="session")
def seeds() -> "itertools.count[int]":
    return itertools.count(1)


@pytest.fixture
def publish(vllm_server: Replica, seeds: "itertools.count[int]") -> Callable[..., str]:
    """Publishes an adapter version that the replica has not seen; returns its name."""
    return lambda **options: publish_adapter(vllm_server.store, vllm_server.model_path, seed=next(seeds), **options)
