"""Float32 logits from a frozen head in a narrow type, without a float32 copy of it.

A head of 152,064 x 3,584 takes 1.1 GB in bfloat16 and 2.2 GB more in float32, which autograd would keep to
the backward pass. Here it is widened a slice of the vocabulary at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

VALUES_PER_SLICE = 2**24
"""Values of the head that are float32 at once: 64 MiB."""


class NarrowHead(torch.autograd.Function):
    """hidden [N, H] float32, weight [V, H] frozen, in any floating type -> hidden weight^T [N, V] float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tensor_cores: bool) -> Tensor:
        """What a float32 copy of the weight would give."""
        ctx.save_for_backward(weight)
        ctx.tensor_cores = tensor_cores
        logits = hidden.new_empty(len(hidden), len(weight))
        with products_on(tensor_cores):
            for at, wide in _slices(weight):
                logits[:, at : at + len(wide)] = hidden @ wide.T
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """[N, V] -> [N, H]; the weight is frozen and gets none."""
        (weight,) = ctx.saved_tensors
        of_hidden = gradients[0].new_zeros(len(gradients[0]), weight.shape[1])
        with products_on(ctx.tensor_cores):
            for at, wide in _slices(weight):
                of_hidden.addmm_(gradients[0][:, at : at + len(wide)], wide)
        return of_hidden, None, None


class TensorCoreHead(torch.autograd.Function):
    """hidden [N, H], weight [V, H], both float32 -> hidden weight^T [N, V] float32, on tensor cores."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with products_on(True):
            return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """[N, V] -> [N, H] and [V, H], each where it is wanted."""
        hidden, weight = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad
        with products_on(True):
            return (
                gradients[0] @ weight if of_hidden else None,
                gradients[0].T @ hidden if of_weight else None,
            )


@contextmanager
def products_on(tensor_cores: bool) -> Iterator[None]:
    """For the block float32 products on CUDA read 10 bits (TF32); their sums stay float32.

    For the block alone: models make rotary angles by such products too, and 10 bits tell no two positions
    beyond 2,048 apart.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tensor_cores else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _slices(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in float32) of a [V, H] weight."""
    rows = max(1, VALUES_PER_SLICE // weight.shape[1])
    for at in range(0, len(weight), rows):
        yield at, weight[at : at + rows].float()


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, tensor_cores: bool = False) -> Tensor:
    """hidden [N, H], weight [V, H], bias [V] -> [N, V] float32, in float32 arithmetic whatever comes in.

    `tensor_cores`: products read 10 bits (`products_on`), for hidden states of fewer. With 150,000 tokens
    full float32 would cost more than the whole body; logits in bfloat16 would be 0.125 apart.
    """
    wide_bias = None if bias is None else bias.float()
    if weight.dtype != torch.float32 and not weight.requires_grad:
        logits: Tensor = NarrowHead.apply(hidden.float(), weight, tensor_cores)  # type: ignore[no-untyped-call]
    elif tensor_cores:
        logits = TensorCoreHead.apply(hidden.float(), weight.float())  # type: ignore[no-untyped-call]
    else:
        return torch.nn.functional.linear(hidden.float(), weight.float(), wide_bias)
    return logits if wide_bias is None else logits + wide_bias
