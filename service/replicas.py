"""The vLLM replicas that this process knows: which are well, how long their queues are, and which of them a request goes to.

What a request runs into is noticed at once (a connection that fails, a refusal), the rest by a probe each second. Nothing here ever
refuses a request: a replica in doubt comes last, and is asked where there is no other.
"""

import asyncio
import logging
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import aiohttp

from service.domain.affinity import ranked
from service.errors import EngineUnavailable
from service.settings import Settings
from service.upstream import Reply

log = logging.getLogger(__name__)

EVERY_ADDRESS = "dns+"
"""Before a URL: a replica at each address that its host's name has."""
# A single probe may be lost on a busy machine; after two in a row, what waits for the replica is sent elsewhere.
PROBES_TO_GIVE_UP = 2
# A replica that has refused for overload is passed over until the next look at its queue, or for so long.
BUSY_SECONDS = 1.0
WAITING = re.compile(rb"^vllm:num_requests_waiting\{[^}]*\} (\S+)", re.MULTILINE)


class Replica:
    """One vLLM.

    Args:
        index: its label in metrics; of replicas that come and go, the numbers are used again.
    """

    def __init__(self, url: str, index: int) -> None:
        self.url = url
        self.index = index
        self.in_flight = 0
        """Requests of this process."""
        self.waiting: int | None = None
        """Requests of everybody that wait for their turn, when it was last looked; None where that is not known."""
        self.failures = 0
        """In a row: 0 is well."""
        self.busy_until = 0.0
        self.lacking: dict[str, float] = {}
        """Adapters that it did not have, and until when that is believed."""
        self.answered = 0
        self.failed = 0
        self.passed_over = 0
        """Requests that others got, though they were this one's by affinity."""
        self.under_way: set[Reply] = set()
        """What this process waits for, or reads."""

    def give_up(self) -> None:
        """End what waits for it."""
        for reply in tuple(self.under_way):
            reply.close()

    def lacks(self, model: str, *, seconds: float) -> None:
        """It has just said that it does not know this adapter."""
        now = time.monotonic()
        self.lacking = {name: until for name, until in self.lacking.items() if until > now} | {model: now + seconds}

    def reluctance(self, model: str, *, spill_waiting: int, now: float) -> int:
        """0 where it serves gladly; a replica with more is asked after those with less."""
        if self.failures:
            return 3
        if self.lacking and self.lacking.get(model, 0.0) > now:
            return 2
        return int(self.busy_until > now or (self.waiting or 0) >= spill_waiting)


class Replicas:
    """All of them, and the task that looks after them.

    Args:
        urls: base URLs; one that begins with `dns+` stands for every address of its host.
    """

    def __init__(self, urls: Sequence[str], settings: Settings) -> None:
        self._urls = tuple(urls)
        self._changing = any(url.startswith(EVERY_ADDRESS) for url in urls)
        self._settings = settings
        self._found: dict[str, list[str]] = {}
        self._task: asyncio.Task[None] | None = None
        self.all: list[Replica] = []
        if not self._changing:
            self._take([url.rstrip("/") for url in urls])

    async def known(self) -> list[Replica]:
        """All of them, in no particular order.

        Raises:
            EngineUnavailable: none was found yet, for a name can't be looked up.
        """
        if self._changing and not self.all:
            await self._look_up()
        if len(self.all) > 1 or self._changing:
            self.watch()
        return self.all

    async def order(self, affinity: str, model: str) -> list[Replica]:
        """Where a request goes, and where after that.

        Raises:
            EngineUnavailable: as `known`.
        """
        replicas = await self.known()
        if len(replicas) == 1:
            return replicas
        now, spill = time.monotonic(), self._settings.replica_spill_waiting
        own = [replicas[n] for n in ranked(affinity, [replica.url for replica in replicas])]
        order = sorted(own, key=lambda replica: replica.reluctance(model, spill_waiting=spill, now=now))
        if order[0] is not own[0]:
            own[0].passed_over += 1
        return order

    def watch(self) -> None:
        """Begin to probe, if that has not begun."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._settings.replica_probe_timeout_seconds)
        # A session of its own: probes must not wait behind requests for a connection.
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                begun = time.monotonic()
                if self._changing:
                    with suppress(EngineUnavailable):
                        await self._look_up()
                await asyncio.gather(*(self._probe(replica, http) for replica in self.all))
                await asyncio.sleep(max(0.0, begun + self._settings.replica_probe_seconds - time.monotonic()))

    async def _probe(self, replica: Replica, http: aiohttp.ClientSession) -> None:
        try:
            async with http.get(f"{replica.url}/health") as reply:
                well = reply.status == 200
            problem = "" if well else f"its health check answers {reply.status}"
            if well:
                async with http.get(f"{replica.url}/metrics") as reply:
                    replica.waiting = waiting(await reply.read()) if reply.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = str(error) or type(error).__name__
        if not problem:
            if replica.failures:
                log.warning("the inference server at %s is back", replica.url)
            replica.failures = 0
            replica.busy_until = 0.0
            return
        if not replica.failures:
            log.warning("the inference server at %s does not answer, others get its requests: %s", replica.url, problem)
        replica.failures += 1
        if replica.failures >= PROBES_TO_GIVE_UP and any(not other.failures for other in self.all):
            replica.give_up()

    async def _look_up(self) -> None:
        urls: list[str] = []
        for url in self._urls:
            try:
                self._found[url] = await addresses(url)
            except OSError as error:
                # Those that were there are probed all the same.
                if url not in self._found:
                    raise EngineUnavailable(
                        f"The inference server's name can't be looked up: {url}: {error}"
                    ) from error
            urls += self._found[url]
        self._take(urls)

    def _take(self, urls: Sequence[str]) -> None:
        known = {replica.url: replica for replica in self.all}
        kept = [known[url] for url in dict.fromkeys(urls) if url in known]
        free = iter(sorted(set(range(len(urls))) - {replica.index for replica in kept}))
        for url in dict.fromkeys(urls):
            if url not in known:
                kept.append(Replica(url, next(free)))
        for url in known.keys() - set(urls):
            log.info("the inference server at %s is gone", url)
        self.all = sorted(kept, key=lambda replica: replica.index)


async def addresses(url: str) -> list[str]:
    """The base URLs that one of the settings' stands for.

    Raises:
        OSError: the name of one that begins with `dns+` has no address, or the name server is away.
    """
    if not url.startswith(EVERY_ADDRESS):
        return [url.rstrip("/")]
    parts = urlsplit(url.removeprefix(EVERY_ADDRESS))
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    hosts = {place[0] for *_, place in found}
    return sorted(f"{parts.scheme}://{f'[{host}]' if ':' in str(host) else host}:{parts.port or 80}" for host in hosts)


def waiting(metrics: bytes) -> int | None:
    """Requests that wait, of vLLM's metrics, over all its engines; None where they don't tell."""
    found = WAITING.findall(metrics)
    return int(sum(map(float, found))) if found else None
