"""Where Celery's messages go, and what makes them safe there."""

import pytest

from service.broker import broker
from service.jobs import CONSOLIDATE, CONSOLIDATE_QUEUE, CONTROL_QUEUE, SWEEP, celery_app
from service.settings import Settings

CLUSTER = "redis+cluster://a:6379,b:6379"


def settings(**given: object) -> Settings:
    return Settings(_env_file=None, **given)


@pytest.mark.parametrize("given", [{}, {"broker_url": "amqp://user:secret@rabbit//"}], ids=["redis", "rabbitmq"])
def test_a_worker_takes_one_message_at_a_time_and_gives_it_back_when_it_dies(given: dict[str, object]) -> None:
    app = celery_app(settings(**given))
    assert app.conf.worker_prefetch_multiplier == 1
    assert app.conf.task_acks_late is True
    assert app.conf.task_reject_on_worker_lost is True
    assert app.conf.task_ignore_result is True
    assert set(app.amqp.queues) == {CONTROL_QUEUE, CONSOLIDATE_QUEUE}
    for task, queue in ((SWEEP, CONTROL_QUEUE), (CONSOLIDATE, CONSOLIDATE_QUEUE)):
        found = app.amqp.router.route({}, task)["queue"]
        # A direct exchange of its own: what is sent to one queue is seen by no other.
        assert (found.name, found.exchange.name, found.exchange.type, found.routing_key) == (
            queue,
            queue,
            "direct",
            queue,
        )


@pytest.mark.parametrize("job_limit_seconds", [60, 3600, 86400])
def test_no_broker_hands_a_message_out_again_while_the_longest_job_runs(job_limit_seconds: int) -> None:
    on_redis = broker(settings(job_limit_seconds=job_limit_seconds))
    assert on_redis.transport["visibility_timeout"] > job_limit_seconds
    on_rabbitmq = broker(settings(job_limit_seconds=job_limit_seconds, broker_url="amqp://rabbit"))
    assert on_rabbitmq.queue["x-consumer-timeout"] > job_limit_seconds * 1000
    queues = celery_app(settings(job_limit_seconds=job_limit_seconds, broker_url="amqp://rabbit")).amqp.queues
    assert all(queue.queue_arguments == on_rabbitmq.queue for queue in queues.values())


def test_the_broker_and_the_schedule_are_at_the_stores_redis_unless_told_otherwise() -> None:
    same = broker(settings(redis_url="rediss://:secret@store:6380/1"))
    assert (same.url, same.schedule_url) == ("rediss://:secret@store:6380/1",) * 2
    other = broker(settings(redis_url=CLUSTER, broker_url="redis://broker:6379/0"))
    assert (other.url, other.schedule_url) == ("redis://broker:6379/0",) * 2
    rabbit = broker(settings(redis_url="redis://store:6379/0", broker_url="amqp://rabbit//"))
    assert (rabbit.url, rabbit.schedule_url) == ("amqp://rabbit//", "redis://store:6379/0")
    assert celery_app(settings(result_url="redis://results:6379/3")).conf.result_backend == "redis://results:6379/3"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"redis_url": CLUSTER}, "must be a single Redis"),
        ({"redis_url": "redis+sentinel://a:26379/main"}, "must be a single Redis"),
        ({"broker_url": "sqs://x"}, "must be a single Redis"),
        ({"redis_url": CLUSTER, "broker_url": "amqp://rabbit"}, "the schedule needs a single Redis"),
    ],
)
def test_what_can_not_carry_messages_is_refused_with_what_to_do(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        broker(settings(**given))
