"""Optimizer steps that any number of ranks can take; torchrun runs it, and rank 0 writes its results.

torchrun --standalone --nproc-per-node 2 tests/process_steps.py MODEL GEMMA WIDE OUT

In the end rank 1 alone fails, which has to end rank 0.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from run_examples import updater_of
from safetensors.torch import load_file
from test_trainer_step import sequences
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from store.errors import StoreError
from trainer.config import GuidanceConfig, StudentConfig, TrainConfig
from trainer.method.loss import REDUCTIONS
from trainer.parallel.fsdp import initial_device, shard
from trainer.parallel.world import World, full_tensor, torchrun_world
from trainer.sampling.weight_sync import write_adapter, write_weights
from trainer.student.batches import TrainSequence, train_batch
from trainer.student.load import load_policy
from trainer.student.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One optimizer step."""

    sequences: list[TrainSequence]
    train: dict[str, Any]
    student: dict[str, Any]
    teacher_ratio: bool = False


def cases() -> dict[str, Case]:
    """Name -> case; with these budgets the ranks have different numbers of micro-batches."""
    found = {
        loss_type: Case(
            sequences=sequences(seed, teacher_logprobs=seed % 2 == 1),
            train={"loss_type": loss_type, "max_tokens_per_microbatch": 1 + 20 * seed},
            student={},
            teacher_ratio=seed % 2 == 1,
        )
        for seed, loss_type in enumerate(sorted(REDUCTIONS))
    }
    rows, small = sequences(3), {"max_tokens_per_microbatch": 20}
    lora = {"use_peft": True, "lora_r": 4}
    found["checkpointing"] = Case(sequences=rows, train=small, student={"gradient_checkpointing": True})
    found["kl, one sequence for two ranks"] = Case(sequences=rows[:1], train={"beta": 0.5}, student={})
    found["gspo"] = Case(sequences=rows, train={"importance_sampling_level": "sequence"}, student={})
    found["bfloat16"] = Case(sequences=rows, train=small, student={"dtype": "bfloat16"})
    found["bfloat16 lora"] = Case(sequences=rows, train=small, student={"dtype": "bfloat16", **lora})
    found["lora and kl"] = Case(sequences=rows, train={**small, "beta": 0.5}, student=lora)
    return found


def take(case: Case, model: str, world: World) -> dict[str, Any]:
    """The numbers of one optimizer step and of the one after it, and the first one's gradient."""
    torch.manual_seed(0)
    student = StudentConfig(model=model, device="cpu", **case.student)
    train = TrainConfig(learning_rate=1e-2, max_grad_norm=1e9, **case.train)
    policy = load_policy(student, temperature=1.0, initial_device=initial_device(world))
    shard(policy, world)
    updater = updater_of(
        policy,
        train,
        GuidanceConfig(loss="shaped_ratio" if case.teacher_ratio else "shaped"),
        reference=reference(student, train, policy, world),
        world=world,
    )
    gradient: list[torch.Tensor] = []
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    updater.optimizer.register_step_pre_hook(
        lambda *_: gradient.append(torch.cat([full_tensor(weight.grad).flatten() for weight in weights]))
    )
    first = updater.optimizer_step(case.sequences)
    idle_while_the_others_compute(policy, world)
    shifted = [
        [replace(s, old_logprobs=tuple(value + 0.1 for value in s.old_logprobs or ())) for s in rows]
        for rows in updater._with_old_logprobs(updater.micro_batches(case.sequences))
    ]
    second = updater.optimizer_step(case.sequences, shifted)
    return {"reports": [first, second], "gradient": gradient[0]}


def idle_while_the_others_compute(policy: Policy, world: World) -> None:
    """With whole weights, processes may take different numbers of passes."""
    with policy.gathered(), policy.computing(), torch.no_grad():
        for _ in range(2 * world.rank):
            policy.model(torch.ones(1, 4, dtype=torch.long))


