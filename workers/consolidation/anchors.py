"""Anchors: general prompts with frozen completions of the base, on which drift is measured.

Two kinds. Plain text, outside the chat template, meters what the model forgets; chat prompts meter how far served replies move. Of each
kind's topics every other prompt steers training and the rest only judge, so that the judge never saw what training was held to.

The base samples each completion once, at temperature 1 without any cut, because KL(base || adapter) is an expectation over the base's
own distribution. Completions and the base's hidden states on them (576 numbers a token, where logits would be 49,152) are kept in a file
named by all that they depend on.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.domain.feedback import Message
from service.errors import JobFailed
from workers.consolidation.base import Base
from workers.consolidation.rows import Row, batches, pack
from workers.consolidation.sampling import GumbelNoise, sample

Kind = Literal["text", "chat"]
Use = Literal["steer", "judge"]
KINDS: tuple[Kind, ...] = ("text", "chat")
USES: tuple[Use, ...] = ("steer", "judge")

COMPLETION_TOKENS = 24
# One batch of generation keeps a KV cache; 48 prompts of the default model take about 0.1 GB.
BATCH_PROMPTS = 48
# Tokens of one pass without gradient, with padding: activations stay small beside the weights.
PASS_TOKENS = 2048
SEED = 20260512
_TOPICS: TypeAdapter[dict[Kind, dict[str, list[Annotated[str, Field(min_length=1)]]]]] = TypeAdapter(
    dict[Kind, dict[str, list[Annotated[str, Field(min_length=1)]]]]
)


@dataclass(frozen=True)
class Anchor:
    """A prompt with the base's completion (the row's one reply) and the base's states that predict it."""

    row: Row
    base_states_N_D: Tensor


@dataclass(frozen=True)
class Anchors:
    """All anchors of one base model, by kind and use."""

    sets: dict[tuple[Kind, Use], tuple[Anchor, ...]]

    def of(self, kind: Kind, use: Use) -> tuple[Anchor, ...]:
        return self.sets[kind, use]


Topics = dict[str, list[str]]
"""Prompts by topic."""


def prompts(topics: Topics, use: Use) -> list[str]:
    """The anchor prompts that steer, or that judge: every other one of each topic."""
    first = 0 if use == "steer" else 1
    return [prompt for topic in topics.values() for prompt in topic[first::2]]


def own_topics() -> dict[Kind, Topics]:
    """The prompts that ship with the project."""
    text = resources.files(__package__).joinpath("anchors.json").read_text(encoding="utf-8")
    found: dict[Kind, Topics] = json.loads(text)
    return found


def more_topics(path: Path) -> dict[Kind, Topics]:
    """Prompts from a file of the same form: {"text": {topic: [prompt, ...]}, "chat": {...}}.

    Raises:
        JobFailed: it can't be read, or has another form.
    """
    try:
        found = _TOPICS.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise JobFailed(
            f"FASTSLOW_ANCHORS_FILE {path} can't be used: {str(error).splitlines()[0]}; it must be JSON of the form "
            '{"text": {topic: [prompt, ...]}, "chat": {topic: [prompt, ...]}}, with no prompt empty'
        ) from error
    return dict(found)


def load_anchors(
    base: Base, *, cache: Path, limit: int, more: Path | None = None, progress: Callable[[int, int], None]
) -> Anchors:
    """The anchors with their completions, from the cache or made now.

    Args:
        cache: folder of the files; one a base model, device and list of prompts.
        limit: most of our own anchors of each kind and use.
        more: a file of others, which all count (`more_topics`).
        progress: called with batches done and batches in all, while they are made.

    Raises:
        JobFailed: the cache can't be written, or `more` not read.
    """
    own, others = own_topics(), more_topics(more) if more else {}
    rows = {
        (kind, use): _encoded(base, kind, prompts(own[kind], use)[:limit] + prompts(others.get(kind, {}), use))
        for kind in KINDS
        for use in USES
    }
    path = cache / f"{_key(base, rows)}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        tensors = _generate(base, [row for set_rows in rows.values() for row in set_rows], progress)
        _save(tensors, path)
    sets = {}
    number = 0
    for key, set_rows in rows.items():
        anchors = []
        for prompt in set_rows:
            completion = tuple(tensors[f"{number}.completion"].tolist())
            anchors.append(Anchor(Row(prompt, (completion,)), tensors[f"{number}.states"].to(base.device)))
            number += 1
        sets[key] = tuple(anchors)
    return Anchors(sets)


def _encoded(base: Base, kind: Kind, texts: Sequence[str]) -> list[tuple[int, ...]]:
    if kind == "text":
        return [base.encode_text(text) for text in texts]
    return [base.encode_chat([Message(role="user", content=text)]) for text in texts]


def _key(base: Base, rows: dict[tuple[Kind, Use], list[tuple[int, ...]]]) -> str:
    """Names the file by weights, numerics, prompts as tokens, and how completions are made."""
    depends = [base.sha256, base.device.type, str(base.model.dtype), COMPLETION_TOKENS, SEED, list(rows.values())]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]


def _generate(
    base: Base, prompt_rows: Sequence[tuple[int, ...]], progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    completions: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(prompt_rows)), key=lambda i: len(prompt_rows[i]))
    groups = [order[i : i + BATCH_PROMPTS] for i in range(0, len(order), BATCH_PROMPTS)]
    for done, group in enumerate(groups):
        progress(done, 2 * len(groups))
        prompts_of = [prompt_rows[i] for i in group]
        noise = GumbelNoise([SEED + i for i in group], device=base.device)
        sampled = sample(base, prompts_of, max_new_tokens=COMPLETION_TOKENS, noise=noise)
        completions.update(zip(group, sampled, strict=True))
    rows = [Row(prompt, (completions[i],)) for i, prompt in enumerate(prompt_rows)]
    tensors: dict[str, Tensor] = {}
    for batch in batches(rows, [len(row) for row in rows], max_tokens=PASS_TOKENS):
        progress(len(groups) + len(groups) * len(tensors) // (2 * len(rows)), 2 * len(groups))
        packed = pack([rows[i] for i in batch], device=base.device)
        with torch.inference_mode():
            states = base.states(packed).split([len(rows[i].replies[0]) for i in batch])
        for i, state in zip(batch, states, strict=True):
            tensors[f"{i}.completion"] = torch.tensor(rows[i].replies[0])
            tensors[f"{i}.states"] = state.cpu().clone()
    return tensors


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Written aside and renamed, so that a killed worker leaves no half file under the name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(descriptor)
        try:
            save_file(tensors, temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise JobFailed(f"anchors can't be written to {path.parent}: {error}") from error
