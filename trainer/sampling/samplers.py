"""Samples from the student: with the model that trains, or with vLLM, which gets every step's new weights.

sleep -> sync -> generate (a step's samples) -> sleep -> guide, update -> sync -> generate (evaluation) -> ...
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from precompute.config import TeacherConfig
from precompute.engines import Engine
from precompute.engines.registry import resolve_engine
from precompute.engines.transformers_engine import TransformersEngine
from precompute.engines.vllm_engine import VllmEngine, llm_options
from store.errors import ConfigError, EngineError
from trainer.config import Config, RolloutConfig
from trainer.parallel.world import ALONE, World
from trainer.sampling.weight_sync import write_adapter, write_base, write_weights
from trainer.student.adapters import over_base
from trainer.student.policy import Policy

if TYPE_CHECKING:
    from trainer.sampling.vllm_servers import VllmServers  # and with it openai

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of an adapter that vllm 0.32 can be configured for."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""Beginnings of the variables that torchrun sets for a rank; vllm would take them for its own."""


class Sampler(Engine, Protocol):
    """An engine that samples from the student as it is now."""

    def sync(self) -> None:
        """Gives the sampler the student's current weights, and its memory back after `sleep`.

        All ranks call it together, and it returns when all samplers have the weights. Raises EngineError when
        one cannot load them.
        """
        ...

    def sampling(self) -> AbstractContextManager[None]:
        """Context in which each rank may call `generate` on its own."""
        ...

    def sleep(self) -> None:
        """Frees memory for the update; `generate` needs a `sync` first."""
        ...


class SharedSampler(TransformersEngine):
    """Samples with the very model that is trained, so there is nothing to synchronize."""

    def __init__(self, policy: Policy, *, batch_size: int) -> None:
        super().__init__(policy.model, policy.tokenizer, batch_size=batch_size)
        self.sampling = policy.gathered

    def sync(self) -> None:
        """Does nothing."""

    def sleep(self) -> None:
        """Does nothing."""


