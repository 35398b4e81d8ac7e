"""What a Redis URL stands for."""

from urllib.parse import SplitResult, urlsplit

import pytest

from service.store import redis_urls
from service.store.redis_urls import is_single, taken_apart


def test_a_cluster_is_named_by_some_of_its_nodes() -> None:
    named = taken_apart("redis+cluster://alice:s3cr%40t@a:7000,b,[::1]:7002")
    assert named.hosts == (("a", 7000), ("b", 6379), ("::1", 7002))
    assert named.options == {"username": "alice", "password": "s3cr@t"}


def test_a_url_needs_nothing_of_python_that_its_later_releases_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(url: str) -> SplitResult:
        before = urlsplit(url).netloc.rpartition("@")[2].partition("[")
        assert not (before[1] and before[0]), "Invalid IPv6 URL"
        return urlsplit(url)

    monkeypatch.setattr(redis_urls, "urlsplit", strict)
    assert taken_apart("redis+cluster://a,[::1]:7002?socket_keepalive=yes").hosts == (("a", 6379), ("::1", 7002))
    assert not is_single("redis+cluster://a,[::1]:7002")


def test_sentinels_name_the_primary_and_have_credentials_of_their_own() -> None:
    named = taken_apart("redis+sentinel://:pass@s1,s2:5000/main/2?sentinel_password=other&socket_keepalive=yes")
    assert (named.hosts, named.primary) == ((("s1", 26379), ("s2", 5000)), "main")
    assert named.options == {"password": "pass", "db": 2, "socket_keepalive": True}
    assert named.sentinels_own == {"password": "other"}


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_tls_is_a_scheme_and_its_files_are_options_for_every_node(kind: str) -> None:
    named = taken_apart(f"rediss+{kind}://:pass@a:1/main?ssl_ca_certs=/tls/ca.pem&ssl_check_hostname=no")
    tls = {"ssl": True, "ssl_ca_certs": "/tls/ca.pem", "ssl_check_hostname": False}
    assert named.options == tls | {"password": "pass"}
    assert named.sentinels_own == tls


def test_one_server_is_redis_pys_own_business() -> None:
    assert all(is_single(url) for url in ("redis://a", "rediss://:p@a:1/0", "unix:///run/redis.sock"))
    assert not any(is_single(url) for url in ("redis+cluster://a", "rediss+sentinel://a/main"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+cluster://", "names no host"),
        ("redis+cluster://:pass@", "names no host"),
        ("redis+cluster://:6379", "where a host belongs"),
        ("redis+sentinel://a:26379", "the primary's name"),
        ("redis+ring://a", "none of"),
        ("http+cluster://a", "none of"),
        ("pass+word@a:6379", "none of"),
    ],
)
def test_a_bad_url_is_refused_without_telling_its_password(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        taken_apart(url)
    assert "pass" not in str(refused.value)


def test_a_url_that_is_shown_has_no_password() -> None:
    assert "s3cret" not in repr(taken_apart("redis+sentinel://:s3cret@a/main?sentinel_password=s3cret"))
