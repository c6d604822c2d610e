"""Writes the student's weights where vLLM reads them: one folder, which every sync overwrites.

Where the weights are sharded, all ranks gather them together, and one rank of a machine writes.
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


class WeightFolder:
    """A folder with the student's newest weights; all ranks call its methods together."""

    def __init__(self, policy: Policy, path: Path, world: World = ALONE, *, shared: bool = False) -> None:
        """
        Args:
            path: beginning of the folder's path, to which the number of the writing rank is added.
            shared: all machines see the same folder, which rank 0 writes; otherwise each machine has one.
        """
        writer = 0 if shared else world.rank - world.local_rank
        self.path = path.with_name(f"{path.name}-{writer}")
        self._policy = policy
        self.world = world
        self._is_writer = world.rank == writer

    def write_weights(self) -> None:
        """Writes all weights once, in the type that the student computes in."""
        causal, dtype, state = self._policy.causal, self._policy.dtype, {}
        # Weights with several names, as a head that is the embedding, are written under the first.
        named = reversed(causal.state_dict(keep_vars=True).items())
        for name, sharded in {id(weight): (name, weight) for name, weight in named}.values():
            full = full_tensor(sharded.detach())
            if self._is_writer:
                state[name] = full.to("cpu", dtype if full.is_floating_point() else full.dtype)
        self._write(lambda: causal.save_pretrained(self.path, state_dict=state))

    def write_adapter(self) -> None:
        """Writes the LoRA adapter alone, as peft does."""
        model = self._policy.model
        state = {name: full_tensor(value) for name, value in model.state_dict().items() if ".lora_" in name}
        self._write(lambda: model.save_pretrained(self.path, state_dict=state, save_embedding_layers=False))

    def write_base(self) -> None:
        """Writes the frozen weights of a 4-bit student, dequantized and without its adapter."""
        state = {
            name.replace(".base_layer", ""): dequantize_bnb_weight(weight).to("cpu", self._policy.dtype)
            for name, weight in self._policy.causal.named_parameters()
            if ".lora_" not in name
        }
        self._write(lambda: save_file(state, self.path / "model.safetensors"))

    def remove(self) -> None:
        """Removes the folder; harmless when it does not exist."""
        if self._is_writer:
            shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, save: Callable[[], None]) -> None:
        """Overwrites the folder; every rank returns once it is complete."""
        if self._is_writer:
            self.remove()
            try:
                self.path.mkdir(parents=True)
                save()
            except (OSError, RuntimeError, SafetensorError) as error:
                reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
                raise EngineError(
                    f"weights for vllm cannot be written to {self.path}: {reason}; "
                    "set rollout.sync_dir to a directory with more room"
                ) from error
        self.world.barrier()
