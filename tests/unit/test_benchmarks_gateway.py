"""The gateway benchmark asks every target alike, checks what it is answered, and adds up what belongs together."""

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks import peers, processes
from tests.benchmarks.gateway_report import CONNECTIONS, Measured, draw, line
from tests.benchmarks.mock_vllm import STREAM, TEXT
from tests.benchmarks.passthrough import SERVED, UPSTREAM
from tests.benchmarks.stats import Round
from tests.benchmarks.targets import DIRECT, FULL, OFF, PASSTHROUGH, Target, streamed_text

EVENT = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n'
P50_MS = {DIRECT: 5.0, PASSTHROUGH: 6.0, "LiteLLM": 25.0, OFF: 7.0, FULL: 7.5}


@pytest.fixture
def cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


@pytest.fixture
def upstream(tmp_path: Path, cores: frozenset[int]) -> Iterator[processes.Service]:
    with processes.mock_vllm(tmp_path, cores=cores) as started:
        yield started


def measured(targets: list[str]) -> Measured:
    """Two repeats; the second on a machine that is twice as slow. More connections, more replies; a stream takes 10 ms longer."""
    found = Measured(targets, context_tokens=341)
    for stream in (False, True):
        for connections in CONNECTIONS:
            for target in targets:
                rounds = []
                for slower in (1, 2):
                    seconds = (P50_MS[target] + 10 * stream) * slower / 1000
                    rounds.append(Round(connections / slower, (seconds,) * 100 * connections, (seconds / 2,) * 100))
                found.rounds[stream, connections, target] = rounds
                found.cpu_ms[stream, connections, target] = [0.5, 0.7]
    return found


def test_added_latency_is_that_of_one_connection_against_direct_in_the_same_repeat() -> None:
    found = measured(list(P50_MS))
    assert found.added_ms("LiteLLM", 0.50) == pytest.approx((20 + 40) / 2)
    assert found.added_ms(PASSTHROUGH, 0.99, stream=True, connections=16) == pytest.approx((1 + 2) / 2)
    assert found.first_byte_added_ms(OFF) == pytest.approx((1 + 2) / 2)


def test_throughput_is_the_best_number_of_connections() -> None:
    found = measured(list(P50_MS))
    found.rounds[False, 16, "LiteLLM"] = [Round(1.0, (0.1,) * 900, (0.1,))] * 2
    assert found.rps("LiteLLM") == 900
    assert found.rps("LiteLLM", stream=True) == 150


def test_the_line_names_every_peer_that_was_measured_and_no_other() -> None:
    told = json.loads(
        line(measured([DIRECT, PASSTHROUGH, "LiteLLM", FULL]), overhead_header_ms=1.5, told={"cores": ""})
    )
    assert list(told["peers"]) == [PASSTHROUGH, "LiteLLM"]
    assert {"rps", "added_p50_ms", "rps_stream"} < set(told["peers"]["LiteLLM"])
    assert told["added_p50_ms"] == pytest.approx(3.75)
    assert told["rps_ratio_passthrough"] == 1.0


