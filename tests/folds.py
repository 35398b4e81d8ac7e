"""Cached folds that are lost."""

from redis import Redis

from service.store.keys import UserKeys


def lose_fold(redis_url: str, *, tenant: str = "acme", user: str = "alice") -> None:
    """The cached fold is gone, and no process takes the one that it knows for the newest: the log must be folded again."""
    keys = UserKeys(tenant=tenant, user=user)
    with Redis.from_url(redis_url) as redis:
        assert redis.delete(keys.state) == 1
        redis.hset(keys.user, "head", "moved")
