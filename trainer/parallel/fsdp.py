"""A policy's weights, gradients and optimizer state dealt out over the processes: PyTorch's FSDP2.

The first process reads the weights into host memory, and they are dealt out a layer at a time; no other
process ever holds all of them to begin with.

Each process keeps 1/size of every weight in float32. A layer's weights come together for the time that it
computes, in the type that it computes in, and go apart again; gradients are summed in float32.

A world of one is left as it is, without the seconds that importing FSDP2 takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from store.errors import ConfigError, EngineError
from trainer.config import Config
from trainer.parallel.world import World
from trainer.student.batches import TokenBatch
from trainer.student.policy import Policy


def check_shardable(config: Config, world: World) -> None:
    """ConfigError for what cannot be dealt out over processes."""
    if world.size == 1:
        return
    if config.train.optim != "adamw":
        raise ConfigError(
            f'train.optim = "{config.train.optim}" works in one process, not in {world.size}: bitsandbytes '
            'takes whole weights; set it to "adamw", whose state is divided over the processes'
        )
    refused = {
        "student.load_in_4bit": (
            config.student.load_in_4bit,
            "weights are cut by rows, and bitsandbytes packs 4-bit ones in blocks without rows",
        ),
        "train.compile": (
            config.train.compile,
            "weights are gathered around every layer, and each time the compiled body would have to be left",
        ),
    }
    for key, (value, reason) in refused.items():
        if value:
            raise ConfigError(
                f"{key} = true works in one process, not in {world.size}: {reason}; set it to false"
            )


def shard(policy: Policy, world: World) -> None:
    """Deals the policy's weights out; from here on its passes are steps that all processes take together."""
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _check_same_shapes(policy, world)
    mesh = init_device_mesh(policy.device.type, (world.size,))
    # Layers come together in the narrow type, half as much to send and to hold; what stands outside of them
    # (embedding, last norm, head) in float32, for the residual stream and the logits are computed in it.
    narrow = MixedPrecisionPolicy(
        param_dtype=None if policy.dtype == torch.float32 else policy.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    layers = _layers(policy.causal)
    _bring_buffers(policy)
    for layer in layers:
        _bring_weights(layer, policy.device)
        fully_shard(layer, mesh=mesh, mp_policy=narrow)
    _bring_weights(policy.causal, policy.device)
    fully_shard(policy.causal, mesh=mesh)
    policy.shards = [*layers, policy.causal]
    for module in policy.shards:
        # The loss is divided by counts of the whole step, so gradients are summed and never averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # FSDP gathers around a module's methods that it knows of, and `asked_tokens` is none of them.
    policy.causal.asked_tokens = policy.asked_tokens
    register_fsdp_forward_method(policy.causal, "asked_tokens")
    policy.asked_tokens = policy.causal.asked_tokens
    _first_pass(policy)


def initial_device(world: World) -> torch.device | None:
    """Where `load_policy` is to put a model that `shard` then deals out; None: on the student's device."""
    if world.size == 1:
        return None
    return torch.device("cpu" if world.is_main else "meta")


def _check_same_shapes(policy: Policy, world: World) -> None:
    named = [*policy.causal.named_parameters(), *policy.causal.named_buffers()]
    mine = [(name, tensor.shape, tensor.dtype) for name, tensor in named]
    assert world.from_main(lambda: mine) == mine, "all processes load the same model"


def _bring_buffers(policy: Policy) -> None:
    """From the first process to all: some, as rotary frequencies, stand in no file."""
    for module in policy.causal.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _brought(buffer, policy.device))
        lost = [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
        if lost:
            raise EngineError(
                f"{type(policy.causal).__name__} is not supported in several processes: {lost[0]} of its "
                f"{type(module).__name__} is neither a weight nor a buffer"
            )


def _bring_weights(module: nn.Module, device: torch.device) -> None:
    """From the first process to all, those of the module that are not dealt out yet; tied ones stay one."""
    came: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if is_sharded(weight):
                continue
            if weight not in came:
                came[weight] = nn.Parameter(_brought(weight, device), weight.requires_grad)
            part.register_parameter(name, came[weight])


@torch.no_grad()
def _brought(tensor: Tensor, device: torch.device) -> Tensor:
    """The first process's values, in every process."""
    here = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
    dist.broadcast(here, src=0)
    return here


@torch.no_grad()
def _first_pass(policy: Policy) -> None:
    """FSDP learns from its first pass which module is the root; `gathered_weights` has to know it before."""
    ids = torch.full((1, 2), policy.pad_id, device=policy.device)
    asked = torch.tensor([[False, True]], device=policy.device)
    policy.logprobs(TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), asked=asked))
    policy.causal.reset_iter_state()


@contextmanager
def gathered_weights(policy: Policy) -> Iterator[None]:
    """Every process has all weights for the block, and computes without the others, at its own pace. A block
    in such a block changes nothing."""
    if policy.is_gathered or not policy.shards:
        yield
        return
    for module in policy.shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    policy.is_gathered = True
    yield
    policy.is_gathered = False
    for module in policy.shards:
        module.set_reshard_after_forward(module is not policy.causal, recurse=False)
    # Apart again, and the passes forgotten: the next backward pass would gather in their order.
    policy.causal.reset_iter_state()


def is_sharded(value: Any) -> bool:
    """Whether this process has but a part of it."""
    return hasattr(value, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """All of a tensor of which each process has a part; all processes take part."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def gathered_state(state: Mapping[str, Any], world: World) -> dict[str, Any]:
    """A `state_dict` as one process would have it, on the CPU of the first process; the others take part."""

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: whole(below) for key, below in value.items()}
        if not is_sharded(value):
            return value
        full = full_tensor(value)
        return full.cpu() if world.is_main else None

    found: dict[str, Any] = whole(state)
    return found


def shards_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each process has but a part of what the optimizer trains."""
    return is_sharded(optimizer.param_groups[0]["params"][0])


def shard_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state as one process has it, dealt out as the optimizer's weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        **state,
        "state": {
            index: {name: _like(value, weights[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        },
    }


def _like(value: Any, weight: Any) -> Any:
    """Each process takes its own part, nothing is sent; counters stay as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    place = weight.device_mesh
    return distribute_tensor(value.to(place.device_type), place, weight.placements, src_data_rank=None)


def _layers(causal: Any) -> list[nn.Module]:
    """The blocks that transformers itself would not split."""
    names = set(causal._no_split_modules or ())
    return [module for module in causal.modules() if type(module).__name__ in names]
