"""Who draws the student's samples, and how the student's new weights reach it.

sleep -> sync -> generate (a step's samples) -> sleep -> guide, update -> sync -> generate (evaluation) -> ...
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from precompute.config import TeacherConfig
from precompute.engines import Completion, Engine, Requests, Sampling
from precompute.engines.registry import resolve_engine
from precompute.engines.transformers_engine import TransformersEngine
from precompute.engines.vllm_engine import VllmEngine, VllmProcess, llm_options
from store.errors import ConfigError, EngineError
from trainer.config import Config, StudentConfig
from trainer.parallel.fsdp import gathered_weights
from trainer.parallel.world import ALONE, World
from trainer.sampling.sync_check import SyncCheck
from trainer.sampling.weight_sync import Handover, place_for
from trainer.student.policy import Policy

LOGGER = logging.getLogger(__name__)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vllm 0.32 can be told as the largest rank of an adapter."""
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""What torchrun tells a process of itself; vllm would take it for its own."""


class Sampler(Engine, Protocol):
    """An engine that draws from the student as it is now."""

    def sync(self, step: int) -> None:
        """Makes the student's weights those that are drawn from, and wakes what slept.

        Several processes call it together, and none returns before all samplers have the weights.

        `step`: the sampling steps that these weights have behind them. Raises EngineError when they cannot be
        brought, or did not arrive.
        """
        ...

    def drawing(self) -> AbstractContextManager[None]:
        """The block in which each process draws at its own pace."""
        ...

    def sleep(self) -> None:
        """Gives memory to the update; until the next `sync` nothing can be drawn."""
        ...


class SharedSampler(TransformersEngine):
    """Draws from the very model that is trained: its weights are always the new ones."""

    def __init__(self, policy: Policy, *, batch_size: int) -> None:
        super().__init__(policy.model, policy.tokenizer, batch_size=batch_size)
        self._policy = policy

    def drawing(self) -> AbstractContextManager[None]:
        """Whole weights, where they are dealt out over processes."""
        return gathered_weights(self._policy)

    def sync(self, step: int) -> None:
        """Nothing is to be brought."""

    def sleep(self) -> None:
        """Nothing is held but what the update needs too."""


class WeightedEngine(Engine, Protocol):
    """An engine whose weights can be changed; VllmEngine says how."""

    def load_weights(self, folder: Path) -> None: ...

    def load_adapter(self, folder: Path, number: int) -> None: ...

    def logprobs(self, rows: Sequence[Sequence[int]]) -> dict[str, list[tuple[float, ...]]]: ...

    def sleep(self, level: int) -> None: ...

    def wake(self, *what: str) -> None: ...


class VllmSampler:
    """Draws from a copy of the student, which gets its weights through a folder."""

    name = "vllm"

    def __init__(
        self,
        engine: WeightedEngine,
        handover: Handover,
        check: SyncCheck,
        *,
        adapter_only: bool,
        sleeps: bool,
        world: World = ALONE,
    ) -> None:
        """
        Args:
            adapter_only: the engine has the frozen weights already.
            world: its processes have a sampler each, and go through `sync` together.
        """
        self.version = engine.version
        self._engine = engine
        self._handover = handover
        self._check = check
        self._adapter_only = adapter_only
        self._sleeps = sleeps
        self._world = world
        self._asleep = False
        self._brought = 0
        self._in_use: Path | None = None

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """As Engine.generate."""
        return self._engine.generate(requests, sampling)

    def drawing(self) -> AbstractContextManager[None]:
        """Nothing is needed: vllm has weights of its own."""
        return nullcontext()

    def sync(self, step: int) -> None:
        """Brings the weights and compares what both make of a probe."""
        # While vllm sleeps: whole weights of the trainer's and vllm's memory need not find room together.
        ours = self._check.own_logprobs()
        folder = self._write()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the update has set aside is another process's to take
        self._wake("weights")
        self._load(folder)
        self._wake("kv_cache")
        self._asleep = False
        self._check.compare(ours, self._named(self._engine.logprobs(self._check.rows)))
        self._world.barrier()
        self._forget(folder)

    def sleep(self) -> None:
        """Frees vllm's GPU memory; frozen weights stay in the host's, others come anew in any case."""
        if self._sleeps:
            self._engine.sleep(1 if self._adapter_only else 2)
            self._asleep = True

    def close(self) -> None:
        """Ends vllm's process and removes the folder."""
        self._engine.close()
        self._handover.close()

    def _wake(self, what: str) -> None:
        if self._asleep:
            self._engine.wake(what)

    def _write(self) -> Path:
        self._brought += 1
        write = self._handover.write_adapter if self._adapter_only else self._handover.write_weights
        return write(self._brought)

    def _load(self, folder: Path) -> None:
        if self._adapter_only:
            self._engine.load_adapter(folder, self._brought)
        else:
            self._engine.load_weights(folder)

    def _forget(self, folder: Path) -> None:
        """Removes what nobody reads any more; vllm may read an adapter again, as long as it draws with it."""
        done_with, self._in_use = (self._in_use, folder) if self._adapter_only else (folder, None)
        if done_with is not None:
            self._handover.remove(done_with)

    def _named(self, found: dict[str, Any]) -> dict[str, Any]:
        """By the name of each copy; of several processes each has a vllm."""
        if self._world.size == 1 or self.name not in found:
            return found
        return {f"the {self.name} of process {self._world.rank}": found[self.name]}


