"""Log-probability and entropy of target tokens under a head's logits, which are never kept.

Logits exist for one slice of the vocabulary at a time, in float32 whatever the model computes in: bfloat16
logits are 0.125 apart, so near scores would tie. The forward pass joins the sums of the slices (online
softmax, arXiv 1805.02867). The backward pass computes a slice again and turns it into its gradient in place:

    d log p_t / d z_j = 1[j = t] - p_j        d H / d z_j = -p_j (log p_j + H)        z = logits / temperature

Shapes: N target tokens, H hidden units, V entries of the vocabulary, S of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLICE_VALUES = {"cpu": 2**22, "cuda": 2**25}
"""Device -> logits, or weights of the head, that are float32 at once: few enough for a CPU's cache, and so
many on CUDA (128 MiB) that launching its kernels takes less time than they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitScale:
    """The way from the head's product to the logits that tokens are sampled from."""

    temperature: float = 1.0
    softcap: float | None = None
    """c of c * tanh(logits / c), before the temperature."""
    tensor_cores: bool = False
    """True if products may read 10 bits (`products_on`)."""


class TargetValues(torch.autograd.Function):
    """Returns log-probability [N], or that and entropy [N] in nats, of targets [N] under hidden [N, H],
    weight [V, H] and bias [V] in any floating type."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: LogitScale,
        entropy: bool,
    ) -> tuple[Tensor, ...]:
        """Joins maximum, sum of e^(z - maximum), sum of z e^(z - maximum) and the target's z over slices."""
        total, weighted, chosen = hidden.new_zeros((3, len(hidden), 1), dtype=torch.float32)
        top = torch.full_like(total, torch.finfo(torch.float32).min)
        with products_on(scale.tensor_cores):
            for start, z in _slices(hidden, weight, bias, scale):
                index, inside = _within(targets, start, z)
                chosen = torch.where(inside, z.gather(1, index), chosen)
                before, top = top, torch.maximum(top, z.amax(dim=1, keepdim=True))
                rescale = torch.exp(before - top)
                p = torch.exp(z - top) if entropy else z.sub_(top).exp_()
                total = total * rescale + p.sum(dim=1, keepdim=True)
                if entropy:
                    weighted = weighted * rescale + p.mul_(z).sum(dim=1, keepdim=True)
        log_total = top + total.log()
        entropies = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, bias, targets, log_total, entropies)
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # an entropy that nobody differentiates costs no backward pass
        found = ((chosen - log_total).squeeze(1), entropies.squeeze(1))
        return found if entropy else found[:1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden, weight and bias, each where it is wanted."""
        hidden, weight, bias, targets, log_total, entropies = ctx.saved_tensors
        scale, wide_hidden = ctx.scale, hidden.float()
        of_logprobs, of_entropy = torch.zeros_like(log_total), None
        if gradients[0] is not None:
            of_logprobs = gradients[0].unsqueeze(1) / scale.temperature
        if len(gradients) > 1 and gradients[1] is not None:
            of_entropy = gradients[1].unsqueeze(1) / scale.temperature
        inputs = (wide_hidden, weight, bias)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(value) if wanted else None
            for value, wanted in zip(inputs, ctx.needs_input_grad, strict=False)
        )
        with products_on(scale.tensor_cores):
            for start, z in _slices(hidden, weight, bias, scale):
                end = start + z.shape[1]
                if scale.softcap is not None:
                    slope = 1 - (z * (scale.temperature / scale.softcap)).square_()
                z.sub_(log_total)
                if of_entropy is None:
                    of_z = z.exp_().mul_(-of_logprobs)
                else:
                    p = z.exp()
                    of_z = z.add_(entropies).mul_(of_entropy).add_(of_logprobs).mul_(p).neg_()
                index, inside = _within(targets, start, z)
                of_z.scatter_add_(1, index, torch.where(inside, of_logprobs, 0.0))
                if scale.softcap is not None:
                    of_z.mul_(slope)
                if of_hidden is not None:
                    of_hidden.addmm_(of_z, weight[start:end].float())
                if of_weight is not None:
                    of_weight[start:end] = of_z.T @ wide_hidden
                if of_bias is not None:
                    of_bias[start:end] = of_z.sum(dim=0)
        return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight, of_bias, None, None, None


def _slices(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: LogitScale
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first entry, z [N, S] float32) of each slice of the vocabulary."""
    size = max(1, SLICE_VALUES["cuda" if hidden.is_cuda else "cpu"] // max(hidden.shape))
    for start in range(0, len(weight), size):
        z = _product(hidden, weight[start : start + size])
        if bias is not None:
            z += bias[start : start + size]
        if scale.softcap is not None:
            z.div_(scale.softcap).tanh_().mul_(scale.softcap)
        yield start, z if scale.temperature == 1 else z.div_(scale.temperature)


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns hidden weight^T [N, S] float32. Operands that have 16 bits already lose none."""
    if hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def _within(targets: Tensor, start: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the targets' columns [N, 1] in a slice, and whether they are in it [N, 1]."""
    index = targets.unsqueeze(1) - start
    return index.clamp(0, z.shape[1] - 1), (index >= 0) & (index < z.shape[1])


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


def target_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: LogitScale | None = None,
    entropy: bool = False,
) -> tuple[Tensor, ...]:
    """Returns `TargetValues` of these, differentiable once."""
    found: tuple[Tensor, ...] = TargetValues.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, scale or LogitScale(), entropy
    )
    return found
