"""What the users of the benchmarks say, and calls of the API one at a time, for setting up and for checking."""

import http.client
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.benchmarks.load import http_request
from tests.benchmarks.mock_vllm import MODEL

COMMENTS = (
    "Keep it under three sentences.",
    "Name the street or the bridge, never just left and right.",
    "I am on foot and have a pram with me, so no stairs please.",
    "Give distances in metres.",
    "Don't apologise and don't ask whether that helps.",
)
QUESTIONS = (
    "How do I get from the market to the harbour?",
    "Where can I buy a ticket for the ferry?",
    "Which tram goes to the hospital on a Sunday?",
    "Is there a pharmacy near the town hall that is open late?",
    "What is the quickest way to the swimming pool?",
)
WANTED = (
    "Down Mill Street, 400 metres, then over Swan Bridge: the harbour is in front of you.",
    "At the kiosk on Pier 2, 150 metres from the fish market; it opens at six.",
    "Tram 4 from Cathedral Square, every 20 minutes; the stop at the hospital has a ramp.",
    "The one in Weaver Lane, 250 metres from the town hall, is open until ten.",
    "Along Canal Street for 600 metres, then right into Bath Lane; the door without stairs is at the back.",
)
SYSTEM = (
    "You are the guide of a small town. You know its streets, trams, shops and offices, and answer what visitors ask."
)
COUNTER = b"00000000"
CHAT = "/v1/chat/completions"


def headers(key: str, user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "X-User-ID": user, "Content-Type": "application/json"}


def conversation(question: str) -> list[dict[str, str]]:
    """A system text, one turn that went before, and the question."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Good morning! We have just got off the train and don't know our way about."},
        {
            "role": "assistant",
            "content": "Good morning, and welcome. The tourist office is in the station's left wing.",
        },
        {"role": "user", "content": question},
    ]


def chat_requests(
    key: str, user: str, numbers: Iterator[int], *, stream: bool, path: str = CHAT, other: Mapping[str, Any] = {}
) -> Iterator[bytes]:
    """Chats without end, prebuilt but for a number in the last message: its tokens are counted anew each time, as in life.

    Args:
        other: fields of the body that differ, or that come on top.
    """
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": conversation(f"{QUESTIONS[0]} I have ticket {COUNTER.decode()}."),
    }
    body |= {"max_tokens": 64, "temperature": 0.7} | ({"stream": True} if stream else {}) | other
    encoded = json.dumps(body, separators=(",", ":")).encode()
    before, after = http_request("POST", path, headers(key, user), encoded).split(COUNTER)
    return (b"%b%08d%b" % (before, n, after) for n in numbers)


def said(n: int) -> dict[str, Any]:
    """The n-th feedback of a session: ratings, comments and corrections in turn, no two the same."""
    kinds: tuple[dict[str, Any], ...] = (
        {"rating": n % 2 == 0},
        {"comment": f"{COMMENTS[n % len(COMMENTS)]} Remember route {n}."},
        {"correction": f"{WANTED[n % len(WANTED)]} That is route {n}."},
    )
    return kinds[n % len(kinds)]


class Caller:
    """The API, one call at a time."""

    def __init__(self, port: int, key: str, *, timeout_seconds: float = 10) -> None:
        self._port = port
        self._key = key
        self._timeout_seconds = timeout_seconds

    def call(
        self, method: str, path: str, user: str, body: object = None
    ) -> tuple[dict[str, Any], http.client.HTTPMessage]:
        """The reply and its headers; anything but 200 is an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout_seconds)
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers(self._key, user))
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        if reply.status != 200:
            raise RuntimeError(f"{method} {path}: {reply.status} {content!r}")
        return json.loads(content), reply.headers

    def chat(self, user: str, question: str) -> tuple[dict[str, Any], http.client.HTTPMessage]:
        return self.call("POST", CHAT, user, {"model": MODEL, "messages": conversation(question)})

    def overhead_ms(self, user: str, question: str) -> float:
        """The gateway's own part of a chat, as it tells it in the reply's header."""
        return float(self.chat(user, question)[1]["x-fastslow-overhead-ms"])

    def teach(self, user: str) -> int:
        """Give the user a context of all comments and corrections above; its size in tokens."""
        for comment, question, wanted in zip(COMMENTS, QUESTIONS, WANTED, strict=True):
            reply, _ = self.chat(user, question)
            said = {"interaction_id": reply["id"], "comment": comment, "correction": wanted, "rating": 0.5}
            self.call("POST", "/v1/feedback", user, said)
        context, _ = self.call("GET", f"/v1/users/{user}/context", user)
        assert sum(item["in_context"] for item in context["items"]) == len(COMMENTS) + len(WANTED), context
        return int(context["tokens"])


def numbers() -> Iterator[int]:
    """Eight digits each."""
    return itertools.count(10_000_000)
