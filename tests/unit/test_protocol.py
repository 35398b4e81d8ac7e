"""A reply's head and the first of its body are one write."""

from typing import Any, cast

from service.api.protocol import HeadWithBody

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Transport:
    """Notes what is done to it."""

    def __init__(self) -> None:
        self.done: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("closed")

    def is_closing(self) -> bool:
        return "closed" in self.done


def reply() -> tuple[Transport, HeadWithBody]:
    transport = Transport()
    return transport, HeadWithBody(cast(Any, transport))


def test_the_head_waits_for_the_first_of_the_body_and_nothing_else_waits() -> None:
    transport, written = reply()
    written.write(HEAD)
    assert transport.done == []
    written.write(b"a")
    written.write(b"b")
    written.close()
    assert transport.done == [HEAD + b"a", b"b", "closed"]
    assert written.is_closing()


def test_an_empty_body_sends_the_head() -> None:
    transport, written = reply()
    written.write(HEAD)
    written.write(b"")
    assert transport.done == [HEAD]


def test_the_go_ahead_for_a_body_does_not_wait() -> None:
    transport, written = reply()
    written.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    written.write(HEAD)
    assert transport.done == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    written.write(b"ok")
    assert transport.done[1:] == [HEAD + b"ok"]


def test_of_a_reply_that_breaks_off_before_its_body_the_head_is_told() -> None:
    transport, written = reply()
    written.write(HEAD)
    written.close()
    assert transport.done == [HEAD, "closed"]
