"""Float32 logits from a frozen head in a narrow type, without a float32 copy of it.

A head of 152,064 x 3,584 takes 1.1 GB in bfloat16 and 2.2 GB more in float32, which autograd would keep to
the backward pass. Here it is widened a slice of the vocabulary at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

VALUES_PER_SLICE = 2**24
"""Values of the head that are float32 at once: 64 MiB."""


class NarrowHead(torch.autograd.Function):
    """hidden [N, H] float32, weight [V, H] frozen, in any floating type -> hidden weight^T [N, V] float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """What a float32 copy of the weight would give."""
        ctx.save_for_backward(weight)
        logits = hidden.new_empty(len(hidden), len(weight))
        for at, wide in _slices(weight):
            logits[:, at : at + len(wide)] = hidden @ wide.T
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """[N, V] -> [N, H]; the weight is frozen and gets none."""
        (weight,) = ctx.saved_tensors
        of_hidden = gradients[0].new_zeros(len(gradients[0]), weight.shape[1])
        for at, wide in _slices(weight):
            of_hidden.addmm_(gradients[0][:, at : at + len(wide)], wide)
        return of_hidden, None


def _slices(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in float32) of a [V, H] weight."""
    rows = max(1, VALUES_PER_SLICE // weight.shape[1])
    for at in range(0, len(weight), rows):
        yield at, weight[at : at + rows].float()


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [N, H], weight [V, H], bias [V] -> [N, V] float32, in float32 arithmetic whatever comes in (but
    see `let_heads_use_tensor_cores`)."""
    wide_bias = None if bias is None else bias.float()
    if weight.dtype == torch.float32 or weight.requires_grad:
        return torch.nn.functional.linear(hidden.float(), weight.float(), wide_bias)
    logits: Tensor = NarrowHead.apply(hidden.float(), weight)  # type: ignore[no-untyped-call]
    return logits if wide_bias is None else logits + wide_bias


def let_heads_use_tensor_cores(device: torch.device, dtype: torch.dtype) -> None:
    """Under bfloat16 on CUDA, float32 products, of which there are the head's alone, read 10 bits (TF32).

    Its hidden states have 7 then, and with 150,000 tokens full float32 would cost more than the whole body.
    Sums and logits stay float32: logits in bfloat16 would be 0.125 apart.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
