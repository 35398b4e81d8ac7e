"""How often vLLM reads an adapter from its file and copies one into a place of the batch, by its own log.

vLLM imports this (for `Loads`), so it imports little.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

# What vLLM logs of an adapter: read from its file into memory, and copied from there into a place of the batch.
LOADED, ACTIVATED = "Adding lora. Model id", "Activating LoRA. int id"


class Loads(logging.Filter):
    """In vLLM: of what is logged in detail, only that an adapter comes in."""

    def filter(self, record: logging.LogRecord) -> bool:
        return str(record.msg).startswith((LOADED, ACTIVATED))


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"loads": {"()": "tests.benchmarks.adapter_loads.Loads"}},
    "handlers": {"all": {"class": "logging.StreamHandler"}},
    "loggers": {
        "vllm": {"handlers": ["all"], "level": "INFO", "propagate": False},
        "vllm.lora.model_manager": {"level": "DEBUG", "filters": ["loads"]},
    },
}


class Logs:
    """What the replicas have logged so far."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def counts(self) -> tuple[int, int]:
        """Adapters read, adapters activated."""
        texts = [file.read_text(errors="replace") for file in self._files]
        return sum(text.count(LOADED) for text in texts), sum(text.count(ACTIVATED) for text in texts)
