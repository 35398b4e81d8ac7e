"""Limits by tenant and user, and how waits are told."""

import pytest
from pydantic import ValidationError

from service.api.admission import rate_limit_headers
from service.domain.rate_limits import RateLimits, spelled
from service.errors import RateLimited
from service.keys import Keys, new_keys
from service.store.rate_limits import Bucket


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-1, "0s"), (0, "0s"), (0.0123, "13ms"), (0.8, "800ms"), (1, "1s"), (1.5, "1.5s"), (12.3456, "12.346s"),
        (60, "1m0s"), (359.2, "6m0s"), (3601, "60m1s"),
    ],
)  # fmt: skip
def test_a_wait_is_told_as_openai_does(seconds: float, told: str) -> None:
    assert spelled(seconds) == told


def test_a_tenants_own_limits_go_before_the_defaults_where_it_has_them() -> None:
    default = RateLimits(tenant_chats_per_minute=100, user_chats_per_minute=10)
    own = RateLimits.model_validate({"user_chats_per_minute": 0, "user_tokens_per_minute": 500})
    mixed = default.overridden(own)
    assert (mixed.most("chats", of="tenant"), mixed.most("chats", of="user")) == (100, 0)
    assert (mixed.most("tokens", of="user"), mixed.most("feedback", of="user")) == (500, 0)
    assert default.overridden(None) == default


def test_limits_of_tenants_live_in_the_keys_file_and_a_misspelt_one_is_refused() -> None:
    kept = new_keys().model_copy(update={"limits": {"acme": RateLimits(user_chats_per_minute=3)}})
    assert Keys.model_validate_json(kept.model_dump_json()) == kept
    with pytest.raises(ValidationError):
        Keys.model_validate(new_keys().model_dump() | {"limits": {"acme": {"chats_per_minute": 3}}})
    with pytest.raises(ValidationError):
        RateLimits(user_chats_per_minute=-1)


def test_headers_tell_of_the_bucket_with_less_left() -> None:
    roomy, tight = (Bucket(False, limit, left, 6.0, 0.0) for limit, left in ((100, 60), (10, 2)))
    headers = rate_limit_headers({("tenant", "chats"): roomy, ("user", "chats"): tight, ("user", "tokens"): roomy})
    assert headers == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "6s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "6s",
    }


def test_a_request_that_never_fits_is_not_to_be_sent_again() -> None:
    never = RateLimited("too long", kind="tokens", retry_after_seconds=None)
    later = RateLimited("too many", kind="requests", retry_after_seconds=7)
    assert (never.status, never.headers()) == (429, {"x-should-retry": "false"})
    assert later.headers() == {"Retry-After": "7"}
    assert later.body()["error"] == {
        "message": "too many", "type": "requests", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip
