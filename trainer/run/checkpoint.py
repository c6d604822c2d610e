"""Checkpoints: complete or absent, and sufficient to resume a run to the bit.

    checkpoints/step-000050/
      config.json, *.safetensors, tokenizer files     an ordinary transformers model
      optimizer.pt                                    the optimizer's state and torch's generators
      state.json                                      steps, config, fingerprints of problems and store,
                                                      size and checksum of every other file
    checkpoints/sft-000050/                           the same in SFT, with its optimizer

Sampling, order of problems and replacement are functions of (seed, step, problem), so no position is needed
beyond the step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from store.errors import RunError
from store.format.files import sync
from store.reader import Usable
from trainer.config import Config
from trainer.parallel.fsdp import load_optimizer_state, optimizer_state, trained_weights
from trainer.parallel.world import ALONE, World
from trainer.run.run_dir import Position
from trainer.student.policy import Policy

MAY_CHANGE = {
    "run": None,
    "eval": None,
    "verify": None,
    "teachers": None,
    "store": None,
    "problems": None,
    "train": {"max_steps", "max_tokens_per_microbatch"},
    "rollout": {
        "batch_size",
        "base_urls",
        "served_model_name",
        "sync_dir",
        "sync_tolerance",
        "vllm_gpu_memory_utilization",
        "vllm_sleep",
    },
    "sft": {"steps"},
    "student": {"device", "gradient_checkpointing", "chat_template"},
}
"""Sections (None: all keys) and keys that may differ on resume: they do not change what a step computes.
Problems and store may lie elsewhere: what they hold is compared by fingerprint.
A chat template's path may; its text is compared when the tokenizer is loaded.
`sft.steps` may until the first sampling step, see `check_config`.
A schedule that runs down to max_steps is the exception, see `differences`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Contents of a checkpoint's state.json."""

    done: Position
    config: Mapping[str, Any]
    problems_fingerprint: str
    """Content hash of the training problems, in order."""
    store: Mapping[str, Usable]
    """teacher -> its usable traces; empty where the store is not read."""


