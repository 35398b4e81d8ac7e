"""LoRA adapters side by side in the frozen base: many users' in one pass, each row of a batch with its own.

    y = x W^T + (alpha / r) * (x A_u^T) B_u^T      for a row of slot u

All adapters lie in one tensor, a row a slot, so that clipping, the optimizer, a checkpoint and the search for a scale are each one
operation over slots. A slot's gradient is of its own rows' losses alone. Folders are PEFT's own format, as vLLM loads them.

Letters: U slots, N numbers of one adapter, B rows of a batch, T tokens, D and O a layer's widths in and out, R rank.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from service.settings import Settings
from workers.consolidation.base import Base
from workers.consolidation.low_rank import LowRank

# `model.layers.7` of `model.layers.7.mlp.up_proj`.
BLOCK = re.compile(r"^(.*?\.\d+)\..*$")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class OtherShape(ValueError):
    """A folder holds an adapter that this stack has no room for: of a higher rank, or of layers that it does not adapt."""


@dataclass(frozen=True)
class Shape:
    """What all adapters of a stack have in common."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    """Names of linear layers, by their last part."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(rank=settings.lora_rank, alpha=settings.lora_alpha, targets=settings.lora_target_modules)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of a PEFT folder.

        Raises:
            OSError, ValueError, KeyError: it has no config that could be read.
        """
        config = json.loads((folder / CONFIG).read_text())
        return cls(rank=config["r"], alpha=config["lora_alpha"], targets=tuple(sorted(config["target_modules"])))

    def with_room_for(self, others: Iterable[Self]) -> Self:
        """Of all layers and of the highest rank among these and it, so that a stack of it can load them all."""
        others = list(others)
        rank = max(shape.rank for shape in (self, *others))
        targets = {target for shape in (self, *others) for target in shape.targets}
        alpha = self.alpha if rank == self.rank else rank
        return replace(self, rank=rank, alpha=alpha, targets=tuple(sorted(targets)))

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class LoraStack:
    """`slots` adapters of one shape in a base model. Make it by `attached`."""

    def __init__(self, base: Base, shape: Shape, layers: Mapping[str, nn.Linear], *, slots: int, seed: int) -> None:
        self.shape = shape
        self.slots = slots
        self.base = base
        self._layers = layers
        self._blocks = _blocks(layers)
        self._sizes = [size for layer in layers.values() for size in _sizes(layer, shape.rank)]
        fresh_N = _fresh(layers, shape.rank, seed=seed)
        self.weights_U_N = nn.Parameter(fresh_N.expand(slots, -1).contiguous().to(base.device))
        self._active: _Active | None = None

    @classmethod
    @contextmanager
    def attached(cls, base: Base, shape: Shape, *, slots: int = 1, seed: int = 0) -> Iterator[Self]:
        """Puts fresh adapters, which change nothing yet, into the base; afterwards the base is as before, whatever happened."""
        layers = {
            name: module
            for name, module in base.model.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in shape.targets
        }
        stack = cls(base, shape, layers, slots=slots, seed=seed)
        for number, (name, layer) in enumerate(layers.items()):
            _put(base.model, name, _StackedLinear(layer, stack, number))
        try:
            yield stack
        finally:
            for name, layer in layers.items():
                _put(base.model, name, layer)

    @contextmanager
    def on(self, slots: int | Sequence[int] | None) -> Iterator[None]:
        """While inside, the base computes with these adapters: one for all rows, one for each row, or none.

        The backward pass of what is computed inside belongs inside too, where activations are computed again.
        """
        before = self._active
        self._active = None if slots is None else self._activated(slots)
        try:
            yield
        finally:
            self._active = before

    def export(self, slot: int, folder: Path, *, scale: float = 1.0) -> None:
        """Write a slot as a PEFT folder that vLLM loads too, its B multiplied by `scale`."""
        parts = iter(self.weights_U_N.detach()[slot].float().split(self._sizes))
        tensors = {}
        for name, layer in self._layers.items():
            a, b = next(parts), next(parts)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.view(-1, layer.in_features).cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = (
                (b * scale).view(layer.out_features, -1).cpu().contiguous()
            )
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = LoraConfig(
            r=self.shape.rank,
            lora_alpha=self.shape.alpha,
            target_modules=sorted(self.shape.targets),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base.name,
            inference_mode=True,
        ).to_dict()
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=_plain))

    def load(self, slot: int, folder: Path) -> None:
        """Read a PEFT folder into a slot. One of a lower rank or another alpha computes the same as it did, and so does one of fewer
        layers: where it has none, B is zero, and A stays what it was, so that it can be trained.

        Raises:
            OtherShape: of a higher rank, or of layers that are not here.
            OSError, ValueError, KeyError, SafetensorError: it can't be read.
        """
        found, tensors = Shape.read(folder), load_file(folder / WEIGHTS)
        if found.rank > self.shape.rank:
            raise OtherShape(f"{folder.name} has rank {found.rank}, over {self.shape.rank}")
        before = self.weights_U_N.detach()[slot].split(self._sizes)
        pieces: list[Tensor] = []
        for (name, layer), a_before, b_before in zip(self._layers.items(), before[::2], before[1::2], strict=True):
            matrix_a, matrix_b = (f"base_model.model.{name}.lora_{matrix}.weight" for matrix in "AB")
            if matrix_a not in tensors:
                pieces += [a_before.cpu(), torch.zeros(len(b_before))]
                continue
            a, b = tensors.pop(matrix_a).float(), tensors.pop(matrix_b).float()
            spare = self.shape.rank - found.rank
            pieces.append(functional.pad(a, (0, 0, 0, spare)).reshape(-1))
            pieces.append(functional.pad(b * (found.scaling / self.shape.scaling), (0, spare)).reshape(-1))
            if pieces[-2].numel() != self.shape.rank * layer.in_features:
                raise OtherShape(f"{folder.name} is of another width at {name}")
        if tensors:
            raise OtherShape(f"{folder.name} has {next(iter(tensors))}, a layer that is not adapted here")
        with torch.no_grad():
            self.weights_U_N[slot] = torch.cat(pieces)

    def clear(self, slot: int) -> None:
        """Make a slot change nothing."""
        with torch.no_grad():
            self.weights_U_N[slot] = 0.0

    def adapted(self, x: Tensor, layer: nn.Linear, number: int) -> Tensor:
        """A layer's output with what the active adapters add to it, shape (B, T, O)."""
        active = self._active
        if active is None:
            return layer(x)
        a, b = active.matrices(number)
        if active.places_B is None:
            a_R_D, b_O_R = a.view(-1, layer.in_features), b.view(layer.out_features, -1)
            found = LowRank.apply(x.flatten(0, -2), layer.weight, layer.bias, *_as(x, a_R_D, b_O_R), self.shape.scaling)
            return found.view(*x.shape[:-1], -1)
        a_B_R_D = a.unflatten(1, (-1, layer.in_features))
        b_B_O_R = b.unflatten(1, (layer.out_features, -1))
        return LowRank.apply(x, layer.weight, layer.bias, *_as(x, a_B_R_D, b_B_O_R), self.shape.scaling)

    def _activated(self, slots: int | Sequence[int]) -> "_Active":
        weights, chosen = self.weights_U_N, list(range(self.slots))
        some = [slots] if isinstance(slots, int) else sorted(set(slots))
        if torch.is_grad_enabled() and some != chosen:
            weights, chosen = _Chosen.apply(weights, torch.tensor(some, dtype=torch.long, device=weights.device)), some
        if isinstance(slots, int):
            return _Active(self._blocks, self._sizes, weights[chosen.index(slots)], None)
        places_B = torch.tensor([chosen.index(slot) for slot in slots], dtype=torch.long, device=weights.device)
        return _Active(self._blocks, self._sizes, weights, places_B)


