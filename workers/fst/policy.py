"""The model in training beside its frozen base: as a LoRA adapter over it, or as a copy of all its layers.

In a full copy the embeddings (and with them the head) stay frozen, so that the base's states and the copy's are read by one head. It is
float32 on any device, whatever the base is: the steps of a small learning rate are lost in bfloat16.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from service.settings import Settings
from workers.consolidation.base import Base
from workers.consolidation.lora import LoraStack, Shape
from workers.fst.plan import Plan

LORA_FOLDER, FULL_FOLDER = "adapter", "weights"
FULL_FILE = "model.safetensors"


class Policy(Protocol):
    """What is trained, and what it started from."""

    parameters: list[nn.Parameter]

    def trained(self) -> AbstractContextManager[Base]:
        """The model with what it has learnt; forward and backward pass belong inside."""

    def frozen(self) -> AbstractContextManager[Base]:
        """The base."""

    def export(self, out: Path, *, scale: float) -> Path:
        """Write what was learnt, multiplied by `scale`, into a folder of `out`; the folder."""

    def load(self, out: Path) -> None:
        """Read what `export` wrote."""


@contextmanager
def opened(base: Base, plan: Plan, settings: Settings) -> Iterator[Policy]:
    """The policy that a plan trains; afterwards the base is as before."""
    with ExitStack() as stack:
        if plan.weights == "full":
            yield FullPolicy(base)
            return
        lora = stack.enter_context(LoraStack.attached(base, Shape.of(settings), slots=1, seed=plan.seed))
        yield LoraPolicy(base, lora)


class LoraPolicy:
    """An adapter in the base."""

    def __init__(self, base: Base, stack: LoraStack) -> None:
        self.parameters = [stack.weights_U_N]
        self._base = base
        self._stack = stack

    @contextmanager
    def trained(self) -> Iterator[Base]:
        with self._stack.on(0):
            yield self._base

    @contextmanager
    def frozen(self) -> Iterator[Base]:
        with self._stack.on(None):
            yield self._base

    def export(self, out: Path, *, scale: float) -> Path:
        folder = out / LORA_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._stack.export(0, folder, scale=scale)
        return folder

    def load(self, out: Path) -> None:
        self._stack.load(0, out / LORA_FOLDER)


class FullPolicy:
    """A copy of the base whose layers are trained themselves."""

    def __init__(self, base: Base) -> None:
        model: Any = copy.deepcopy(base.model).float()
        held = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        self._named = {name: p for name, p in model.named_parameters() if id(p) not in held}
        for parameter in self._named.values():
            parameter.requires_grad_(True)
        self.parameters = list(self._named.values())
        self._base = base
        self._copy = replace(base, model=model)

    @contextmanager
    def trained(self) -> Iterator[Base]:
        yield self._copy

    @contextmanager
    def frozen(self) -> Iterator[Base]:
        yield self._base

    def export(self, out: Path, *, scale: float) -> Path:
        folder = out / FULL_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        start = dict(self._base.model.named_parameters())
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            from_V = start[name].detach().float()
            tensors[name] = (from_V + scale * (parameter.detach() - from_V)).cpu().contiguous()
        save_file(tensors, folder / FULL_FILE, metadata={"format": "pt"})
        return folder

    def load(self, out: Path) -> None:
        tensors = load_file(out / FULL_FOLDER / FULL_FILE)
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(tensors[name])


def snapshot(policy: Policy) -> list[Tensor]:
    """A copy of what is trained."""
    return [p.detach().clone() for p in policy.parameters]


def restore(policy: Policy, weights: list[Tensor]) -> None:
    """Set what is trained to a snapshot."""
    with torch.no_grad():
        for parameter, value in zip(policy.parameters, weights, strict=True):
            parameter.copy_(value)
