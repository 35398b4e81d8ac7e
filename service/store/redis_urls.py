"""The clients that a Redis URL stands for.

One server: redis://[user][:password]@host:6379/0, rediss:// over TLS, unix:///path.
A cluster: redis+cluster://[user][:password]@host:6379[,host:6379...], rediss+cluster:// over TLS; the nodes named need not be all of them.
Sentinels: redis+sentinel://[user][:password]@sentinel:26379[,sentinel:26379...]/name[/0], rediss+sentinel:// over TLS; `name` is what
the sentinels call the primary, and user and password are its own: theirs are the options sentinel_username and sentinel_password.

Options follow a question mark, as redis-py has them: ?ssl_ca_certs=/etc/tls/ca.pem&ssl_certfile=...&ssl_keyfile=...
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.sentinel import Sentinel

CLUSTER, SENTINEL = "cluster", "sentinel"
PORTS = {CLUSTER: 6379, SENTINEL: 26379}
SENTINELS_OWN = ("sentinel_username", "sentinel_password")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(?=:)", re.IGNORECASE)
PATH = re.compile(r"[/?#]")
"""What ends the hosts of a URL."""


@dataclass(frozen=True)
class RedisUrl:
    """A URL, taken apart."""

    kind: str
    """`cluster`, `sentinel`, or empty for one server."""
    hosts: tuple[tuple[str, int], ...]
    primary: str
    """What sentinels call it."""
    options: dict[str, Any] = field(repr=False)
    """Of connections to where the data is."""
    sentinels_own: dict[str, Any] = field(repr=False)
    """Of connections to the sentinels."""


def taken_apart(url: str) -> RedisUrl:
    """The parts of a URL of a cluster or of sentinels.

    Raises:
        ValueError: it names no host or no primary, or an option that redis-py does not know the value of.
    """
    begins = scheme_of(url)
    scheme, _, kind = begins.partition("+")
    if kind not in PORTS or scheme not in ("redis", "rediss"):
        raise ValueError(f"Redis's URL begins with '{begins}:', which is none of redis, rediss, unix, and "
                         "redis+cluster, redis+sentinel (rediss+... over TLS)")  # fmt: skip
    # Some releases of Python refuse a bracketed address that is not the only host.
    rest = url[len(begins) + 1 :].removeprefix("//")
    netloc = PATH.split(rest, maxsplit=1)[0]
    parts = urlsplit(f"//host{rest[len(netloc) :]}")
    credentials, _, listed = netloc.rpartition("@")
    hosts = tuple(_host(text, PORTS[kind]) for text in listed.split(",") if text)
    if not hosts:
        raise ValueError(f"Redis's URL names no host: {scheme}+{kind}://HOST:PORT")
    primary, _, database = parts.path.strip("/").partition("/") if kind == SENTINEL else ("", "", "")
    if kind == SENTINEL and not primary:
        raise ValueError("the URL of sentinels ends with the primary's name: redis+sentinel://HOST:26379/NAME")
    query = parse_qs(parts.query)
    own = {name.removeprefix("sentinel_"): query.pop(name)[0] for name in SENTINELS_OWN if name in query}
    # redis-py reads credentials and options of a URL of one server.
    single = f"{scheme}://{credentials}{'@' if credentials else ''}host/{database}?{urlencode(query, doseq=True)}"
    options = dict(parse_url(single))
    options.pop("host")
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    return RedisUrl(kind, hosts, primary, options, tls | own)


def _host(text: str, port: int) -> tuple[str, int]:
    named = urlsplit(f"//{text}")
    if named.hostname is None:
        raise ValueError(f"Redis's URL has '{text}' where a host belongs")
    return named.hostname, named.port or port


def scheme_of(url: str) -> str:
    """What a URL begins with, empty where that is no scheme: it could be a password then."""
    found = SCHEME.match(url)
    return found[0].lower() if found else ""


def is_single(url: str) -> bool:
    """Whether a URL stands for one server."""
    return "+" not in scheme_of(url)


def clients(url: str, **options: Any) -> tuple["Redis | RedisCluster", Callable[[], Awaitable[None]]]:
    """The client of a URL, and what closes all that belongs to it.

    Args:
        options: of every connection, by redis-py's names.

    Raises:
        ValueError: as `taken_apart`.
    """
    if is_single(url):
        single = Redis.from_url(url, **options)
        return single, single.aclose
    named = taken_apart(url)
    if named.kind == CLUSTER:
        nodes = [ClusterNode(host, port) for host, port in named.hosts]
        cluster = RedisCluster(startup_nodes=nodes, **options | named.options)
        return cluster, cluster.aclose
    waits = {name: value for name, value in options.items() if name.startswith("socket_") or name == "retry"}
    sentinel = Sentinel(list(named.hosts), sentinel_kwargs=waits | named.sentinels_own)  # type: ignore[no-untyped-call]
    primary = sentinel.master_for(named.primary, **options | named.options)

    async def close() -> None:
        await primary.aclose()
        await sentinel.aclose()

    return primary, close