class _Chosen(torch.autograd.Function):
    """Some slots' weights; their gradient is added to those slots' alone. Autograd would go over all adapters several times a pass."""

    @staticmethod
    def forward(ctx: Any, weights_U_N: Tensor, slots_S: Tensor) -> Tensor:
        ctx.weights_U_N, ctx.slots_S = weights_U_N, slots_S
        return weights_U_N.index_select(0, slots_S)

    @staticmethod
    def backward(ctx: Any, gradient_S_N: Tensor) -> tuple[Tensor | None, None]:
        weights_U_N, slots_S = ctx.weights_U_N, ctx.slots_S
        if weights_U_N.grad is None:
            return torch.zeros_like(weights_U_N).index_add_(0, slots_S, gradient_S_N), None
        weights_U_N.grad.index_add_(0, slots_S, gradient_S_N)
        return None, None


class _Active:
    """The matrices of one slot, or those of each row's, block by block.

    Args:
        blocks: how many layers each has that are computed one after the other.
        sizes: of A and B of each layer in turn.
        weights: of one slot, or of several.
        places_B: which of these each row's is; None for one slot.
    """

    def __init__(self, blocks: Sequence[int], sizes: Sequence[int], weights: Tensor, places_B: Tensor | None) -> None:
        self.places_B = places_B
        starts = [0, *accumulate(blocks)]
        self._sizes = [list(sizes[2 * first : 2 * last]) for first, last in pairwise(starts)]
        # One split for all blocks: its gradient is one concatenation, where a view for each would be a whole tensor of zeros each.
        self._weights = weights.split([sum(block) for block in self._sizes], dim=-1)
        self._places = [(block, number) for block, count in enumerate(blocks) for number in range(count)]
        self._block = -1
        self._parts: tuple[Tensor, ...] = ()

    def matrices(self, number: int) -> tuple[Tensor, Tensor]:
        """A and B of a layer, flat, of one slot or of each row."""
        block, place = self._places[number]
        # A block's first layer always gathers, so that a block that is computed again does all that it did before.
        if place == 0 or block != self._block:
            self._block = block
            found = self._weights[block]
            if self.places_B is not None:
                # Not by an index in brackets, whose gradient takes several times as long.
                found = found.index_select(0, self.places_B)
            self._parts = found.split(self._sizes[block], dim=-1)
        return self._parts[2 * place], self._parts[2 * place + 1]


