"""The optimizer and its learning rate: schedules by hand, and who decays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import tiny_model

from trainer.config import TrainConfig
from trainer.student.optimizer import learning_rate_at, make_optimizer


def rates(steps: range, **changes: Any) -> list[float]:
    config = TrainConfig(**{"learning_rate": 0.8, "warmup_steps": 4, "max_steps": 8, **changes})
    return [learning_rate_at(step, config) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8]),
        # Four steps remain after the warmup, with shares of 0, 1/4, 2/4 and 3/4 done: 0.8 * (1 - share).
        ("linear", [0.8, 0.6, 0.4, 0.2]),
        # 0.8 * (1 + cos(pi * share)) / 2, with cos(pi / 4) = sqrt(1/2).
        ("cosine", [0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.4 * (1 - math.sqrt(0.5))]),
    ],
)
def test_the_rate_rises_in_equal_steps_and_then_follows_the_schedule(
    schedule: str, after_warmup: list[float]
) -> None:
    # 0.8 * (1/4, 2/4, 3/4, 4/4): the first step already learns.
    assert rates(range(1, 9), lr_schedule=schedule) == pytest.approx([0.2, 0.4, 0.6, 0.8, *after_warmup])
    assert rates(range(1, 2), lr_schedule=schedule, warmup_steps=0) == [0.8]
    # A run that ends within its warmup only rises.
    assert rates(range(1, 3), lr_schedule=schedule, max_steps=2) == pytest.approx([0.2, 0.4])


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Without a gradient AdamW only decays: w * (1 - 0.1 * 0.5) = 0.95 w.
    for name, parameter in model.named_parameters():
        kept = 1.0 if name.endswith("bias") or "norm" in name else 0.95
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)


def test_every_weight_that_trains_is_in_one_group_and_a_frozen_one_in_none() -> None:
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = make_optimizer(model, TrainConfig())
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(trained)
    # A model of matrices alone has no empty group.
    assert len(make_optimizer(torch.nn.Linear(2, 2, bias=False), TrainConfig()).param_groups) == 1


@pytest.mark.parametrize(
    ("optim", "kind"),
    [("adamw", "AdamW"), ("adamw_8bit", "AdamW8bit"), ("paged_adamw_8bit", "PagedAdamW8bit")],
)
def test_the_config_names_the_kind_and_its_constants(optim: str, kind: str) -> None:
    config = TrainConfig(optim=optim, adam_beta1=0.7, adam_beta2=0.8, learning_rate=0.3)  # type: ignore[arg-type]
    optimizer = make_optimizer(tiny_model(), config)
    assert type(optimizer).__name__ == kind
    for group in optimizer.param_groups:
        assert (tuple(group["betas"]), group["lr"]) == ((0.7, 0.8), 0.3)
