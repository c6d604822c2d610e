"""Weights, gradients and optimizer state sharded over the ranks: PyTorch's FSDP2.

Rank 0 reads the weights into host memory, and they are sharded a layer at a time. No other rank ever holds
all of them.

Each rank keeps 1/size of every weight in float32. A layer's weights are gathered while it computes, in the
type that it computes in, and resharded afterwards. Gradients are summed in float32.

In a single process nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from store.errors import ConfigError
from trainer.config import Config
from trainer.parallel.world import World

Policy = Any
"""A student.policy.Policy, which is a layer above this one."""
UNSHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)


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
    """Returns the device that holds the model until `shard` moves it; None: the student's."""
    if world.size == 1:
        return None
    return torch.device("cpu" if world.is_main else "meta")


def shard(policy: Policy, world: World) -> None:
    """Shards the policy's weights over the ranks, which have to make each pass together from here on."""
    if world.size == 1:
        return
    mesh = init_device_mesh(policy.device.type, (world.size,))
    # Layers are gathered in the type they compute in. Embedding, last norm and head stay float32, since the
    # residual stream and the logits are computed in it.
    layer_types = MixedPrecisionPolicy(
        param_dtype=None if policy.dtype == torch.float32 else policy.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # The blocks that transformers itself would not split.
    kinds = set(policy.causal._no_split_modules or ())
    layers = [module for module in policy.causal.modules() if type(module).__name__ in kinds]
    for layer in layers:
        _broadcast(layer, policy.device)
        fully_shard(layer, mesh=mesh, mp_policy=layer_types)
    _broadcast(policy.causal, policy.device)
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
    # A first pass makes FSDP find its root module, which `gathered_weights` needs.
    with torch.no_grad(), policy.computing():
        policy.causal(input_ids=torch.zeros((1, 2), dtype=torch.long, device=policy.device))
    policy.causal.reset_iter_state()


def _broadcast(root: nn.Module, device: torch.device) -> None:
    """Copies rank 0's weights and buffers to all ranks, but for sharded weights. Tied weights stay tied.

    Some buffers, such as rotary frequencies, are in no file.
    """
    received: dict[nn.Parameter, nn.Parameter] = {}
    for module in root.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if hasattr(weight, "full_tensor"):
                continue
            if weight not in received:
                received[weight] = nn.Parameter(_from_rank_0(weight, device), weight.requires_grad)
            module.register_parameter(name, received[weight])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _from_rank_0(buffer, device))


@torch.no_grad()
def _from_rank_0(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns rank 0's values, in every rank."""
    copy = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
    dist.broadcast(copy, src=0)
    return copy


@contextmanager
def gathered_weights(policy: Policy) -> Iterator[None]:
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


def trained_weights(policy: Policy) -> dict[str, Any] | None:
    """Returns name -> unsharded weight on the CPU, of the weights that train; {} in ranks other than 0.

    None where nothing is sharded: the model's own weights are meant then. All ranks have to call it.
    """
    if not policy.shards:
        return None
    return get_model_state_dict(policy.model, options=replace(UNSHARDED, ignore_frozen_params=True))


def optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the unsharded `state_dict` on the CPU, with weights by name; {} in ranks other than 0.

    The number of ranks makes no difference to it. All ranks have to call it.
    """
    if not optimizer.state:  # torch would take a step to make one
        return optimizer.state_dict()
    return get_optimizer_state_dict(policy.model, optimizer, options=UNSHARDED)


def load_optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` returned; each rank takes its shard of it."""
    if not policy.shards:
        optimizer.load_state_dict(state)
        return
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(policy.model, optimizer, state, options=options)