def test_a_picture_is_drawn_of_whatever_was_measured(tmp_path: Path) -> None:
    for targets in ([DIRECT, PASSTHROUGH, FULL], list(P50_MS)):
        draw(measured(targets), tmp_path / "gateway.png")
        assert (tmp_path / "gateway.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "gateway.png").unlink()


def test_a_stream_says_what_its_pieces_say() -> None:
    assert streamed_text(EVENT % b"two " + EVENT % b"mills" + b": a comment\n\ndata: [DONE]\n\n") == "two mills"


def test_the_mocks_stream_says_its_text() -> None:
    raw = b"".join(STREAM).partition(b"\r\n\r\n")[2]
    assert streamed_text(b"\n".join(line for line in raw.splitlines() if line.startswith(b"data"))) == TEXT


@pytest.mark.parametrize(
    "content",
    [
        EVENT % b"two",
        b'data: {"error":{"message":"no"}}\n\ndata: [DONE]\n\n',
        b"data: nothing\n\ndata: [DONE]\n\n",
        b"",
    ],
)
def test_a_broken_stream_or_an_error_in_it_is_no_reply(content: bytes) -> None:
    with pytest.raises((LookupError, ValueError)):
        streamed_text(content)


@pytest.mark.parametrize("stream", [False, True])
def test_a_target_says_what_the_upstream_said_through_a_gateway(
    upstream: processes.Service, tmp_path: Path, cores: frozenset[int], stream: bool
) -> None:
    env = {UPSTREAM: f"http://127.0.0.1:{upstream.port}"}
    with processes.uvicorn(SERVED, tmp_path, cores=cores, env=env) as bare:
        assert Target(bare, "key").says("And the station?", stream=stream)[0] == TEXT


def test_what_differs_for_a_target_is_in_its_requests(upstream: processes.Service) -> None:
    target = Target(upstream, "key", path="/openai/v1/chat/completions", body={"model": "other::name"})
    head, _, body = next(target.requests(17, iter([12345678]), stream=True)).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /openai/v1/chat/completions ")
    assert b"X-User-ID: user-1\r\n" in head
    assert json.loads(body)["model"] == "other::name"
    assert json.loads(body)["stream"] is True
    assert json.loads(body)["messages"][-1]["content"].endswith("12345678.")


def test_a_server_that_ends_at_once_is_not_waited_for(tmp_path: Path, cores: frozenset[int]) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.mock_vllm", "no port"]
    with (
        pytest.raises(processes.NotReady, match=r"(?s)the mock ended.*no port"),
        processes.server(
            "the mock", command, port=processes.free_port(), path=None, folder=tmp_path, cores=cores, env={}
        ),
    ):
        pass


class Planted(peers.Peer):
    """A peer that needs no packages: whatever listens on a port."""

    name = "Planted"
    requirements = ()

    def __init__(self, service: processes.Service, path: str) -> None:
        self._target = Target(service, "key", path=path)

    @contextmanager
    def serving(self, python: Path, folder: Path, *, cores: frozenset[int], upstream_port: int) -> Iterator[Target]:
        assert python.is_relative_to(folder.parent)
        yield self._target


def made_before(home: Path) -> Path:
    """An environment's folder that says that it is complete."""
    folder = home / "planted"
    folder.mkdir()
    (folder / ".installed").write_text("")
    return folder


def test_a_peer_that_answers_as_the_upstream_is_measured(
    upstream: processes.Service, tmp_path: Path, cores: frozenset[int]
) -> None:
    made_before(tmp_path)
    peer, console = Planted(upstream, "/v1/chat/completions"), Console(file=io.StringIO())
    with peers.serving(
        peer, tmp_path / "run", console, home=tmp_path, cores=cores, upstream_port=upstream.port
    ) as target:
        assert target.service == upstream


def test_a_peer_that_answers_something_else_is_not(
    upstream: processes.Service, tmp_path: Path, cores: frozenset[int]
) -> None:
    made_before(tmp_path)
    env, console = {UPSTREAM: f"http://127.0.0.1:{upstream.port}"}, Console(file=io.StringIO())
    with processes.uvicorn(SERVED, tmp_path, cores=cores, env=env) as bare:
        serving = peers.serving(
            Planted(bare, "/no/such/path"), tmp_path / "run", console, home=tmp_path, cores=cores, upstream_port=0
        )
        with pytest.raises(processes.NotReady, match=r"Planted does not answer.*404"), serving:
            pass


def test_an_environment_of_the_same_versions_is_used_again(tmp_path: Path, upstream: processes.Service) -> None:
    folder = made_before(tmp_path)
    (folder / "kept").touch()
    peers.environment(Planted(upstream, "/"), tmp_path, Console(file=io.StringIO()))
    assert (folder / "kept").exists()


def test_a_peer_that_cannot_be_installed_says_why(upstream: processes.Service) -> None:
    command = [sys.executable, "-c", "print('no such version'); raise SystemExit(1)"]
    with pytest.raises(processes.NotReady, match=r"(?s)Planted can't be installed.*no such version"):
        peers.run(command, Planted(upstream, "/"), Console(file=io.StringIO()))
