"""The embedding model as it is installed, and what is done with its vectors."""

import logging
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest

from service import embedding
from service.embedding import MODEL, TOKENIZER, WIDTH, OnnxEmbedder, Vectors, load_embedder, near_duplicates
from service.errors import EmbedderUnavailable
from service.settings import Settings


@pytest.fixture(scope="module")
def minilm() -> OnnxEmbedder:
    loaded = load_embedder(Settings(_env_file=None))
    assert loaded is not None
    return loaded


def cosine(minilm: OnnxEmbedder, a: str, b: str) -> float:
    return float(np.dot(*minilm.embed([a, b])))


def unit_rows(*degrees: float) -> Vectors:
    """Vectors in one plane, at these angles."""
    radians = np.radians(np.array(degrees, dtype=np.float32))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_a_paraphrase_is_nearer_than_another_subject(minilm: OnnxEmbedder) -> None:
    question = "How do I boil an egg?"
    near = cosine(minilm, question, "What is the best way to cook eggs in water?")
    far = cosine(minilm, question, "Which taxes does a company pay in Spain?")
    assert near > far + 0.4


@pytest.mark.parametrize(
    ("other", "published"),
    [("That is a very happy person", 0.943), ("That is a happy dog", 0.695), ("Today is a sunny day", 0.257)],
)
def test_cosines_are_those_that_the_models_card_shows(minilm: OnnxEmbedder, other: str, published: float) -> None:
    assert cosine(minilm, "That is a happy person", other) == pytest.approx(published, abs=0.02)


def test_a_contradiction_may_be_nearer_than_a_paraphrase(minilm: OnnxEmbedder) -> None:
    opposite = cosine(minilm, "Always end with a question", "Never end with a question")
    paraphrase = cosine(minilm, "keep it short", "please keep it short")
    assert opposite > 0.9 > paraphrase


def test_every_text_gets_a_row_of_length_one(minilm: OnnxEmbedder) -> None:
    texts = ["", "短い返事をください", "\ud800 lone", "a\0b", "word " * 50_000, "x" * 100_000]
    rows = minilm.embed(texts)
    assert rows.shape == (len(texts), WIDTH)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    assert minilm.embed([]).shape == (0, WIDTH)


def test_a_vector_does_not_depend_on_what_else_is_asked_for(minilm: OnnxEmbedder) -> None:
    alone = minilm.embed(["an egg, alone"])
    among = minilm.embed(["a far longer text before it, " * 20, "an egg, alone"])
    np.testing.assert_array_equal(alone[0], among[1])


def test_without_its_packages_there_is_no_embedder_and_a_warning_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedding, "MODEL", ("no-such-package", *MODEL[1:]))
    with caplog.at_level(logging.WARNING):
        assert load_embedder(Settings(_env_file=None)) is None
    assert len(caplog.records) == 1
    assert "fastslow[recall]" in caplog.text


def test_a_file_that_is_not_the_pinned_one_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedding, "TOKENIZER", (*TOKENIZER[:2], "0" * 64))
    assert load_embedder(Settings(_env_file=None)) is None
    assert "SHA-256" in caplog.text


def test_files_that_are_no_model_are_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EmbedderUnavailable, match="can't be loaded"):
        OnnxEmbedder(tmp_path / "model.onnx", tmp_path / "tokenizer.json")


def test_the_installed_onnxruntime_reports_to_nobody() -> None:
    libraries = [f for f in files("onnxruntime") or [] if ".so" in f.name]
    assert libraries
    assert not any(b"events.data.microsoft.com" in f.locate().read_bytes() for f in libraries)


def test_recall_switched_off_loads_no_model() -> None:
    assert load_embedder(Settings(_env_file=None, recall=False)) is None


def test_a_later_text_joins_the_nearest_earlier_one_that_stays() -> None:
    vectors = unit_rows(0, 40, 15, 30, 90)
    assert near_duplicates(vectors, threshold=0.9, apart=lambda i, j: False) == [(2, 0), (3, 1)]


def test_texts_in_a_row_of_small_steps_do_not_all_become_one() -> None:
    vectors = unit_rows(0, 20, 40, 60)
    assert near_duplicates(vectors, threshold=0.9, apart=lambda i, j: False) == [(1, 0), (3, 2)]


def test_texts_that_must_stay_apart_do_not_join_however_near() -> None:
    vectors = unit_rows(0, 1, 2)
    assert near_duplicates(vectors, threshold=0.9, apart=lambda i, j: {i, j} == {0, 1}) == [(2, 1)]


def test_nothing_has_no_duplicates() -> None:
    assert near_duplicates(np.empty((0, WIDTH), np.float32), apart=lambda i, j: False) == []
