"""Which items an adapter version makes unnecessary."""

import pytest

from service.domain.absorption import absorbed
from service.domain.fast_weights import FastWeights
from service.domain.items import Guideline
from service.domain.slow_weights import AdapterVersion, Scope, version_name
from tests.factories import train_report

CONTENT = "ab" * 32


def version(*ids: str, watermark: dict[str, int]) -> AdapterVersion:
    scope = Scope(kind="cohort", name="legal")
    return AdapterVersion(
        name=version_name(scope, tenant="acme", number=1, content_sha256=CONTENT),
        tenant="acme",
        scope=str(scope),
        number=1,
        base_model="m",
        base_sha256="0" * 64,
        content_sha256=CONTENT,
        created=0.0,
        job="con-001-a",
        watermark=watermark,
        report=train_report(absorbed=ids),
    )


def state(**sources: dict[str, int]) -> FastWeights:
    return FastWeights(
        guidelines={name: Guideline(id=name, text=name, sources=found) for name, found in sources.items()}
    )


@pytest.mark.parametrize(
    ("sources", "gone"), [({"a": 3}, True), ({"a": 5}, True), ({"a": 6}, False), ({"a": 2, "b": 9}, False), ({}, True)]
)
def test_an_item_that_was_said_after_the_watermark_is_back(sources: dict[str, int], gone: bool) -> None:
    found = absorbed(version("g-1", watermark={"alice": 5}), state(**{"g-1": sources}), user="alice")
    assert found == ({"g-1"} if gone else set())


def test_an_item_that_was_put_in_by_hand_since_is_back() -> None:
    by_hand = Guideline(id="g-1", text="x", origin="edit", since=6)
    assert not absorbed(version("g-1", watermark={"alice": 5}), FastWeights(guidelines={"g-1": by_hand}), user="alice")


def test_an_item_that_was_pinned_since_is_back() -> None:
    pinned = Guideline(id="g-1", text="x", sources={"a": 3}, pinned=True)
    assert not absorbed(version("g-1", watermark={"alice": 5}), FastWeights(guidelines={"g-1": pinned}), user="alice")


def test_only_what_the_report_lists_is_absorbed() -> None:
    both = state(**{"g-1": {"a": 1}, "g-2": {"a": 1}})
    assert absorbed(version("g-2", watermark={"alice": 5}), both, user="alice") == {"g-2"}


def test_nothing_is_absorbed_of_a_user_whose_feedback_the_version_never_saw() -> None:
    shared = version("g-1", watermark={"alice": 5})
    assert absorbed(shared, state(**{"g-1": {"a": 1}}), user="bob") == set()


def test_an_item_that_the_user_never_said_stays_absorbed() -> None:
    assert absorbed(version("g-1", watermark={"alice": 5}), FastWeights(), user="alice") == {"g-1"}
