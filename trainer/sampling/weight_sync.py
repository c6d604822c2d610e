"""The student's weights on their way to another process: a folder that both sides see.

Where they are dealt out over processes, all of these come together to write; one folder a machine is enough.
"""

from __future__ import annotations

import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from store.errors import EngineError
from store.format.files import FileLock
from trainer.config import StudentConfig
from trainer.parallel.fsdp import full_tensor
from trainer.parallel.world import ALONE, World
from trainer.student.policy import Policy

SHARED_MEMORY = Path("/dev/shm")
SPARE = 1.1
"""How much more room than the weights take there has to be."""
FOLDER = "ampo-weights-"
IN_USE = "in-use.lock"
"""Held by the process that brings weights, as long as it lives."""


class Handover:
    """Writes weights where another process reads them; what was brought is removed."""

    def __init__(
        self,
        policy: Policy,
        student: StudentConfig,
        place: Path,
        world: World = ALONE,
        *,
        one_for_all: bool = False,
    ) -> None:
        """Raises EngineError when the folder cannot be made.

        Args:
            place: the directory in which it is made; on a machine the first process's counts.
            world: its processes make each call here together.
            one_for_all: one folder for all machines, not one for each.
        """
        self._policy = policy
        self._student = student
        self._world = world
        self._writes = world.is_main if one_for_all else world.is_local_main
        mine = place / f"{FOLDER}{secrets.token_hex(4)}"
        self.folder = world.gather(mine)[0] if one_for_all else world.from_local_main(mine)
        self._lock: FileLock | None = None
        if world.size > 1:
            world.scratch.append(self.folder)
        if not self._writes:
            return
        remove_abandoned(place)
        try:
            self._lock = _make_locked(self.folder)
        except OSError as error:
            raise self._refused(error) from error

    def write_weights(self, number: int) -> Path:
        """All weights, in the type that the student computes in."""
        state = narrowed(self._policy, kept=self._writes)
        return self._write(number, lambda path: self._policy.causal.save_pretrained(path, state_dict=state))

    def write_adapter(self, number: int) -> Path:
        """The LoRA adapter alone."""
        model = self._policy.model
        adapter = {
            name: full_tensor(tensor) for name, tensor in model.state_dict().items() if ".lora_" in name
        }
        return self._write(
            number,
            lambda path: model.save_pretrained(path, state_dict=adapter, save_embedding_layers=False),
        )

    def write_base(self) -> Path:
        """The frozen weights of a 4-bit student as they compute, without its adapter: an ordinary model."""
        config = AutoConfig.from_pretrained(self._student.model, revision=self._student.revision)
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=self._policy.dtype
            )
        state = dequantized(self._policy)
        return self._write(0, lambda path: skeleton.save_pretrained(path, state_dict=state))

    def remove(self, path: Path) -> None:
        """Once no process reads it; harmless when it is gone."""
        if self._writes:
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Removes all that is there."""
        self.remove(self.folder)
        if self._lock is not None:
            self._lock.release()

    def _write(self, number: int, save: Any) -> Path:
        """The folder, which is whole when this returns."""
        path = self.folder / f"{number:06d}"
        if self._writes:
            try:
                save(path)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise self._refused(error) from error
        self._world.barrier()
        return path

    def _refused(self, error: Exception) -> EngineError:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        return EngineError(
            f"weights for vllm cannot be written to {self.folder}: {reason}; "
            "set rollout.sync_dir to a directory with more room"
        )


def _make_locked(folder: Path) -> FileLock:
    """Makes the folder and holds its lock; under its name it is there only once the lock is held."""
    made = folder.with_name(f".{folder.name}")
    made.mkdir(parents=True)
    lock = FileLock(made / IN_USE)
    lock.acquire(wait=True)
    made.rename(folder)
    return lock


def remove_abandoned(place: Path) -> None:
    """Removes the folders that killed processes left in `place`; those of living ones, and of other users,
    stay."""
    for folder in place.glob(f"{FOLDER}*"):
        with suppress(OSError):
            lock = FileLock(folder / IN_USE)
            if lock.acquire(wait=False):
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()


def place_for(policy: Policy, run: Path) -> Path:
    """Shared memory where the weights fit, else the run's directory."""
    remove_abandoned(SHARED_MEMORY)
    needed = policy.causal.num_parameters() * policy.dtype.itemsize  # which knows of packed 4-bit weights
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > SPARE * needed:
        return SHARED_MEMORY
    return run


def narrowed(policy: Policy, *, kept: bool = True) -> dict[str, Tensor]:
    """Name -> weight on the CPU, in the type that the student computes in; tied weights stay one.

    Where the weights are dealt out over processes, all of them take part, and those without `kept` get none.
    """
    weights = dict(policy.causal.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    seen: dict[int | str, Tensor] = {}
    for name, tensor in policy.causal.state_dict().items():
        own = id(weights[name]) if name in weights else name
        if own not in seen:
            whole = full_tensor(tensor)
            dtype = policy.dtype if whole.is_floating_point() else whole.dtype
            seen[own] = whole.to("cpu" if kept else "meta", dtype)
        found[name] = seen[own]
    return found if kept else {}


def dequantized(policy: Policy) -> dict[str, Tensor]:
    """Name -> weight of the model below the adapters, on the CPU, in the type that it computes in."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return {
        name.replace(".base_layer", ""): dequantize_bnb_weight(parameter).to("cpu", policy.dtype)
        for name, parameter in policy.causal.named_parameters()
        if ".lora_" not in name
    }