class _StackedLinear(nn.Module):
    """A linear layer of the base with the stack's adapters beside it."""

    def __init__(self, linear: nn.Linear, stack: LoraStack, number: int) -> None:
        super().__init__()
        self.linear = linear
        # In a tuple, so that torch does not take the stack's weights for this module's own.
        self._stack = (stack,)
        self._number = number

    def forward(self, x_B_T_D: Tensor) -> Tensor:
        return self._stack[0].adapted(x_B_T_D, self.linear, self._number)


def _blocks(layers: Iterable[str]) -> list[int]:
    """How many of the layers, one after the other, are of the same block of the model: the path to it ends in a number."""
    return [len(list(names)) for _, names in groupby(layers, lambda name: BLOCK.sub(r"\1", name))]


def _as(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight.to(x.dtype) for weight in weights)


def _sizes(layer: nn.Linear, rank: int) -> tuple[int, int]:
    return rank * layer.in_features, layer.out_features * rank


def _fresh(layers: Mapping[str, nn.Linear], rank: int, *, seed: int) -> Tensor:
    """PEFT's own start, shape (N,): A uniform within 1/sqrt(D) (He et al. with a = sqrt 5), B zero, so that nothing changes yet."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for layer in layers.values():
        uniform = torch.rand(rank * layer.in_features, generator=generator) * 2 - 1
        pieces += [uniform / layer.in_features**0.5, torch.zeros(layer.out_features * rank)]
    return torch.cat(pieces)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
