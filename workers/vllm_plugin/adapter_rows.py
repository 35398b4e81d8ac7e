"""Adapters on the CPU, each on its own rows only.

vLLM 0.32's PyTorch kernels take index -1, which marks rows of the base model, for the last adapter slot: in a batch beside adapters the
base model's replies, and its cached prefixes, were changed by one of them (vllm-project/vllm#48421 and #49656). They also gather an
adapter's weights once a token: prompts under adapters took ten times as long. Drop this when vLLM has it fixed.
"""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class AdapterRows(PunicaWrapperCPU):
    """Applies adapters to stretches of consecutive rows (tokens). R rank, D width."""

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """`y += scale * x A^T B^T` in the rows that have an adapter; A is (slots, 1, R, D_in), B is (slots, 1, D_out, R)."""
        starts, lengths, slots, *_counts = self.prefill_metadata
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for start, length, slot in zip(starts.tolist(), lengths.tolist(), slots.tolist(), strict=True):
            if slot < 0:
                continue
            rows, left = slice(start, start + length), 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                y[rows, left : left + width].addmm_(x[rows] @ a[slot, 0].T, b[slot, 0].T, alpha=scale)
                left += width
