"""Devices that a run is planned for: cards by name, and the one at hand by measurement."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from store.errors import ConfigError
from trainer.student.policy import pick_device

FLOPS_SHARE = 0.4
"""Of a card's peak that training reaches (model FLOPs utilisation)."""
BANDWIDTH_SHARE = 0.6
"""Of a card's peak that decoding reaches."""
MEMORY_SHARE = 0.9
"""Of a card's memory that tensors can have: CUDA's context, workspaces and gaps take the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a plan needs to know of a device."""

    name: str
    memory: int | None
    """Bytes that tensors can have; None: unknown."""
    flops: float
    """Floating-point operations a second of matrix products, as reached."""
    bandwidth: float
    """Bytes a second out of its memory, as reached."""
    card_memory: int | None = None
    """Bytes of the whole card."""


CARDS = {
    "B200-180GB": (180, 2250, 8000),
    "H200-141GB": (141, 989, 4800),
    "H100-80GB": (80, 989, 3350),
    "A100-80GB": (80, 312, 2039),
    "A100-40GB": (40, 312, 1555),
    "L40S-48GB": (48, 362, 864),
    "A6000-48GB": (48, 155, 768),
    "RTX5090-32GB": (32, 209, 1792),
    "RTX4090-24GB": (24, 165, 1008),
    "RTX3090-24GB": (24, 71, 936),
    "A10G-24GB": (24, 70, 600),
    "L4-24GB": (24, 121, 300),
}
"""Name -> memory in GB, bf16 TFLOPS (dense, float32 accumulation) and GB/s, from the makers' data sheets."""


def card(name: str) -> Device:
    """The card of that name; ConfigError with the nearest names when there is none."""
    if name not in CARDS:
        near = difflib.get_close_matches(name, CARDS, n=1, cutoff=0.3)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--gpu {name!r} is not known: {', '.join(CARDS)}{meant}")
    gigabytes, teraflops, gigabytes_a_second = CARDS[name]
    return Device(
        name=name,
        memory=round(MEMORY_SHARE * gigabytes * 1e9),
        flops=FLOPS_SHARE * teraflops * 1e12,
        bandwidth=BANDWIDTH_SHARE * gigabytes_a_second * 1e9,
        card_memory=round(gigabytes * 1e9),
    )


def at_hand(device_name: str, dtype: torch.dtype) -> Device:
    """The device that training would take here, measured in a moment."""
    device = pick_device(device_name)
    whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Device(
        name=str(device),
        memory=None if whole is None else round(MEMORY_SHARE * whole),
        flops=measured_flops(device, dtype),
        bandwidth=measured_bandwidth(device),
        card_memory=whole,
    )


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product on the device, best of five."""
    n = 4096 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best_seconds(lambda: a @ a)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over 256 MiB reads, best of five."""
    values = torch.zeros(2**26, device=device)
    return 4 * len(values) / _best_seconds(values.sum)


def _best_seconds(work: Callable[[], torch.Tensor]) -> float:
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float(work().flatten()[0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best
