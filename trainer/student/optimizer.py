"""Makes the optimizer, and sets its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from store.errors import EngineError, install_hint
from trainer.config import TrainConfig


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns AdamW over the weights that train; matrices decay, biases and norms do not.

    Raises EngineError when an 8-bit kind is configured and bitsandbytes is not installed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2)}
    if config.optim == "adamw":
        # Unfused, AdamW makes temporaries as large as all the weights.
        return torch.optim.AdamW(groups, **options, fused=trained[0].is_cuda or None)
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError:
        raise EngineError(
            f'train.optim = "{config.optim}" needs bitsandbytes: {install_hint("qlora")}'
        ) from None
    kind = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[config.optim]
    optimizer: torch.optim.Optimizer = kind(groups, **options)
    return optimizer


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of a 1-based sampling step: linear warmup, then the schedule down to 0.

    It depends on the step alone, so a resumed run needs no scheduler state.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    span = max(config.max_steps - config.warmup_steps, 1)
    done = (step - 1 - config.warmup_steps) / span
    if config.lr_schedule == "linear":
        return config.learning_rate * (1.0 - done)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
