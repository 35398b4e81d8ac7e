"""The faults by name: each says what breaks, and docs/faults.md what came of it."""

from itertools import pairwise
from pathlib import Path

import pytest

import tests.faults.kinds  # noqa: F401  registers them
from tests.e2e.test_faults import SHORT
from tests.faults.__main__ import chosen
from tests.faults.registry import FAULTS

DOCS = Path(__file__).parents[2] / "docs" / "faults.md"


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_a_row_in_the_docs(name: str) -> None:
    assert f"| {name} |" in DOCS.read_text() or FAULTS[name].on_request


def test_those_on_request_run_only_by_name_and_those_of_one_layout_together() -> None:
    without = chosen([])
    assert not any(fault.on_request for fault in without)
    changes = sum(a.layout != b.layout for a, b in pairwise(without))
    assert changes + 1 == len({fault.layout for fault in without})
    assert [fault.name for fault in chosen(["redis-failover-unconfirmed"])] == ["redis-failover-unconfirmed"]


def test_an_unknown_name_is_told_with_those_that_there_are() -> None:
    with pytest.raises(SystemExit, match=r"no faults are called kill-nobody; there are: .*kill-redis"):
        chosen(["kill-nobody"])


def test_the_short_form_needs_one_stack() -> None:
    assert len({FAULTS[name].layout for name in SHORT}) == 1
