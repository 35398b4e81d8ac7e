"""Where the embedding model would put a chat's prompt, told in a fraction of a millisecond.

The exemplars' vectors are the embedding model's own (`embedding.py`), made by workers after feedback. To run that model on each prompt
would cost a chat more than all the rest of the gateway. So a small student answers in its place: the mean of a text's token vectors
(WordLlama's, MIT; only the package's files are read), through one hidden layer into the teacher's space. It was trained by
`workers/distil_prompt_encoder.py`; how often it finds what the teacher finds, `make bench-recall` tells.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from service.embedding import INSTALL, WINDOW_TOKENS, OnnxEmbedder, Vectors, packaged, readable
from service.errors import EmbedderUnavailable
from service.settings import Settings

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).with_suffix(".safetensors")
VECTORS = (
    "wordllama",
    "wordllama/weights/l2_supercat_256.safetensors",
    "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
)
TOKENIZER = (
    "wordllama",
    "wordllama/tokenizers/l2_supercat_tokenizer_config.json",
    "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
)
# Brings the mean of token vectors near length 1.
SCALE = 8.0


@dataclass(frozen=True)
class TokenVectors:
    """A vector for each token: float16 [32000, 256], 16 MB."""

    table: NDArray[np.float16]
    tokenizer: Tokenizer

    @classmethod
    def load(cls) -> Self:
        """From the installed package.

        Raises:
            EmbedderUnavailable: it is not there, or not the one that is meant.
        """
        try:
            with safe_open(packaged(*VECTORS), "numpy") as file:
                table = file.get_tensor("embedding.weight")
            tokenizer = Tokenizer.from_file(str(packaged(*TOKENIZER)))
        except EmbedderUnavailable:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            raise EmbedderUnavailable(f"The token vectors can't be loaded ({error}): {INSTALL}.") from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(WINDOW_TOKENS)
        return cls(table, tokenizer)

    def mean(self, text: str) -> Vectors:
        """Of the text's tokens, in lower case: float32 [256]. All zeros for a text without any."""
        ids = self.tokenizer.encode(readable(text).lower(), add_special_tokens=False).ids
        if not ids:
            return np.zeros(self.table.shape[1], np.float32)
        sums: Vectors = np.add.reduce(self.table[ids], dtype=np.float32)
        return sums / np.float32(len(ids))


class PromptEncoder:
    """The student.

    Args:
        teacher: the embedding model whose vectors its own are compared with.
    """

    def __init__(self, vectors: TokenVectors, weights: Path = WEIGHTS, *, teacher: str = OnnxEmbedder.name) -> None:
        """Load the weights.

        Raises:
            EmbedderUnavailable: the file is missing or broken, or is another teacher's student.
        """
        try:
            with safe_open(weights, "numpy") as file:
                learnt_from = (file.metadata() or {}).get("teacher")
                tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
            self._inner, self._inner_bias = tensors["inner.weight"], tensors["inner.bias"]
            self._outer, self._past, self._bias = tensors["outer.weight"], tensors["past.weight"], tensors["past.bias"]
        except (OSError, SafetensorError, KeyError) as error:
            raise EmbedderUnavailable(f"The prompt encoder can't be loaded ({error!r}): {weights}.") from error
        if learnt_from != teacher:
            raise EmbedderUnavailable(
                f"The prompt encoder in {weights} learnt from {learnt_from}, and exemplars are embedded by {teacher}: "
                "train it anew (`python -m workers.distil_prompt_encoder`)."
            )
        self.teacher = teacher
        self._vectors = vectors

    def encode(self, text: str) -> Vectors:
        """A vector of length 1: float32 [WIDTH], whose dot product with an exemplar's is their cosine."""
        mean_W = SCALE * self._vectors.mean(text)
        hidden_H = self._inner @ mean_W + self._inner_bias
        hidden_H /= 1 + np.exp(-hidden_H)
        row_D: Vectors = self._outer @ hidden_H + self._past @ mean_W + self._bias
        row_D /= np.sqrt(row_D @ row_D)
        return row_D


def load_prompt_encoder(settings: Settings) -> PromptEncoder | None:
    """The installed encoder; None where recall is off or, with a warning, where it is not installed or not sound."""
    if not settings.recall:
        return None
    try:
        return PromptEncoder(TokenVectors.load())
    except EmbedderUnavailable as error:
        log.warning("exemplars that don't all fit are chosen without recall: %s", error)
        return None
