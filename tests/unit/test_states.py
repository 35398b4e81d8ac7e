"""The fast weights that a process has parsed or written: always those of a stamp, written part by part, and bounded."""

from service.domain.fast_weights import FastWeights
from service.domain.feedback import Signals
from service.domain.fold import fold
from service.store.states import FIELDS, OVERHEAD_BYTES, Known, States, parsed, whole, write
from tests.unit.test_fast_weights import log_of


def weights(count: int, word: str = "rule") -> FastWeights:
    """Of so many comments."""
    return fold(log_of(*((n, Signals(comment=f"mention {word} {n}")) for n in range(count))))


def stored(state: FastWeights, stamp: bytes = b"1", known: Known | None = None) -> dict[str, bytes]:
    """The hash in Redis after a write."""
    fields = write(state, known).fields
    return {"stamp": stamp} | {str(name): bytes(value) for name, value in zip(fields[::2], fields[1::2], strict=True)}


def answer(fields: dict[str, bytes]) -> list[bytes | None]:
    """Redis's, to `whole`."""
    assert whole("alice") == ("HMGET", "alice", *FIELDS)
    return [fields.get(name) for name in FIELDS]


def known(state: FastWeights, stamp: bytes = b"1") -> Known:
    return write(state, None).known(stamp)


def test_what_is_written_whole_is_read_again() -> None:
    for state in (FastWeights(), weights(1), weights(30)):
        assert parsed(answer(stored(state))) == state


def test_only_the_parts_that_changed_are_written_and_the_others_stay() -> None:
    older = weights(30)
    newer = older.model_copy(update={"revision": 31, "credits": {}, "removed": {"g": 31}})
    change = stored(newer, b"2", known(older))
    assert set(change) == {"stamp", "rest"} | ({"credits"} if older.credits else set())
    assert parsed(answer(stored(older) | change)) == newer
    emptied = older.model_copy(update={"guidelines": {}})
    assert parsed(answer(stored(older) | stored(emptied, b"3", known(older)))) == emptied
    assert write(newer, known(older)).stays == b"1"
    assert write(newer, None).stays == b""


def test_every_write_has_a_stamp_of_its_own() -> None:
    assert len({write(weights(1), None).stamp for _ in range(100)}) == 100


def test_the_same_stamp_is_parsed_once_and_another_is_not_known() -> None:
    states, state = States(), weights(30)
    first = states.read("alice", answer(stored(state, b"1")))
    assert first == state
    assert states.stamped("alice", b"1") is first
    assert states.stamped("alice", b"2") is None
    assert states.stamped("bob", b"1") is None
    assert "alice" in states
    assert "bob" not in states


def test_what_was_written_need_not_be_parsed() -> None:
    states, state = States(), weights(30)
    states.keep("alice", known(state))
    assert states.stamped("alice", b"1") is state


def test_what_was_written_in_parts_counts_whole() -> None:
    older, newer = weights(30), weights(31)
    by_parts = write(newer, known(older)).known(b"2")
    assert by_parts.size == known(newer).size
    assert by_parts.size == sum(len(value) for value in stored(newer).values()) - len(b"1") + OVERHEAD_BYTES


def test_the_least_recently_used_makes_room() -> None:
    state = weights(30)
    states = States(most_bytes=2 * known(state).size)
    for user in ("alice", "bob"):
        states.keep(user, known(state))
    assert states.stamped("alice", b"1") is state
    states.keep("cleo", known(state))
    assert {user: user in states for user in ("alice", "cleo", "bob")} == {"alice": True, "cleo": True, "bob": False}


def test_a_state_that_shrank_leaves_its_room_and_one_that_is_too_large_is_not_kept() -> None:
    large, middle, small = (known(weights(count)) for count in (31, 30, 1))
    states = States(most_bytes=middle.size + small.size)
    states.keep("alice", middle)
    states.keep("alice", small)
    states.keep("bob", middle)
    assert "alice" in states
    assert "bob" in states
    tight = States(most_bytes=middle.size)
    tight.keep("cleo", large)
    assert "cleo" not in tight
