"""The fast weights that a process has parsed: always what the bytes say, and bounded."""

from service.domain.fast_weights import FastWeights
from service.domain.feedback import Signals
from service.domain.fold import fold
from service.store.states import OVERHEAD_BYTES, States
from tests.unit.test_fast_weights import log_of


def weights(count: int, word: str = "rule") -> tuple[bytes, FastWeights]:
    """Of so many comments; the bytes and what they say."""
    state = fold(log_of(*((n, Signals(comment=f"mention {word} {n}")) for n in range(count))))
    return state.model_dump_json().encode(), state


def test_the_same_bytes_are_parsed_once_and_others_anew() -> None:
    states = States()
    (raw, state), (newer_raw, newer) = weights(30), weights(31)
    first = states.parsed("alice", raw)
    assert first == state
    assert states.parsed("alice", bytes(bytearray(raw))) is first
    assert states.parsed("alice", newer_raw) == newer
    assert states.parsed("alice", raw) == state


def test_what_was_written_need_not_be_parsed() -> None:
    states = States()
    raw, state = weights(30)
    states.keep("alice", raw, state)
    assert states.parsed("alice", raw) is state


def test_the_least_recently_used_makes_room() -> None:
    raw, state = weights(30)
    states = States(most_bytes=2 * (len(raw) + OVERHEAD_BYTES))
    for user in ("alice", "bob"):
        states.keep(user, raw, state)
    assert states.parsed("alice", raw) is state
    states.keep("cleo", raw, state)
    kept = {user: states.parsed(user, raw) is state for user in ("alice", "cleo", "bob")}
    assert kept == {"alice": True, "cleo": True, "bob": False}


def test_a_state_that_shrank_leaves_its_room_and_one_that_is_too_large_is_not_kept() -> None:
    (raw, state), (small_raw, small), (large_raw, large) = weights(30), weights(1), weights(31)
    states = States(most_bytes=len(raw) + len(small_raw) + 2 * OVERHEAD_BYTES)
    states.keep("alice", raw, state)
    states.keep("alice", small_raw, small)
    states.keep("bob", raw, state)
    assert states.parsed("bob", raw) is state
    assert states.parsed("alice", small_raw) is small
    tight = States(most_bytes=len(raw) + OVERHEAD_BYTES)
    tight.keep("cleo", large_raw, large)
    assert tight.parsed("cleo", large_raw) is not large
