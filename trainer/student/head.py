"""Float32 logits of a head in any type, and their log-probabilities and entropy.

A head of 152,064 x 3,584 takes 1.1 GB in bfloat16 and 2.2 GB more in float32, which autograd would keep until
the backward pass. Here a narrow head is widened a slice of the vocabulary at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

VALUES_PER_SLICE = 2**24
"""Values of a narrow head that are float32 at once: 64 MiB."""


class HeadProduct(torch.autograd.Function):
    """Returns hidden weight^T [N, V] float32 of hidden [N, H] float32 and weight [V, H] in any floating
    type."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tensor_cores: bool) -> Tensor:
        """Computes in float32, a slice of the vocabulary at a time."""
        ctx.save_for_backward(hidden if weight.requires_grad else None, weight)
        ctx.tensor_cores = tensor_cores
        logits = hidden.new_empty(len(hidden), len(weight))
        with products_on(tensor_cores):
            for start, wide in _slices(weight):
                torch.mm(hidden, wide.T, out=logits[:, start : start + len(wide)])
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Returns the gradients [N, H] of hidden and [V, H] of weight, each where it is wanted."""
        hidden, weight = ctx.saved_tensors
        of_hidden = of_weight = None
        with products_on(ctx.tensor_cores):
            if ctx.needs_input_grad[0]:
                of_hidden = gradients[0].new_zeros(len(gradients[0]), weight.shape[1])
                for start, wide in _slices(weight):
                    of_hidden.addmm_(gradients[0][:, start : start + len(wide)], wide)
            if ctx.needs_input_grad[1]:
                of_weight = (gradients[0].T @ hidden).to(weight.dtype)
        return of_hidden, of_weight, None


@contextmanager
def products_on(tensor_cores: bool) -> Iterator[None]:
    """Lets float32 products on CUDA read 10 bits (TF32) in the block; their sums stay float32.

    In the block alone: models make rotary angles by such products too, and 10 bits cannot distinguish two
    positions beyond 2,048.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tensor_cores else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _slices(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, rows in float32) of a [V, H] weight; a float32 weight is one slice."""
    rows = len(weight) if weight.dtype == torch.float32 else max(1, VALUES_PER_SLICE // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield start, weight[start : start + rows].float()


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, tensor_cores: bool = False) -> Tensor:
    """Returns [N, V] float32 logits of hidden [N, H], weight [V, H] and bias [V], in float32 arithmetic.

    `tensor_cores`: products read 10 bits (`products_on`), for hidden states that have fewer. With 150,000
    tokens full float32 would cost more than the whole body; bfloat16 logits would be 0.125 apart.
    """
    bias = None if bias is None else bias.float()
    if weight.dtype == torch.float32 and not tensor_cores:
        return torch.nn.functional.linear(hidden.float(), weight, bias)
    logits: Tensor = HeadProduct.apply(hidden.float(), weight, tensor_cores)  # type: ignore[no-untyped-call]
    return logits if bias is None else logits + bias


def log_softmax_at(logits: Tensor, chosen: Tensor, *, entropy: bool = False) -> tuple[Tensor, ...]:
    """Returns ([...],): log softmax of logits [..., V] at `chosen` [...], indices into V.

    With `entropy` ([...], [...]): also the entropy of each distribution, in nats.
    """
    log_total = torch.logsumexp(logits, dim=-1)
    found = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - log_total
    if not entropy:
        return (found,)
    probabilities = torch.exp(logits - log_total.unsqueeze(-1))
    # -inf logits (masked tokens) have probability 0 and add nothing: 0 * -inf would be nan.
    expected = (probabilities * logits.masked_fill(probabilities == 0, 0.0)).sum(dim=-1)
    return found, log_total - expected
