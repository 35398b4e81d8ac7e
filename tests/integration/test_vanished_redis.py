"""Redis's machine is gone and nobody is told: no connection is closed, nothing is answered. Then there is another at its address."""

from collections.abc import AsyncIterator

import pytest

from service.errors import StoreUnavailable
from service.settings import Settings
from service.store import Store, open_store
from tests.faults.proxy import Proxy, to_port, vanishing
from tests.waiting import until

SECONDS = 1.0


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[Proxy]:
    """Before the real server."""
    proxy = Proxy(to_port(int(redis_url.rsplit(":", 1)[1].partition("/")[0])))
    await proxy.start()
    yield proxy
    await proxy.close()


@pytest.fixture
async def store(settings: Settings, proxy: Proxy) -> AsyncIterator[Store]:
    through = {"redis_url": f"redis://127.0.0.1:{proxy.port}/0", "redis_timeout_seconds": SECONDS}
    store = open_store(settings.model_copy(update=through))
    yield store
    await store.close()


async def serves(store: Store) -> bool:
    try:
        await store.users.chat_state(tenant="acme", user="alice")
    except StoreUnavailable:
        return False
    return True


async def test_connections_that_were_begun_meanwhile_are_given_up(store: Store, proxy: Proxy) -> None:
    async def again() -> bool:
        return await serves(store)

    await until(again)
    proxy.trouble = vanishing
    for _ in range(3):
        assert not await serves(store)
    proxy.trouble = None
    await until(again, what="an answer of the new server")
