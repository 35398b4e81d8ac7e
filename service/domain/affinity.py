"""Which of several vLLM replicas a user's requests go to: the same one each time, for it has the user's adapter and prefixes.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM Transactions on Networking 6(1),
1998): a key's order of the nodes is that of the hashes of (key, node). Whoever computes it finds the same order without asking anybody, and
a node that joins or leaves moves only those keys that it takes or had.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from service.domain.slow_weights import Scope

# Who chats comes again.
CACHED_USERS = 4096


@lru_cache(CACHED_USERS)
def affinity_of(*, tenant: str, user: str) -> str:
    """What stands for a user where requests are told apart by it: opaque, for it is seen outside of this service."""
    return hashlib.sha256(f"affinity\0{tenant}\0{user}".encode()).hexdigest()[:32]


def affinity_of_scope(scope: Scope, *, tenant: str) -> str:
    """Of the user whose scope it is; empty where it has many users, for they are everywhere."""
    return affinity_of(tenant=tenant, user=scope.name) if scope.kind == "user" else ""


def ranked(key: str, nodes: Sequence[str]) -> list[int]:
    """The indices of the nodes in this key's order: the first serves it, the next where that one can't."""
    weights = [_weight(key, node) for node in nodes]
    return sorted(range(len(nodes)), key=weights.__getitem__, reverse=True)


def _weight(key: str, node: str) -> bytes:
    return hashlib.sha256(f"{key}\0{node}".encode()).digest()
