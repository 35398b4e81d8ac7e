"""AdamW over a stack: each slot at its own step and its own learning rate, as if it were alone.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   w = w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

(arXiv 1711.05101, without weight decay: the KL term is what pulls an adapter back.) torch's own knows one learning rate and one
step for a whole tensor, where slots start, resume and end at steps of their own.

Letters: U slots, N numbers of one adapter, S slots that take a step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.99)
EPSILON = 1e-8


class SlotAdamW:
    """The moments of all slots of one tensor."""

    def __init__(self, weights_U_N: Tensor) -> None:
        self._weights_U_N = weights_U_N
        self.first_U_N = torch.zeros_like(weights_U_N, requires_grad=False)
        self.second_U_N = torch.zeros_like(weights_U_N, requires_grad=False)

    @torch.no_grad()
    def step(self, gradient_S_N: Tensor, slots: Sequence[int], *, rates: Sequence[float], steps: Sequence[int]) -> None:
        """Move the slots against their gradients.

        Args:
            rates: each slot's learning rate.
            steps: the number of each slot's step, from 1.
        """
        device = self._weights_U_N.device
        at = torch.as_tensor(slots, device=device)
        count_S_1 = torch.as_tensor(steps, device=device, dtype=torch.float32)[:, None]
        rate_S_1 = torch.as_tensor(rates, device=device, dtype=torch.float32)[:, None]
        first = self.first_U_N[at].lerp_(gradient_S_N, 1 - BETAS[0])
        second = self.second_U_N[at].mul_(BETAS[1]).addcmul_(gradient_S_N, gradient_S_N, value=1 - BETAS[1])
        self.first_U_N[at], self.second_U_N[at] = first, second
        size = (second / (1 - BETAS[1] ** count_S_1)).sqrt_().add_(EPSILON)
        self._weights_U_N[at] -= rate_S_1 * (first / (1 - BETAS[0] ** count_S_1)) / size


def clipped(gradient_S_N: Tensor, *, most: float) -> Tensor:
    """Each slot's gradient scaled to a norm of at most `most`."""
    norm_S_1 = gradient_S_N.norm(dim=1, keepdim=True)
    return gradient_S_N * (most / (norm_S_1 + 1e-6)).clamp(max=1.0)