class VllmSampler:
    """Samples with vLLM's copy of the student, which gets its weights through `folder`."""

    def __init__(
        self,
        engine: VllmEngine | VllmServers,
        policy: Policy,
        config: Config,
        folder: Path,
        world: World = ALONE,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._student = config.student
        self._folder = folder
        self._world = world
        self._sleeps = has_sleep_mode(config.rollout)
        self._asleep: set[str] = set()
        self._syncs = 0
        self.generate = engine.generate
        self.sampling = nullcontext
        """vLLM has weights of its own to sample with."""

    def sync(self) -> None:
        """Writes the weights, with LoRA the adapter alone, and has vLLM load them."""
        self._syncs += 1
        policy, folder, world = self._policy, self._folder, self._world
        # Under QLoRA vLLM begins with the 16-bit original; the adapter is trained over the 4-bit weights.
        four_bits = self._student.load_in_4bit
        if not self._student.use_peft or (four_bits and self._syncs == 1):
            # Written while vLLM sleeps: gathered weights and vLLM's memory need not fit at once.
            (write_base if four_bits else write_weights)(policy, folder, world)
            self._wake("weights")
            self._engine.load_weights(folder)
        if self._student.use_peft:
            write_adapter(policy, folder, world)
            self._wake("weights")
            self._engine.load_adapter(folder, self._syncs)
        self._wake("kv_cache")
        world.barrier()

    def sleep(self) -> None:
        """Frees vLLM's GPU memory; with LoRA the frozen weights move to host memory."""
        if self._sleeps:
            self._engine.sleep(1 if self._student.use_peft else 2)
            self._asleep = {"weights", "kv_cache"}

    def close(self) -> None:
        """Ends vLLM's process and removes the folder."""
        self._engine.close()
        if self._world.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wake(self, what: str) -> None:
        if what in self._asleep:
            self._asleep.remove(what)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # memory that torch keeps cached is not free for vLLM's process
            self._engine.wake(what)


def make_sampler(
    config: Config,
    policy: Policy,
    longest_prompt: int,
    run: Path,
    stack: ExitStack,
    world: World = ALONE,
) -> Sampler:
    """Returns the sampler of `rollout.engine`, asleep until its first `sync`; `stack` closes it.

    Every rank has one: a vLLM of its own on its GPU, or the servers, which rank 0 gives new weights.

    Args:
        longest_prompt: tokens of the longest prompt, training and evaluation.
        run: the run's directory.
    """
    rollout = config.rollout
    if rollout.engine == "transformers":
        return SharedSampler(policy, batch_size=rollout.batch_size)
    max_length = longest_prompt + rollout.max_completion_length
    engine = load_vllm(config, policy, world, max_length=max_length)
    folder = (Path(rollout.sync_dir).absolute() if rollout.sync_dir else run) / f"{run.name}-weights"
    sampler = VllmSampler(engine, policy, config, folder, world)
    stack.callback(sampler.close)
    sampler.sleep()
    return sampler


def check_sampler(config: Config) -> None:
    """Raises ConfigError or EngineError for what would only be noticed once models are loaded."""
    if config.rollout.engine == "transformers":
        return
    resolve_engine("openai" if config.rollout.base_urls else "vllm")
    if config.rollout.base_urls and config.student.load_in_4bit:
        raise ConfigError(
            "rollout.base_urls are servers of the 16-bit model, and student.load_in_4bit trains another: "
            "leave base_urls out, and vllm gets the 4-bit weights dequantized"
        )


def sampler_warning(rollout: RolloutConfig) -> str | None:
    """Returns a warning about keys of [rollout] that bias training, or that hide what does."""
    if rollout.top_p < 1 or rollout.top_k > 0:
        return "rollout.top_p below 1 or top_k above 0: sampler and trainer differ, the ratio is biased"
    if rollout.base_urls and rollout.temperature != 1:
        return (
            f"rollout.temperature = {rollout.temperature}: vllm servers report log-probabilities at "
            "temperature 1 only, so is_cap has no effect and samples of old weights are not noticed"
        )
    return None


def check_sampler_weights(rollout: RolloutConfig, dtype: torch.dtype, difference: float | None) -> None:
    """Raises EngineError when a step's samples cannot come from the student's weights.

    Args:
        dtype: the type that the student computes in.
        difference: mean absolute difference between the trainer's and the sampler's log-probabilities of the
            sampled tokens, in nats; None where the sampler reports none.
    """
    tolerance = rollout.sync_tolerance
    if tolerance is None:
        tolerance = 0.005 if dtype == torch.float32 else 0.1  # 16-bit logits near 20 are 0.125 apart
        if rollout.top_p < 1 or rollout.top_k > 0:
            return  # the sampler's distribution is truncated, the trainer's is not
    if rollout.engine == "vllm" and difference is not None and not difference <= tolerance:
        raise EngineError(
            "vllm did not sample with the student's weights: its log-probabilities of the sampled tokens and "
            f"the trainer's differ by {difference:.2g} on average, rollout.sync_tolerance = {tolerance:g}"
        )


def load_vllm(
    config: Config, policy: Policy, world: World = ALONE, *, max_length: int
) -> VllmEngine | VllmServers:
    """Loads the student's model in a process on the student's device, or connects to `rollout.base_urls`.

    `max_length`: tokens of prompt and completion. Raises EngineError.
    """
    if config.rollout.base_urls:
        from trainer.sampling.vllm_servers import VllmServers

        return VllmServers(
            student_as_teacher(config, policy.dtype), policy.tokenizer, world, max_length=max_length
        )
    return VllmEngine(
        vllm_options(config, policy.dtype, max_length=max_length),
        policy.tokenizer,
        stop_ids=policy.eos_ids,
        given=config.rollout.vllm_args,
        key="rollout.vllm_args",
        environment=vllm_environment(policy.device, os.environ),
    )


def vllm_options(config: Config, dtype: torch.dtype, *, max_length: int) -> dict[str, Any]:
    """Returns the arguments of `vllm.LLM`."""
    options = llm_options(student_as_teacher(config, dtype), max_length=max_length)
    options |= {"logprobs_mode": "processed_logprobs", "enable_sleep_mode": has_sleep_mode(config.rollout)}
    if config.student.use_peft:
        # A rank above the largest is refused by vllm in words of its own.
        rank = min(
            (rank for rank in LORA_RANKS if rank >= config.student.lora_r), default=config.student.lora_r
        )
        options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
    return options | config.rollout.vllm_args


def student_as_teacher(config: Config, dtype: torch.dtype) -> TeacherConfig:
    """Returns the student in the form in which the engines read a model's settings."""
    student, rollout = over_base(config.student)[0], config.rollout
    return TeacherConfig(
        name="student",
        model=student.model,
        revision=student.revision,
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        max_tokens=rollout.max_completion_length,
        batch_size=rollout.batch_size,
        gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
        base_urls=rollout.base_urls,
        served_model_name=rollout.served_model_name,
    )


def vllm_environment(device: torch.device, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of vLLM's process: it sees the student's GPU alone, and nothing of torchrun."""
    seen = {key: value for key, value in environment.items() if not key.startswith(LAUNCHER_VARIABLES)}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        seen["CUDA_VISIBLE_DEVICES"] = visible[index] if visible != [""] else str(index)
    return seen


def has_sleep_mode(rollout: RolloutConfig) -> bool:
    """Returns whether vLLM can sleep: only on a GPU, and only where it is a process of this run."""
    return rollout.vllm_sleep and not rollout.base_urls and torch.cuda.is_available()
