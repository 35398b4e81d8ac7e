"""LoRA layers in the base model for the length of one consolidation: attached, switched, exported, taken out again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file

from service.settings import Settings
from workers.consolidation.base import Base

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TRAINED = "trained"


class Adapters:
    """The adapters in a base model: the one in training, and others loaded from folders."""

    def __init__(self, model: Any, config: LoraConfig, base: Base) -> None:
        self._model = model
        self._config = config
        self._base = base

    @classmethod
    @contextmanager
    def attached(cls, base: Base, settings: Settings) -> Iterator[Self]:
        """Puts a fresh adapter, which changes nothing yet, into the base; afterwards the base is as before, whatever happened."""
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=list(settings.lora_target_modules),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.train_seed)
            model = get_peft_model(base.model, config, adapter_name=TRAINED)
        try:
            yield cls(model, config, base)
        finally:
            model.unload()
            # peft leaves its marks on the model, and would warn at the next job.
            for mark in ("peft_config", "_hf_peft_config_loaded"):
                base.model.__dict__.pop(mark, None)
            base.model.requires_grad_(False).eval()

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained: the A and B of the adapter in training."""
        return [p for name, p in self._model.named_parameters() if f".{TRAINED}." in name]

    def start_from(self, folder: Path) -> bool:
        """Give the adapter in training a published version's weights; False, and nothing done, if its shape is another."""
        config = json.loads((folder / CONFIG).read_text())
        shape = (config["r"], config["lora_alpha"], set(config["target_modules"]))
        if shape != (self._config.r, self._config.lora_alpha, set(self._config.target_modules)):
            return False
        set_peft_model_state_dict(self._model, load_peft_weights(str(folder), device="cpu"), adapter_name=TRAINED)
        return True

    def load(self, folder: Path, name: str) -> None:
        """Load a PEFT folder as `name`, in place of one that had the name."""
        if name in self._model.peft_config:
            self._model.delete_adapter(name)
        self._model.load_adapter(str(folder), adapter_name=name, is_trainable=False)

    @contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        """While inside, the base computes with this adapter; with none of them for None."""
        if name is None:
            with self._model.disable_adapter():
                yield
            return
        self._model.set_adapter(name)
        try:
            yield
        finally:
            self._model.set_adapter(TRAINED)

    def export(self, folder: Path, *, scale: float) -> None:
        """Write the trained adapter as a PEFT folder that vLLM loads too, its B multiplied by `scale`."""
        state = get_peft_model_state_dict(self._model, adapter_name=TRAINED)
        scaled = {
            name: (value.detach().float() * scale if ".lora_B." in name else value.detach().float()).cpu().contiguous()
            for name, value in state.items()
        }
        save_file(scaled, folder / WEIGHTS, metadata={"format": "pt"})
        config = self._config.to_dict() | {
            "base_model_name_or_path": self._base.name,
            "inference_mode": True,
            "target_modules": sorted(self._config.target_modules),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=_plain))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
