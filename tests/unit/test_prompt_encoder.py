"""The encoder of prompts as it is shipped: how near it comes to the embedding model, and what it takes."""

import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from service import prompt_encoder
from service.embedding import WIDTH, OnnxEmbedder
from service.errors import EmbedderUnavailable
from service.prompt_encoder import VECTORS, WEIGHTS, PromptEncoder, TokenVectors, load_prompt_encoder
from service.settings import Settings
from tests.benchmarks.recall import ENCODER, MODEL, PAIRS, WORDS, likeness, ranks


@pytest.fixture(scope="module")
def vectors() -> TokenVectors:
    return TokenVectors.load()


@pytest.fixture(scope="module")
def encoder(vectors: TokenVectors) -> PromptEncoder:
    return PromptEncoder(vectors)


def test_it_finds_most_of_what_the_embedding_model_finds_and_far_more_than_words_do() -> None:
    found = {name: ranks(rows) for name, rows in likeness().items()}
    nearest = {name: int((rank < 1).sum()) for name, rank in found.items()}
    among_5 = {name: int((rank < 5).sum()) for name, rank in found.items()}
    # As `make bench-recall` has it: 91, 71 and 92, and 1 of a hundred.
    assert nearest[MODEL] > 85
    assert nearest[ENCODER] > 65
    assert among_5[ENCODER] > 87
    assert nearest[WORDS] < 10 < len(PAIRS)


def test_every_text_gets_a_vector_of_length_one(encoder: PromptEncoder) -> None:
    for text in ("", " ", "短い返事をください", "\ud800 lone", "a\0b", "word " * 50_000, "x" * 100_000):
        row = encoder.encode(text)
        assert row.shape == (WIDTH,)
        assert row.dtype == np.float32
        assert float(np.linalg.norm(row)) == pytest.approx(1.0, abs=1e-5)


def test_case_and_what_is_past_the_window_make_no_difference(encoder: PromptEncoder) -> None:
    np.testing.assert_array_equal(encoder.encode("How do I boil an EGG?"), encoder.encode("how do i boil an egg?"))
    long = "Tell me of the sea. " * 100
    np.testing.assert_array_equal(encoder.encode(long), encoder.encode(long + "And of taxes."))


def test_another_teachers_student_is_refused(vectors: TokenVectors) -> None:
    with pytest.raises(EmbedderUnavailable, match=f"learnt from {OnnxEmbedder.name}, and exemplars are embedded by b"):
        PromptEncoder(vectors, teacher="b")


def test_weights_that_are_none_are_said_to_be_none(vectors: TokenVectors, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    for path in (broken, tmp_path / "missing.safetensors"):
        with pytest.raises(EmbedderUnavailable, match="can't be loaded"):
            PromptEncoder(vectors, path)


def test_weights_that_lack_a_part_are_refused(vectors: TokenVectors, tmp_path: Path) -> None:
    fewer = {name: value for name, value in load_file(WEIGHTS).items() if name != "past.weight"}
    save_file(fewer, tmp_path / "fewer.safetensors", metadata={"teacher": OnnxEmbedder.name})
    with pytest.raises(EmbedderUnavailable, match="can't be loaded"):
        PromptEncoder(vectors, tmp_path / "fewer.safetensors")


def test_without_its_package_there_is_no_encoder_and_a_warning_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prompt_encoder, "VECTORS", ("no-such-package", *VECTORS[1:]))
    with caplog.at_level(logging.WARNING):
        assert load_prompt_encoder(Settings(_env_file=None)) is None
    assert len(caplog.records) == 1
    assert "fastslow[recall]" in caplog.text


def test_recall_switched_off_loads_nothing() -> None:
    assert load_prompt_encoder(Settings(_env_file=None, recall=False)) is None
