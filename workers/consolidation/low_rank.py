"""One linear layer with its adapters, forward and backward by hand."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class LowRank(torch.autograd.Function):
    """y = x W^T + bias + scaling * (x A^T) B^T, for one adapter or a batch of rows with one each; W and the bias are frozen.

    By hand, because each of the two sums then needs no memory and no pass of its own: what the adapter adds goes into y in place, and
    likewise its part of the gradient of x. A step of the default model on a CPU takes some percent less (docs/benchmarks.md).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        y, low = functional.linear(x, weight, bias), x @ a.mT
        # The smallest tensor of all is scaled.
        low *= scaling
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return _add_product(y, low, b.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        of_low = gradient @ b
        of_low *= ctx.scaling
        of_x = _add_product(gradient @ weight, of_low, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_low.mT @ x, gradient.mT @ low, None


def _add_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y += left @ right, in place."""
    return y.addmm_(left, right) if y.dim() == 2 else y.baddbmm_(left, right)
