"""Guidelines that say the same: what is merged, and what only looks alike."""

import numpy as np
import pytest

from service.domain.items import Guideline
from workers.context_search.duplicates import find, particulars


class Embeds:
    """Vectors by text."""

    name = "fake"

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self._vectors = vectors

    def embed(self, texts):
        rows = np.array([self._vectors[text] for text in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def guideline(name, text, born, **changes):
    return Guideline(id=name, text=text, sources={f"c{born}": born}, support=1).model_copy(update=changes)


def found(*guidelines, near=()):
    vectors = {g.text: [1.0, 0.01 * n] if g.id in near else [0.0, 1.0] for n, g in enumerate(guidelines)}
    return find(guidelines, Embeds(vectors))


def test_the_newer_of_two_that_say_the_same_joins_the_older() -> None:
    older, newer = guideline("g-1", "be brief", 1), guideline("g-2", "keep it brief", 2)
    assert found(newer, older, near=("g-1", "g-2")).merged == {"g-2": "g-1"}


def test_what_is_inferred_joins_what_was_said_and_what_was_said_joins_what_was_put_there_by_hand() -> None:
    inferred = guideline("g-1", "answer briefly", 1, origin="inferred", support=0)
    said, edited = guideline("g-2", "be brief", 2), guideline("g-3", "keep it brief", 3, origin="edit")
    assert found(inferred, said, edited, near=("g-1", "g-2", "g-3")).merged == {"g-1": "g-3", "g-2": "g-3"}


def test_two_that_were_put_there_by_hand_both_stay() -> None:
    one, other = (guideline(f"g-{n}", text, n, pinned=True) for n, text in ((1, "be brief"), (2, "keep it brief")))
    assert found(one, other, near=("g-1", "g-2")).merged == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("end with Cheers", "end with Regards"),
        ("use 3 sentences", "use 5 sentences"),
        ("reply in French", "reply in German"),
        ("always use emojis", "never use emojis"),
        ("call me “boss”", "call me “chief”"),
    ],
)
def test_what_an_embedding_overlooks_keeps_them_apart(one: str, other: str) -> None:
    assert found(guideline("g-1", one, 1), guideline("g-2", other, 2), near=("g-1", "g-2")).merged == {}


def test_the_first_word_s_capital_is_no_particular() -> None:
    assert particulars("Be brief") == particulars("keep it short") == set()


def test_what_is_not_near_is_neither_merged_nor_similar() -> None:
    result = found(guideline("g-1", "be brief", 1), guideline("g-2", "use tables", 2), near=("g-1",))
    assert (result.merged, result.similar) == ({}, {})
