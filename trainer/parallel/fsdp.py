"""Weights, gradients and optimizer state sharded over the ranks: PyTorch's FSDP2.

Rank 0 reads the weights into host memory, and they are sharded a layer at a time. No other rank ever holds
all of them.

Each rank keeps 1/size of every weight in float32. A layer's weights are gathered while it computes, in the
type that it computes in, and resharded afterwards. Gradients are summed in float32.

In a single process nothing is changed, and FSDP2 is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from store.errors import ConfigError, EngineError
from trainer.config import Config
from trainer.parallel.world import World


class Shardable(Protocol):
    """The part of a Policy that is needed here."""

    model: Any
    causal: Any
    device: torch.device
    dtype: torch.dtype
    target_values: Any
    gathered: Any
    shards: list[Any]
    is_gathered: bool

    def computing(self) -> AbstractContextManager[Any]: ...


def check_shardable(config: Config, world: World) -> None:
    """Raises ConfigError for settings that work in a single process only."""
    if world.size == 1:
        return
    if config.train.optim != "adamw":
        raise ConfigError(
            f'train.optim = "{config.train.optim}" works in one process, not in {world.size}: bitsandbytes '
            'takes unsharded weights; set it to "adamw", whose state is sharded over the ranks'
        )
    if config.student.load_in_4bit:
        raise ConfigError(
            f"student.load_in_4bit = true works in one process, not in {world.size}: weights are sharded by "
            "rows, and bitsandbytes packs 4-bit ones in blocks without rows; set it to false"
        )


def initial_device(world: World) -> torch.device | None:
    """The device on which `load_policy` creates a model that `shard` then moves; None: the student's own."""
    if world.size == 1:
        return None
    return torch.device("cpu" if world.is_main else "meta")


def shard(policy: Shardable, world: World) -> None:
    """Shards the policy's weights over the ranks, which have to make each pass together from here on."""
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _check_same_model(policy, world)
    mesh = init_device_mesh(policy.device.type, (world.size,))
    # Layers are gathered in the type they compute in. Embedding, last norm and head stay float32, since the
    # residual stream and the logits are computed in it.
    layer_types = MixedPrecisionPolicy(
        param_dtype=None if policy.dtype == torch.float32 else policy.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    _broadcast_buffers(policy)
    # The blocks that transformers itself would not split.
    kinds = set(policy.causal._no_split_modules or ())
    layers = [module for module in policy.causal.modules() if type(module).__name__ in kinds]
    for layer in layers:
        _broadcast_weights(layer, policy.device)
        fully_shard(layer, mesh=mesh, mp_policy=layer_types)
    _broadcast_weights(policy.causal, policy.device)
    fully_shard(policy.causal, mesh=mesh)
    policy.shards = [*layers, policy.causal]
    for module in policy.shards:
        # The loss is divided by counts of the whole step, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # FSDP gathers around registered methods only.
    policy.causal.target_values = policy.target_values
    register_fsdp_forward_method(policy.causal, "target_values")
    policy.target_values = policy.causal.target_values
    policy.gathered = partial(gathered_weights, policy)
    _first_pass(policy)


def _check_same_model(policy: Shardable, world: World) -> None:
    named = [*policy.causal.named_parameters(), *policy.causal.named_buffers()]
    mine = [(name, tensor.shape, tensor.dtype) for name, tensor in named]
    assert world.from_main(lambda: mine) == mine, "all ranks load the same model"


def _broadcast_buffers(policy: Shardable) -> None:
    """Copies rank 0's buffers to all ranks. Some, such as rotary frequencies, are in no file."""
    for module in policy.causal.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _from_rank_0(buffer, policy.device))
        missing = [
            name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta
        ]
        if missing:
            raise EngineError(
                f"{type(policy.causal).__name__} is not supported in several processes: {missing[0]} of its "
                f"{type(module).__name__} is neither a weight nor a buffer"
            )


def _broadcast_weights(module: nn.Module, device: torch.device) -> None:
    """Copies rank 0's weights of the module to all ranks, but for sharded ones. Tied weights stay tied."""
    received: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if hasattr(weight, "full_tensor"):
                continue
            if weight not in received:
                received[weight] = nn.Parameter(_from_rank_0(weight, device), weight.requires_grad)
            part.register_parameter(name, received[weight])


@torch.no_grad()
def _from_rank_0(tensor: Tensor, device: torch.device) -> Tensor:
    """Rank 0's values, in every rank."""
    copy = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
    dist.broadcast(copy, src=0)
    return copy


@torch.no_grad()
def _first_pass(policy: Shardable) -> None:
    """Makes FSDP find its root module, which `gathered_weights` needs."""
    with policy.computing():
        policy.causal(input_ids=torch.zeros((1, 2), dtype=torch.long, device=policy.device))
    policy.causal.reset_iter_state()


@contextmanager
def gathered_weights(policy: Shardable) -> Iterator[None]:
    """Gathers all weights in every rank for the block, in which each computes at its own pace. Nests."""
    if policy.is_gathered:
        yield
        return
    for module in policy.shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    policy.is_gathered = True
    try:
        yield
    finally:
        policy.is_gathered = False
        for module in policy.shards:
            module.reshard()
            module.set_reshard_after_forward(module is not policy.causal, recurse=False)
        # The next backward pass would gather in the order of the block's passes.
        policy.causal.reset_iter_state()


def trained_weights(policy: Shardable) -> dict[str, Any] | None:
    """Name -> unsharded weight on the CPU, of the weights that train, on rank 0; the others get none.

    None where nothing is sharded: the model's own weights are meant then. All ranks have to call it.
    """
    if not policy.shards:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(policy.model, options=options)


def optimizer_state(policy: Shardable, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Unsharded `state_dict` with weights by name, on rank 0's CPU; the others get none.

    The number of ranks makes no difference to it. All ranks have to call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    if not optimizer.state:  # torch would take a step to make one
        return optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(policy.model, optimizer, options=options)


def load_optimizer_state(policy: Shardable, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` returned; each rank takes its shard of it."""
    if not policy.shards:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(policy.model, optimizer, state, options=options)
