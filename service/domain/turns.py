"""Who is next: the tenants in turn, of each tenant its users in turn, of each user whoever came first."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Things that wait, in lines by tenant and user. A thing waits once at most.

    However many one user (or tenant) has waiting, it gets every n-th turn of n users (or tenants) that wait.
    """

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, thing: T, *, tenant: str, user: str) -> None:
        """Put a thing at the end of its user's line."""
        self._tenants.setdefault(tenant, OrderedDict()).setdefault(user, deque()).append(thing)
        self._count += 1

    def next(self) -> T:
        """Take out the thing whose turn it is.

        Raises:
            IndexError: nothing waits.
        """
        if not self._count:
            raise IndexError("nothing waits")
        tenant, users = next(iter(self._tenants.items()))
        user, line = next(iter(users.items()))
        thing = line.popleft()
        self._tenants.move_to_end(tenant)
        users.move_to_end(user)
        self._tidy(tenant, user)
        return thing

    def remove(self, thing: T, *, tenant: str, user: str) -> None:
        """Take a thing out of its line; one that does not wait is no error."""
        line = self._tenants.get(tenant, OrderedDict()).get(user)
        if line is not None and thing in line:
            line.remove(thing)
            self._tidy(tenant, user)

    def give_way(self, *, tenant: str, user: str) -> T | None:
        """Take out the newest of the longest line, of the tenant with the most; None if that is no more than this user has waiting.

        So a full queue is shared: who comes new finds room by what others have too much of.
        """
        sizes = {name: sum(map(len, users.values())) for name, users in self._tenants.items()}
        giving = max(sizes, key=lambda name: sizes[name], default=tenant)
        if sizes.get(giving, 0) <= sizes.get(tenant, 0) + 1:
            giving = tenant
        lines = self._tenants.get(giving, OrderedDict())
        longest = max(lines, key=lambda name: len(lines[name]), default=None)
        if longest is None or (giving == tenant and len(lines[longest]) <= len(lines.get(user, ())) + 1):
            return None
        thing = lines[longest].pop()
        self._tidy(giving, longest)
        return thing

    def _tidy(self, tenant: str, user: str) -> None:
        """After a thing was taken out of this line."""
        self._count -= 1
        users = self._tenants[tenant]
        if not users[user]:
            del users[user]
        if not users:
            del self._tenants[tenant]
