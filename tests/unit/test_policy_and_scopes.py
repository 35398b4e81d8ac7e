"""When contexts and scopes are due, how scopes and errors are written."""

import pickle

import pytest

from service.domain.fast_weights import FastWeights
from service.domain.policy import is_due, optimize_at
from service.domain.population import Population
from service.domain.slow_weights import NAME, Scope, version_name
from service.errors import ContextLengthExceeded, EngineUnavailable, FastslowError, InvalidRequest, UpstreamRejected

DUE = {"due_feedbacks": 16, "due_age_seconds": 100.0, "min_feedbacks": 4, "min_total": 4}


@pytest.mark.parametrize(
    ("clock", "edited", "at"),
    [
        (4, False, None),
        (4, True, 1060.0),
        (5, False, 1060.0),
        (8, False, 1060.0),
        (9, False, 1000.0),
        (30, True, 1000.0),
    ],
)
def test_contexts_are_optimized_after_enough_new_feedback_or_in_silence(
    clock: int, edited: bool, at: float | None
) -> None:
    state = FastWeights(clock=clock, populations=(Population(clock=4),))
    assert optimize_at(state, now=1000.0, feedbacks=5, seconds=60.0, edited=edited) == at
    assert optimize_at(FastWeights(), now=1000.0, feedbacks=5, seconds=60.0, edited=edited) is None


@pytest.mark.parametrize(
    ("pending", "age", "due"), [(16, 0.0, True), (15, 0.0, False), (4, 100.0, True), (3, 1e9, False), (4, 99.0, False)]
)
def test_a_scope_is_due_by_enough_feedback_or_by_age(pending: int, age: float, due: bool) -> None:
    assert is_due(pending=pending, total=pending, oldest_age_seconds=age, **DUE) is due


@pytest.mark.parametrize(
    ("pending", "total", "due"), [(19, 19, False), (20, 20, True), (4, 19, False), (4, 24, True), (3, 1000, False)]
)
def test_a_users_own_scope_needs_enough_in_all_and_then_little_that_is_new(pending: int, total: int, due: bool) -> None:
    own = DUE | {"min_total": 20}
    assert is_due(pending=pending, total=total, oldest_age_seconds=100.0, **own) is due


@pytest.mark.parametrize("text", ["user:alice", "user:a:b/c", "cohort:legal", "global"])
def test_a_scope_reads_back_as_it_was_written(text: str) -> None:
    assert str(Scope.parse(text)) == text


@pytest.mark.parametrize("text", ["", "user:", "cohort:", "team:x", "Global", "user"])
def test_what_is_not_a_scope_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="not a scope"):
        Scope.parse(text)


def test_a_versions_name_tells_scope_tenant_number_and_content_apart() -> None:
    def name(scope: str = "user:a", tenant: str = "t", number: int = 1, content: str = "ab" * 32) -> str:
        return version_name(Scope.parse(scope), tenant=tenant, number=number, content_sha256=content)

    names = {name(), name(scope="user:b"), name(tenant="u"), name(number=2), name(content="cd" * 32)}
    assert len(names) == 5
    assert all(NAME.fullmatch(n) for n in names)


@pytest.mark.parametrize(
    "error",
    [
        ContextLengthExceeded("too long", param="messages"),
        EngineUnavailable("away", retry_after_seconds=7),
        UpstreamRejected("no", status=418, param="x"),
    ],
)
def test_errors_survive_pickling_whole(error: FastslowError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.body(), copy.headers(), copy.status) == (
        type(error), error.body(), error.headers(), error.status,
    )  # fmt: skip