def make_sampler(
    config: Config,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    run: Path,
    stack: ExitStack,
    world: World = ALONE,
) -> Sampler:
    """The sampler that `rollout.engine` names, asleep until its first `sync`; `stack` closes it.

    Of several processes each has one: a vllm of its own on its GPU, or the servers, which all draw from and
    the first one tells of new weights.

    Args:
        prompts: ids of all that may be asked; the first ones are the probe.
        run: the run's directory.
    """
    rollout = config.rollout
    if rollout.engine == "transformers":
        return SharedSampler(policy, batch_size=rollout.batch_size)
    at_servers = bool(rollout.base_urls)
    handover = Handover(policy, config.student, _place(config, policy, run), world, one_for_all=at_servers)
    stack.callback(handover.close)
    max_length = max(len(ids) for ids in prompts) + rollout.max_completion_length
    engine: WeightedEngine = (
        _servers(config, policy, max_length=max_length, tells=world.is_main)
        if at_servers
        else load_vllm(config, policy, handover, max_length=max_length)
    )
    sampler = VllmSampler(
        engine,
        handover,
        SyncCheck(policy, prompts, rollout.sync_tolerance),
        adapter_only=config.student.use_peft,
        sleeps=_sleeps(config),
        world=world,
    )
    stack.callback(sampler.close)
    sampler.sleep()
    return sampler


def _place(config: Config, policy: Policy, run: Path) -> Path:
    """The directory that weights go through; servers may be on another machine."""
    if config.rollout.sync_dir:
        return Path(config.rollout.sync_dir).absolute()
    return run if config.rollout.base_urls else place_for(policy, run)


def check_sampler(config: Config) -> None:
    """Raises ConfigError or EngineError for what would only be noticed once models are loaded."""
    if config.rollout.engine == "transformers":
        return
    resolve_engine("openai" if config.rollout.base_urls else "vllm")
    if config.rollout.base_urls and config.student.load_in_4bit:
        raise ConfigError(
            "rollout.base_urls are servers of the model as it is, and student.load_in_4bit trains another: "
            "leave base_urls out, and vllm gets the 4-bit weights as they compute"
        )
    if config.student.use_peft:
        max_lora_rank(config.student)


def max_lora_rank(student: StudentConfig) -> int:
    """The smallest that vllm knows and the adapters fit into."""
    fitting = [rank for rank in LORA_RANKS if rank >= student.lora_r]
    if not fitting:
        raise ConfigError(
            f"student.lora_r = {student.lora_r} is more than vllm's {LORA_RANKS[-1]}; "
            'lower it, or set rollout.engine = "transformers"'
        )
    return fitting[0]


def load_vllm(config: Config, policy: Policy, handover: Handover, *, max_length: int) -> VllmEngine:
    """The student in a process of its own, on the student's device."""
    base = handover.write_base() if config.student.load_in_4bit else None
    process = VllmProcess(vllm_environment(policy.device, os.environ))
    process.load(
        vllm_options(config, policy.dtype, base, max_length=max_length),
        given=config.rollout.vllm_args,
        named="rollout.vllm_args",
    )
    if base is not None:
        handover.remove(base)
    return VllmEngine(
        process,
        policy.tokenizer,
        stop_ids=policy.eos_ids,
        max_length=max_length,
        batch_size=config.rollout.batch_size,
        logprobs="sampler",
    )


def _servers(config: Config, policy: Policy, *, max_length: int, tells: bool) -> WeightedEngine:
    """The student at `rollout.base_urls`."""
    rollout = config.rollout
    from trainer.sampling.vllm_servers import VllmServers  # and with it openai

    servers = TeacherConfig(
        name="student",
        model=config.student.model,
        revision=config.student.revision,
        max_tokens=rollout.max_completion_length,
        batch_size=rollout.batch_size,
        base_urls=rollout.base_urls,
        served_model_name=rollout.served_model_name,
    )
    try:
        return VllmServers(
            servers, policy.tokenizer, max_length=max_length, report=LOGGER.warning, tells=tells
        )
    except EngineError as error:
        raise EngineError(f"rollout.base_urls: {error}") from error


def vllm_options(config: Config, dtype: torch.dtype, base: Path | None, *, max_length: int) -> dict[str, Any]:
    """The arguments of `vllm.LLM`; `base` is a 4-bit student's model in `dtype`."""
    student, rollout = config.student, config.rollout
    model = TeacherConfig(
        name="student",
        model=student.model if base is None else str(base),
        revision=student.revision if base is None else None,
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        batch_size=rollout.batch_size,
        gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
    )
    options = llm_options(model, max_length=max_length) | {"logprobs_mode": "processed_logprobs"}
    if student.use_peft:
        rank = max_lora_rank(student)
        options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
    if _sleeps(config):
        options["enable_sleep_mode"] = True
    return options | rollout.vllm_args


def vllm_environment(device: torch.device, environment: Mapping[str, str]) -> dict[str, str]:
    """Of the process: it sees the student's GPU alone, and nothing of the launcher that started us."""
    seen = {
        key: value
        for key, value in environment.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith("TORCHELASTIC_")
    }
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        seen["CUDA_VISIBLE_DEVICES"] = visible[index] if visible != [""] else str(index)
    return seen


def _sleeps(config: Config) -> bool:
    """vllm's sleep mode exists on GPUs alone."""
    return config.rollout.vllm_sleep and not config.rollout.base_urls and torch.cuda.is_available()
