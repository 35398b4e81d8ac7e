"""Where Celery's messages go, by the settings: a Redis (the store's own, or another) or RabbitMQ.

A message is only a hint: what is due and which jobs are open lies in the store, and a sweep sends again what a lost broker forgot. So the
broker may be a single server where the store is a Redis Cluster or is watched by sentinels.
"""

from dataclasses import dataclass, field
from typing import Any

from service.settings import Settings
from service.store.redis_urls import scheme_of

REDIS, RABBITMQ = ("redis", "rediss"), ("amqp", "amqps", "pyamqp")
KEY_PREFIX = "fs:celery:"


@dataclass(frozen=True)
class Broker:
    """What Celery is told."""

    url: str
    transport: dict[str, Any]
    """Options of the connection."""
    queue: dict[str, Any] = field(default_factory=dict)
    """Arguments of each queue."""
    schedule_url: str = ""
    """The Redis that has the schedule and its lock."""


def broker(settings: Settings) -> Broker:
    """The broker of these settings.

    Raises:
        ValueError: its URL is neither a single Redis's nor RabbitMQ's, or no single Redis is left for the schedule.
    """
    url = settings.broker_url or settings.effective_redis_url
    # A message that nobody has acknowledged for so long is handed out again, so no job may take as long.
    unacknowledged_seconds = settings.job_limit_seconds * 2
    if scheme_of(url) in REDIS:
        transport = {
            "global_keyprefix": KEY_PREFIX,
            "visibility_timeout": unacknowledged_seconds,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
        }
        return Broker(url, transport, schedule_url=url)
    if scheme_of(url) not in RABBITMQ:
        raise ValueError(
            f"FASTSLOW_BROKER_URL must be a single Redis (redis://, rediss://) or RabbitMQ (amqp://), and it is '{scheme_of(url)}:': "
            "Celery has no transport for a Redis Cluster."
        )
    if scheme_of(settings.effective_redis_url) not in REDIS:
        raise ValueError(
            "With RabbitMQ as FASTSLOW_BROKER_URL the schedule needs a single Redis, and FASTSLOW_REDIS_URL is none: use a single "
            "Redis as the broker."
        )
    # RabbitMQ's own limit for an acknowledgement is half an hour.
    queue = {"x-consumer-timeout": unacknowledged_seconds * 1000}
    return Broker(url, {"confirm_publish": True}, queue, schedule_url=settings.effective_redis_url)
