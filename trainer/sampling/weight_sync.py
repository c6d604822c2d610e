"""Writes the student's weights where vLLM reads them: one folder, which every sync overwrites.

All ranks call these functions together: they gather sharded weights, and rank 0 writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from store.errors import EngineError
from trainer.parallel.world import ALONE, World, full_tensor
from trainer.student.policy import Policy


def write_weights(policy: Policy, folder: Path, world: World = ALONE) -> None:
    """Writes all weights once, in the type that the student computes in."""
    state = {}
    # Weights with several names, as a head that is the embedding, are written under the first.
    named = reversed(policy.causal.state_dict(keep_vars=True).items())
    for name, sharded in {id(weight): (name, weight) for name, weight in named}.values():
        full = full_tensor(sharded.detach())
        if world.is_main:
            state[name] = full.to("cpu", policy.dtype if full.is_floating_point() else full.dtype)
    _write(folder, world, lambda: policy.causal.save_pretrained(folder, state_dict=state))


def write_adapter(policy: Policy, folder: Path, world: World = ALONE) -> None:
    """Writes the LoRA adapter alone, as peft does."""
    model = policy.model
    state = {name: full_tensor(value) for name, value in model.state_dict().items() if ".lora_" in name}
    _write(
        folder, world, lambda: model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    )


def write_base(policy: Policy, folder: Path, world: World = ALONE) -> None:
    """Writes the frozen weights of a 4-bit student, dequantized and without its adapter."""
    state = {
        name.replace(".base_layer", ""): dequantize_bnb_weight(weight).to("cpu", policy.dtype)
        for name, weight in policy.causal.named_parameters()
        if ".lora_" not in name
    }
    _write(folder, world, lambda: save_file(state, folder / "model.safetensors"))


def _write(folder: Path, world: World, save: Callable[[], None]) -> None:
    """Overwrites the folder; every rank returns once it is complete."""
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            save()
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
            raise EngineError(
                f"weights for vllm cannot be written to {folder}: {reason}; "
                "set rollout.sync_dir to a directory with more room"
            ) from error
    world.barrier()