def save(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    keep_last: int,
    world: World = ALONE,
) -> Path:
    """Writes `folder/step-N` under another name, renames it, then removes all but the last `keep_last`.

    Every rank calls it; sharded weights are gathered in rank 0, which writes.

    Raises RunError when the disk is full or not writable; older checkpoints stay.
    """
    target = folder / state.done.name
    aside = folder / f".tmp-{target.name}"
    weights, moments = trained_weights(policy), optimizer_state(policy, optimizer)
    if not world.is_main:
        return target
    try:
        for remains in folder.glob(".tmp-*"):  # of a killed save or removal
            shutil.rmtree(remains, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(aside, policy, weights, moments, state)
        if target.exists():
            _remove(target)
        aside.rename(target)
        sync(folder)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise RunError(f"cannot save {target}: {reason}; older checkpoints are complete") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoints(folder)[:-keep_last]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Renames first: a removal that is killed half-way must not leave a directory that looks complete."""
    gone = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _write(
    aside: Path,
    policy: Policy,
    weights: dict[str, Any] | None,
    moments: dict[str, Any],
    state: TrainState,
) -> None:
    """`weights`: None for the policy's own; `moments`: the optimizer's state."""
    policy.model.save_pretrained(aside, **({} if weights is None else {"state_dict": weights}))
    policy.tokenizer.save_pretrained(aside)
    generators = {"cpu": torch.get_rng_state()}
    if policy.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(policy.device)
    torch.save({"optimizer": moments, "generators": generators}, aside / "optimizer.pt")
    described = {
        "step": state.done.step,
        "sft_step": state.done.sft_step,
        "problems_fingerprint": state.problems_fingerprint,
        "store": {name: asdict(usable) for name, usable in state.store.items()},
        "files": {
            str(file.relative_to(aside)): _mark(file) for file in sorted(aside.rglob("*")) if file.is_file()
        },
        "config": dict(state.config),
    }
    (aside / "state.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for file in aside.iterdir():
        sync(file)
    sync(aside)


def _mark(file: Path) -> list[int | str]:
    """Size in bytes and checksum."""
    with file.open("rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()]


def check_complete(checkpoint: Path) -> None:
    """Raises RunError, with the way out, when a file was truncated, changed or removed."""
    reason = _damage(checkpoint)
    if reason is None:
        return
    older = [path for path in checkpoints(checkpoint.parent) if Position.of(path) < Position.of(checkpoint)]
    complete = next((path for path in reversed(older) if _damage(path) is None), None)
    way_out = (
        f"remove it to go on from {complete}, the last complete one"
        if complete
        else "no older one is complete: start again under another run.name"
    )
    raise RunError(f"{checkpoint} is damaged: {reason}; {way_out}")


def _damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint in words; None for a complete one."""
    try:
        files = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("files", {})
        for name, (size, checksum) in files.items():
            found = _mark(checkpoint / name)
            if found[0] != size:
                return f"{name} has {found[0]} bytes, not {size}"
            if found[1] != checksum:
                return f"{name} is not what was saved"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is gone"
    except (OSError, ValueError, AttributeError) as error:
        return f"state.json cannot be read ({error})"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints below `folder`, oldest first."""
    names = (*folder.glob("sft-*"), *folder.glob("step-*"))
    return sorted((path for path in names if (path / "state.json").is_file()), key=Position.of)


def instead_of_run(path: Path) -> str | None:
    """The path to give instead of a run's directory or its `checkpoints`; None where `path` is neither."""
    if (path / "config.json").is_file() or (path / "state.json").is_file():
        return None
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
            return f"it is a run: give one of its checkpoints, the last one is {found[-1]}"
    is_run = (path / "config.toml").is_file() and (path / "checkpoints").is_dir()
    return "it is a run that has no checkpoint yet" if is_run else None


def read_state(checkpoint: Path) -> TrainState:
    """Raises RunError when the directory is not a checkpoint."""
    if not (checkpoint / "state.json").is_file():
        raise RunError(f"no checkpoint at {checkpoint.absolute()}: {_why_no_checkpoint(checkpoint)}")
    try:
        body = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return TrainState(
            done=Position(step=body["step"], sft_step=body["sft_step"]),
            config=body["config"],
            problems_fingerprint=body["problems_fingerprint"],
            store={name: Usable(**usable) for name, usable in body["store"].items()},
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"no checkpoint at {checkpoint.absolute()}: {error}") from error


def _why_no_checkpoint(path: Path) -> str:
    if not path.is_dir():
        there = checkpoints(path.parent)
        last = f"; the last one beside it is {there[-1]}" if there else ""
        return f"there is no such directory{last}"
    return instead_of_run(path) or "it has no state.json"


def restore_optimizer(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's state and torch's generators."""
    saved = torch.load(
        checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=bool(policy.shards)
    )
    load_optimizer_state(policy, optimizer, saved["optimizer"])
    generators = saved["generators"]
    torch.set_rng_state(generators["cpu"])
    if policy.device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], policy.device)


def check_config(state: TrainState, config: Config, checkpoint: Path) -> None:
    """Raises RunError, with the difference, when the config would make another run of it."""
    changed = differences(state.config, config)
    if changed:
        raise RunError(
            f"{checkpoint} was trained with {'; '.join(changed)}. "
            f"Set it back, or start again under another run.name"
        )
    if state.done.step > config.train.max_steps:
        raise RunError(
            f"{checkpoint} is at {state.done}, past train.max_steps = {config.train.max_steps}: to go on, "
            f"set train.max_steps above {state.done.step}; or start again under another run.name"
        )
    steps = config.sft.steps
    if state.done.sft_step > steps or (state.done.step and state.done.sft_step != steps):
        raise RunError(
            f"{checkpoint} has {state.done.sft_step} SFT steps behind it; set sft.steps = "
            f"{state.done.sft_step} again, not {steps}, or start again under another run.name"
        )


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """`section.key = saved, now other` for every key whose change would make another run of it."""
    now = config.model_dump(mode="json")
    found = []
    for section, keys in saved.items():
        free = MAY_CHANGE.get(section, set())
        if free is None or section not in now:
            continue
        if section == "train" and config.train.lr_schedule != "constant":
            free = free - {"max_steps"}
        found += [
            f"{section}.{key} = {keys.get(key)!r}, now {now[section].get(key)!r}"
            for key in dict.fromkeys([*keys, *(now[section] if section == "rewards" else ())])
            if key not in free and now[section].get(key) != keys.get(key)
        ]
    return found


def store_differences(saved: Mapping[str, Usable], now: Mapping[str, Usable]) -> list[str]:
    """Differences between the usable traces of two times, in words, by teacher."""
    found = []
    for name in sorted({*saved, *now}):
        before, after = saved.get(name), now.get(name)
        if before == after:
            continue
        if before is None or after is None:
            found.append(f"{name} is {'new' if before is None else 'gone'}")
        elif before.traces == after.traces:
            found.append(f"{name} has {after.traces} traces as before, but others")
        else:
            found.append(f"{name} had {before.traces} traces, now {after.traces}")
    return found
