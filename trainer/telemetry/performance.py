"""A step's performance: seconds and share of each phase, tokens per second, peak memory, MFU.

MFU (model FLOPs utilization, PaLM, arXiv 2204.02311): the operations that the model's mathematics needs, over
what the device could do in the same seconds. Padding, recomputed activations and idle time all lower it.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from store.errors import TrainingError
from trainer.method.groups import Group
from trainer.student.batches import TokenBatch
from trainer.student.policy import Policy
from trainer.timing import StepTimer, settler

PEAK_TERAFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 matrix products with float32 sums, in 10^12 operations a second, by a part of the device's
name. The first match counts, so longer names come first."""

MEMORY_PHASES = ("sample", "score", "update")
"""Phases whose peak memory is reported; the others allocate little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Operations of a model's passes."""

    weights: int
    """Weights that multiply each token: all but looked-up embeddings."""
    attention_width: int
    """Layers times heads times head size."""
    trains_weights: bool
    """False where adapters alone train: the backward pass needs no gradient of the frozen weights."""

    def forward(self, lengths: Iterable[int]) -> float:
        """Operations of a forward pass over sequences of these lengths: two for each weight and token, and
        those of attention, in which a token sees half of its sequence on average."""
        return float(sum(2 * self.weights * n + 2 * self.attention_width * n * n for n in lengths))

    def update(self, lengths: Iterable[int]) -> float:
        """Forward and backward: three times the forward pass, or twice where the weights are frozen."""
        return (3.0 if self.trains_weights else 2.0) * self.forward(lengths)


def arithmetic_of(policy: Policy) -> Arithmetic | None:
    """Reads the shape off the model, 4-bit weights unpacked. None for a model whose weights do not all
    multiply every token, such as a mixture of experts."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    known = [module for module in policy.causal.modules() if isinstance(module, kinds)]
    counted = {id(p): p.numel() for module in known for p in module.parameters(recurse=False)}
    if sum(counted.values()) < 0.98 * sum(p.numel() for p in policy.causal.parameters()):
        return None
    text = policy.causal.config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    linear = [module for module in known if isinstance(module, torch.nn.Linear)]
    return Arithmetic(
        weights=sum(layer.in_features * layer.out_features for layer in linear),
        attention_width=text.num_hidden_layers * heads * size,
        trains_weights=policy.model is policy.causal,
    )


def peak_flops(device_name: str) -> float | None:
    """Operations a second that the device could do in bfloat16; None for an unknown device."""
    found = (peak * 1e12 for name, peak in PEAK_TERAFLOPS.items() if name in device_name)
    return next(found, None)


class PerformanceMeter:
    """Measures the steps of one policy on its device and the other ranks' `devices - 1`."""

    def __init__(self, policy: Policy, *, devices: int = 1) -> None:
        self._device = policy.device
        self._arithmetic = arithmetic_of(policy)
        on_cuda = policy.device.type == "cuda"
        peak = peak_flops(torch.cuda.get_device_name(policy.device)) if on_cuda else None
        self._peak = None if peak is None else peak * devices

    def begin(self) -> StepTimer:
        """The timer of a new step."""
        return StepTimer(settle=settler(self._device), peak_memory=lambda: peak_memory(self._device))

    def row(
        self, timer: StepTimer, groups: Sequence[Group], advantages: Tensor, tokens: int
    ) -> dict[str, Any]:
        """A finished step's metrics. advantages: [N, G] of the groups' members; tokens: response tokens that
        carried a gradient."""
        seconds, total, peaks = timer.seconds, timer.total, timer.peaks
        sampled = sum(len(sample.token_ids) for group in groups for sample in group.samples)
        return {
            **{f"seconds/{phase}": round(spent, 4) for phase, spent in seconds.items()},
            "seconds/step": round(total, 4),
            **{f"share/{phase}": round(spent / total, 4) for phase, spent in seconds.items()},
            "tokens_per_second/sampled": _rate(sampled, seconds["sample"] + seconds["verify"]),
            "tokens_per_second/trained": _rate(tokens, seconds["update"]),
            "memory/peak_mib": _mib(max(peaks.values(), default=0)),
            **{
                f"memory/peak_mib/{phase}": _mib(peaks[phase]) if phase in peaks else None
                for phase in MEMORY_PHASES
            },
            **self._utilization(groups, advantages, seconds),
        }

    def _utilization(
        self, groups: Sequence[Group], advantages: Tensor, seconds: Mapping[str, float]
    ) -> dict[str, float | None]:
        if self._arithmetic is None or self._peak is None:
            return {"mfu/sample": None, "mfu/update": None}
        sampled = self._arithmetic.forward(sampled_lengths(groups))
        trained = self._arithmetic.update(trained_lengths(groups, advantages))
        return {
            "mfu/sample": _rate(sampled / self._peak, seconds["sample"]),
            "mfu/update": _rate(trained / self._peak, seconds["update"]),
        }


def sampled_lengths(groups: Sequence[Group]) -> list[int]:
    """Prompt and response tokens of every sample of the student."""
    return [len(group.prompt.ids) + len(sample.token_ids) for group in groups for sample in group.samples]


def trained_lengths(groups: Sequence[Group], advantages: Tensor) -> list[int]:
    """Prompt and response tokens of every member that carries a gradient; advantages [N, G]."""
    return [
        len(group.prompt.ids) + len(member.token_ids)
        for group, row in zip(groups, advantages.tolist(), strict=True)
        for member, advantage in zip(group.members, row, strict=True)
        if advantage
    ]


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took since the last call, on the CPU the most that the process
    held resident since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage may give the peak of the parent process.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def probe_memory(policy: Policy, optimizer: torch.optim.Optimizer, *, longest: int, max_tokens: int) -> None:
    """Trains on the largest micro-batch once, without an effect on weights, gradients or generators.

    All ranks have to call it. Raises TrainingError when the device has too little memory.

    Args:
        longest: prompt and response tokens of the longest sequence.
        max_tokens: `train.max_tokens_per_microbatch`.
    """
    ids = torch.full((max(1, max_tokens // longest), longest), policy.pad_id, device=policy.device)
    target_mask = torch.ones_like(ids, dtype=torch.bool)
    target_mask[:, 0] = False
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    policy.model.train()
    try:
        # AdamW has no state yet, and will have two values a weight.
        copies = 2 if isinstance(optimizer, torch.optim.AdamW) else 0
        held = [torch.empty_like(weight) for weight in weights for _ in range(copies)]
        logprobs, entropy = policy.logprobs_and_entropy(TokenBatch(input_ids=ids, target_mask=target_mask))
        ((logprobs + entropy).sum() * 0.0).backward()  # type: ignore[no-untyped-call]
        del held
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory in a micro-batch of {len(ids)} x {longest} tokens: lower "
            f"train.max_tokens_per_microbatch = {max_tokens} or rollout.max_completion_length, or set "
            "student.gradient_checkpointing = true"
        ) from error
    finally:
        policy.model.eval()
        optimizer.zero_grad(set_to_none=True)


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def _rate(amount: float, seconds: float) -> float | None:
    """None where nothing was done, which took no time either."""
    return round(amount / seconds, 4) if amount and seconds else None
