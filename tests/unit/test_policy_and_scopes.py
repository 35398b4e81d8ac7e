"""When a scope is due, what is promoted, how scopes and errors are written."""

import pickle

import pytest

from service.domain.policy import decide, is_due
from service.domain.slow_weights import NAME, Margins, Promote, Reject, Scope, TrainReport, version_name
from service.errors import ContextLengthExceeded, EngineUnavailable, FastslowError, InvalidRequest, UpstreamRejected
from tests.factories import divergence, train_report

DUE = {"due_feedbacks": 16, "due_age_seconds": 100.0, "min_feedbacks": 4}


@pytest.mark.parametrize(
    ("pending", "age", "due"), [(16, 0.0, True), (15, 0.0, False), (4, 100.0, True), (3, 1e9, False), (4, 99.0, False)]
)
def test_a_scope_is_due_by_enough_feedback_or_by_age(pending: int, age: float, due: bool) -> None:
    assert is_due(pending=pending, oldest_age_seconds=age, **DUE) is due


def test_a_candidate_within_budget_that_beats_all_is_promoted() -> None:
    assert isinstance(decide(train_report()), Promote)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (train_report(text=divergence(upper=0.021)), "plain-text"),
        (train_report(text=divergence(worst=0.21)), "worst anchor"),
        (train_report(margins=Margins(base=0.1, current=0.5, candidate=0.5)), "version in use"),
        (train_report(margins=Margins(base=0.6, current=0.2, candidate=0.5)), "the base"),
        (train_report(scale=0.0), "no scale"),
        (
            train_report(
                margins=Margins(base=0.1, current=0.2, candidate=0.5, base_with_context=0.7, candidate_with_context=0.6)
            ),
            "with the context",
        ),
    ],
)
def test_each_failing_is_a_reason_to_reject(bad: TrainReport, word: str) -> None:
    decision = decide(bad)
    assert isinstance(decision, Reject)
    assert any(word in reason for reason in decision.reasons)


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