def reference(student: StudentConfig, train: TrainConfig, policy: Policy, world: World) -> Any:
    if not train.beta:
        return None
    if student.use_peft:
        return policy.frozen_logprobs
    place = initial_device(world)
    other = load_policy(student, temperature=0.7, initial_device=place)  # the KL is not 0
    other.model.requires_grad_(False)
    shard(other, world)
    return other.logprobs


STUDENTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "narrow": {"dtype": "bfloat16"},
    "adapter": {"use_peft": True, "lora_r": 4},
}


def unusable(model: str, world: World) -> str:
    """The error of a non-finite loss, whichever rank has it."""
    student = StudentConfig(model=model, device="cpu")
    policy = load_policy(student, temperature=1.0, initial_device=initial_device(world))
    shard(policy, world)
    train = TrainConfig(max_tokens_per_microbatch=1)
    updater = updater_of(policy, train, world=world)
    rows = sequences(0)
    by_length = sorted(range(len(rows)), key=lambda index: -rows[index].length)
    rows[by_length[1]] = replace(rows[by_length[1]], advantage=float("nan"))
    try:
        updater.optimizer_step(rows)
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def synced(student: StudentConfig, place: Path, world: World) -> dict[str, torch.Tensor]:
    """Name -> weight in the directory that a sampler reads."""
    torch.manual_seed(0)
    policy = load_policy(student, temperature=1.0, initial_device=initial_device(world))
    shard(policy, world)
    folder = place / "weights"
    (write_adapter if student.use_peft else write_weights)(policy, folder, world)
    (file,) = folder.glob("*.safetensors")
    found = load_file(file)
    world.barrier()
    return found


def read(model: str, world: World, **student: Any) -> dict[str, Any]:
    """Log-probabilities of a student that was just loaded, with sharded and with gathered weights, and its
    buffers."""
    torch.manual_seed(0)
    config = StudentConfig(model=model, device="cpu", **student)
    policy = load_policy(config, temperature=1.0, initial_device=initial_device(world))
    shard(policy, world)
    batch = train_batch(sequences(3), pad_id=policy.pad_id, device=policy.device)
    with torch.no_grad():
        sharded = policy.logprobs(batch)
        with policy.gathered():
            gathered = policy.logprobs(batch)
        with suppress(ZeroDivisionError), policy.gathered():
            _ = 1 / 0
        again = policy.logprobs(batch)  # sharded again, also after an exception
    return {
        "sharded": sharded,
        "gathered": gathered,
        "again": again,
        "is_gathered": torch.tensor(policy.is_gathered),
        **dict(policy.causal.named_buffers()),
    }


def peak() -> int:
    """The most bytes that were resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Bytes that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory(model: str, world: World) -> dict[str, int]:
    """Bytes that loading and sharding a student takes in this rank."""
    # The imports of FSDP's first use are no part of the model.
    fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (world.size,)))
    before = resident()
    student = StudentConfig(model=model, device="cpu")
    policy = load_policy(student, temperature=1.0, initial_device=initial_device(world))
    shard(policy, world)
    return {"peak": peak() - before, "stays": resident() - before}


def main(model: str, gemma: str, wide: str, out: str) -> None:
    with torchrun_world(torch.device("cpu")) as world:
        found: dict[str, Any] = {"memory": world.gather(memory(wide, world))}
        found |= {name: take(case, model, world) for name, case in cases().items()}
        found["unusable"] = world.gather(unusable(model, world))
        found["gemma"] = world.gather(read(gemma, world))
        found["gemma lora"] = world.gather(read(gemma, world, use_peft=True, lora_r=4))
        for name, student in STUDENTS.items():
            place, config = Path(out).parent, StudentConfig(model=model, device="cpu", **student)
            found[f"synced {name}"] = world.gather(synced(config, place, world))
        if world.is_main:
            torch.save(found, Path(out))
        world.barrier()
        if world.rank == 1:
            raise StoreError("rank 1 alone has seen it")
        world.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
