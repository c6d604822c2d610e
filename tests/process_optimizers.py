"""Optimizers over weights that are dealt out, beside the same over whole ones; run by torchrun, it writes
whether they agree, by kind and weight.

torchrun --standalone --nproc-per-node 2 tests/process_optimizers.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.parallel.fsdp import full_tensor, gathered_state, shard_state
from trainer.parallel.world import World, torchrun_world
from trainer.student.optimizer import make_optimizer

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "offloaded": {"offload_optimizer": True},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "paged_adamw_8bit": {"optim": "paged_adamw_8bit"},
}

SHAPES = {
    "whole blocks": (64, 256),
    "whole blocks, the last process with fewer": (5, 2560),
    "whole blocks, none for the last process": (1, 8192),
    "blocks of two processes": (129, 33),
    "rows too few for 8 bits in a process": (4100,),
    "too small for 8 bits": (33, 33),
    "too small, none for the last process": (1, 100),
    "a bias": (8192,),
}


class Model(nn.Module):
    """Weights of all shapes, and nothing to do with them."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in weights)


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


def dealt(whole: list[Tensor], world: World) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.size,))
    return [distribute_tensor(each, mesh, [Shard(0)]) for each in whole]


def step(model: Model, optimizer: torch.optim.Optimizer, gradients: list[Any]) -> None:
    for weight, gradient in zip(model.weights, gradients, strict=True):
        weight.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def differences(kind: str, world: World) -> Iterator[str]:
    """What is not equal to the bit."""
    train = TrainConfig(learning_rate=1e-2, **KINDS[kind])
    one, many = Model(drawn(0)), Model(dealt(drawn(0), world))
    ours, theirs = make_optimizer(one, train), make_optimizer(many, train)
    for number in range(1, 6):
        if number == 4:  # as if stopped and gone on with
            state = gathered_state(theirs.state_dict(), world)
            yield from unequal("state", ours.state_dict(), world.gather(state)[0])
            theirs = make_optimizer(many, train)
            # A copy, as from a file: what is loaded may be kept as it is.
            theirs.load_state_dict(shard_state(deepcopy(ours.state_dict()), theirs))
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / number
        step(one, ours, drawn(number))
        step(many, theirs, dealt(drawn(number), world))
    for name, mine, other in zip(SHAPES, one.weights, many.weights, strict=True):
        if not full_tensor(other).equal(mine.data):
            yield f"weight: {name}"


def unequal(where: str, mine: Any, other: Any) -> Iterator[str]:
    if isinstance(mine, dict):
        if mine.keys() != other.keys():
            yield f"{where}: {sorted(map(str, mine))}, {sorted(map(str, other))}"
            return
        for key in mine:
            yield from unequal(f"{where}/{key}", mine[key], other[key])
    elif isinstance(mine, Tensor):
        if type(other) is not Tensor or mine.dtype != other.dtype or not mine.equal(other):
            yield where
    elif mine != other:
        yield f"{where}: {mine}, {other}"


def main(out: str) -> None:
    with torchrun_world("cpu") as world:
        found = {kind: list(differences(kind, world)) for kind in KINDS}
        if world.is_main:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
