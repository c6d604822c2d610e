"""A step's performance: seconds and share of each phase, tokens per second, peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch

from store.errors import TrainingError
from trainer.method.groups import Group
from trainer.student.batches import TokenBatch
from trainer.student.policy import Policy
from trainer.timing import StepTimer

MEMORY_PHASES = ("sample", "score", "update")
"""Phases whose peak memory is reported; the others allocate little."""


def performance_metrics(timer: StepTimer, groups: Sequence[Group], trained_tokens: float) -> dict[str, Any]:
    """Returns a finished step's metrics; `trained_tokens`: response tokens that carried a gradient."""
    seconds, total, peaks = timer.seconds, timer.total(), timer.peaks
    sampled_tokens = sum(len(sample.token_ids) for group in groups for sample in group.samples)
    return {
        **{f"seconds/{phase}": round(spent, 4) for phase, spent in seconds.items()},
        "seconds/step": round(total, 4),
        **{f"share/{phase}": round(spent / total, 4) for phase, spent in seconds.items()},
        "tokens_per_second/sampled": _rate(sampled_tokens, seconds["sample"] + seconds["verify"]),
        "tokens_per_second/trained": _rate(trained_tokens, seconds["update"]),
        "memory/peak_mib": _mib(max(peaks.values(), default=0)),
        **{
            f"memory/peak_mib/{phase}": _mib(peaks[phase]) if phase in peaks else None
            for phase in MEMORY_PHASES
        },
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took since the last call, on the CPU the most that the process
    held resident since it began. Waits for what CUDA still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
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
