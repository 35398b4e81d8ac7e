"""Fixtures of the unit tests that need a model: a tiny random one."""

from pathlib import Path

import pytest

from service.settings import Settings
from tests.tiny_model import save_tiny_model
from workers.consolidation.base import Base, load_base


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_base(tiny_model_path: Path) -> Base:
    """The tiny model as consolidation loads it."""
    return load_base(Settings(_env_file=None, model=str(tiny_model_path), model_name="tiny", worker_device="cpu"))


@pytest.fixture
def tiny_settings(tiny_model_path: Path, tmp_path: Path) -> Settings:
    """Few and short of everything."""
    return Settings(
        _env_file=None,
        model=str(tiny_model_path),
        model_name="tiny",
        worker_device="cpu",
        data_dir=tmp_path,
        anchors=8,
        user_min_feedbacks=4,
        train_steps=6,
        train_batch=2,
        lora_rank=4,
        lora_alpha=8,
        context_budget_tokens=400,
    )
