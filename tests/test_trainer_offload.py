"""State in host memory: the plain optimizer's result to the bit, and one checkpoint for both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from memory_watch import storage_of

from precompute.config import load_config
from store.errors import ConfigError
from trainer.config import Config, TrainConfig
from trainer.student import offload
from trainer.student.optimizer import make_optimizer

SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.95}


def made(*, offloaded: bool) -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_model()
    return model, make_optimizer(model, TrainConfig(offload_optimizer=offloaded, **SETTINGS))  # type: ignore[arg-type]


def take_steps(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        next(model.parameters()).grad = None if step == 1 else next(model.parameters()).grad
        optimizer.step()


def assert_same_weights(one: Any, other: Any) -> None:
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_offloaded_steps_are_the_plain_ones_to_the_bit() -> None:
    plain, offloaded = made(offloaded=False), made(offloaded=True)
    assert type(offloaded[1]).__name__ == "OffloadedAdamW"
    take_steps(*plain, range(5))
    take_steps(*offloaded, range(5))
    assert_same_weights(plain[0], offloaded[0])


def test_a_weight_in_many_pieces_moves_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, offloaded = made(offloaded=False), made(offloaded=True)
    take_steps(*plain, range(3))
    monkeypatch.setattr(offload, "VALUES_AT_ONCE", 1000)  # an embedding of 99 x 32 in four pieces
    take_steps(*offloaded, range(3))
    for one, other in zip(plain[0].parameters(), offloaded[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_either_goes_on_from_a_checkpoint_of_the_other(first: bool, second: bool) -> None:
    straight = made(offloaded=False)
    take_steps(*straight, range(5))
    begun, going_on = made(offloaded=first), made(offloaded=second)
    take_steps(*begun, range(2))
    going_on[0].load_state_dict(begun[0].state_dict())
    going_on[1].load_state_dict(begun[1].state_dict())
    take_steps(*going_on, range(2, 5))
    assert_same_weights(straight[0], going_on[0])


def test_restored_state_is_the_optimizers_own() -> None:
    begun, going_on = made(offloaded=True), made(offloaded=True)
    take_steps(*begun, range(1))
    saved = begun[1].state_dict()
    going_on[1].load_state_dict(saved)
    for state, kept in zip(saved["state"].values(), going_on[1].state.values(), strict=True):
        assert all(storage_of(state[name]) != storage_of(kept[name]) for name in state)


def test_offloading_an_8_bit_optimizer_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r'offload_optimizer = true needs optim = "adamw", not "adamw_8bit"'
    ):
        load_config(Config, None, ["train.offload_optimizer=true", "train.optim=adamw_8bit"])
