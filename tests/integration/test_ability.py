"""The multiple-choice set on the default model: questions that it can answer, so that forgetting shows."""

from pathlib import Path

import pytest

from service.settings import Settings
from workers.consolidation.ability import answer, questions
from workers.consolidation.base import load_base
from workers.consolidation.lora import LoraStack, Shape


@pytest.mark.slow
def test_the_default_model_is_far_above_chance_on_every_topic(model_path: Path):
    settings = Settings(_env_file=None, model=str(model_path), worker_device="cpu")
    base = load_base(settings)
    with LoraStack.attached(base, Shape.of(settings)) as judges:
        [answered] = answer(base, judges, [None])
    assert len(questions(base)) == len(answered.margins) == 60
    # Chance is a quarter; four topics of fifteen questions each.
    assert answered.accuracy > 0.7
    assert all(sum(answered.right[first : first + 15]) >= 7 for first in range(0, 60, 15))
