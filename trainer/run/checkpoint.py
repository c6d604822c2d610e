"""Checkpoints: complete or absent, and sufficient to resume a run to the bit.

    checkpoints/step-000050/
      config.json, *.safetensors, tokenizer files     an ordinary transformers model
      optimizer.pt                                    the optimizer's state, torch's generators, the buffer
      state.json                                      TrainState, and the checksum of every other file
    checkpoints/sft-000050/                           the same in SFT, with its optimizer

Sampling, order of problems and replacement are functions of (seed, step, problem), so no position is needed
beyond the step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from store.errors import RunError
from store.format.files import sync
from store.reader import Usable
from trainer.buffer import TraceBuffer
from trainer.config import Config
from trainer.parallel.fsdp import load_optimizer_state, optimizer_state, trained_weights
from trainer.parallel.world import ALONE, World
from trainer.run.run_dir import Position
from trainer.student.policy import Policy

MAY_CHANGE_SECTIONS = {"run", "eval", "verify", "filters", "ray", "teachers", "store", "problems"}
"""Sections that may differ on resume. Of problems and store the fingerprints are compared."""
MAY_CHANGE_KEYS = {
    "train.max_steps",
    "train.max_tokens_per_microbatch",
    "rollout.batch_size",
    "rollout.base_urls",
    "rollout.served_model_name",
    "rollout.sync_dir",
    "rollout.sync_tolerance",
    "rollout.vllm_gpu_memory_utilization",
    "rollout.vllm_sleep",
    "sft.steps",
    "student.device",
    "student.gradient_checkpointing",
    "student.chat_template",
}
"""Keys that may differ on resume: they do not change what a step computes. A template's text is compared when
the tokenizer is loaded. `check_config` has the exceptions of `sft.steps` and `train.max_steps`."""
FORK_KEYS = {
    "train.learning_rate",
    "train.lr_schedule",
    "train.warmup_steps",
    "train.max_steps",
    "rollout.max_prompt_length",
    "rollout.max_completion_length",
}
"""Keys that may differ in a fork as well: a run under another name that begins with a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Contents of a checkpoint's state.json, beside the checksums."""

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
    buffer: TraceBuffer | None = None,
) -> Path:
    """Writes `folder/step-N` under another name, renames it, then removes all but the last `keep_last`.

    Every rank calls it; sharded weights are gathered in rank 0, which writes.

    Raises RunError when the disk is full or not writable; older checkpoints stay.
    """
    target = folder / state.done.name
    aside = folder / f".tmp-{target.name}"
    weights, moments = trained_weights(policy), {"optimizer": optimizer_state(policy, optimizer)}
    if buffer is not None:
        moments["buffer"] = buffer.state()
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
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = str(getattr(cause, "strerror", None) or cause).splitlines()[0]
        raise RunError(f"cannot save {target}: {reason}; older checkpoints are complete") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoints(folder)[:-keep_last]:
        _remove(old)
    return target


def _write(
    aside: Path, policy: Policy, weights: dict[str, Any] | None, moments: dict[str, Any], state: TrainState
) -> None:
    """Writes all files; `weights`: None for the policy's own; `moments`: of the optimizer, and the buffer."""
    policy.model.save_pretrained(aside, **({} if weights is None else {"state_dict": weights}))
    policy.tokenizer.save_pretrained(aside)
    generators = {"cpu": torch.get_rng_state()}
    if policy.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(policy.device)
    with (aside / "optimizer.pt").open("wb") as opened:  # given a path, torch does not report a full disk
        torch.save({**moments, "generators": generators}, opened)
    files = {file.name: _checksum(file) for file in sorted(aside.iterdir())}
    body = json.dumps({**asdict(state), "files": files}, indent=2) + "\n"
    (aside / "state.json").write_text(body, encoding="utf-8")
    for file in (*aside.iterdir(), aside):
        sync(file)


def _remove(checkpoint: Path) -> None:
    """Renames first: a removal that is killed half-way must not leave a directory that looks complete."""
    gone = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_complete(checkpoint: Path) -> None:
    """Raises RunError, with the way out, when a file was truncated, changed or removed."""
    try:
        files = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["files"]
        changed = [name for name, checksum in files.items() if _checksum(checkpoint / name) != checksum]
        reason = f"{changed[0]} is not what was saved" if changed else ""
    except FileNotFoundError as error:
        reason = f"{Path(error.filename).name} is gone"
    except (OSError, ValueError, KeyError) as error:
        reason = f"state.json cannot be read ({error})"
    if reason:
        done = Position.of(checkpoint)
        older = [path for path in checkpoints(checkpoint.parent) if Position.of(path) < done]
        way_out = f"remove it to go on from {older[-1]}" if older else "start again under another run.name"
        raise RunError(f"{checkpoint} is damaged: {reason}; {way_out}")


def checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a run's `checkpoints`, oldest first."""
    found = [path for path in folder.glob("*/") if re.fullmatch(r"(sft|step)-\d+", path.name)]
    return sorted((path for path in found if (path / "state.json").is_file()), key=Position.of)


def instead_of_run(path: Path) -> str | None:
    """Returns the path to give instead of a run's directory or its `checkpoints`; None for other paths."""
    if not (path / "config.json").is_file():
        for folder in (path / "checkpoints", path):
            if found := checkpoints(folder):
                return f"it is a run: give one of its checkpoints, the last one is {found[-1]}"
    return None


def read_state(checkpoint: Path) -> TrainState:
    """Raises RunError when the directory is not a checkpoint."""
    try:
        body = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return TypeAdapter(TrainState).validate_python(body)
    except (OSError, ValueError) as error:
        reason = instead_of_run(checkpoint) or str(error).splitlines()[0]
        raise RunError(f"no checkpoint at {checkpoint.absolute()}: {reason}") from error


def restore_optimizer(
    checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer, buffer: TraceBuffer | None = None
) -> None:
    """Loads the optimizer's state, torch's generators, and the buffer, if there is one."""
    saved = torch.load(
        checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=bool(policy.shards)
    )
    load_optimizer_state(policy, optimizer, saved["optimizer"])
    if buffer is not None and "buffer" in saved:
        buffer.load(saved["buffer"])
    generators = saved["generators"]
    torch.set_rng_state(generators["cpu"])
    if policy.device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], policy.device)


def check_config(state: TrainState, config: Config, checkpoint: Path, *, is_fork: bool = False) -> None:
    """Raises RunError, with the difference, when the config would make another run of it."""
    done, steps = state.done, config.sft.steps
    if changed := differences(state.config, config, is_fork=is_fork):
        can_fork = not differences(state.config, config, is_fork=True)
        fork = f", or fork it: --resume {checkpoint} under another run.name" if can_fork else ""
        raise RunError(
            f"{checkpoint} was trained with {'; '.join(changed)}. "
            f"Set it back, or start again under another run.name{fork}"
        )
    if done.step > config.train.max_steps:
        raise RunError(
            f"{checkpoint} is at {done}, past train.max_steps = {config.train.max_steps}: to go on, "
            f"set train.max_steps above {done.step}; or start again under another run.name"
        )
    if done.sft_step > steps or (done.step and done.sft_step != steps):
        raise RunError(
            f"{checkpoint} was trained with {done.sft_step} SFT steps; set sft.steps = {done.sft_step} "
            f"again, not {steps}, or start again under another run.name"
        )


def differences(saved: Mapping[str, Any], config: Config, *, is_fork: bool = False) -> list[str]:
    """Returns `section.key = saved, now other` for every key whose change would make another run of it, or
    that even a fork may not change."""
    free = MAY_CHANGE_KEYS
    runs_down = (
        config.guidance.weight_schedule in ("linear", "cosine") or config.guidance.share_end is not None
    )
    if config.train.lr_schedule != "constant" or runs_down:  # to max_steps
        free = free - {"train.max_steps"}
    if is_fork:
        free = free | FORK_KEYS
    return [
        f"{name}.{key} = {before.get(key)!r}, now {value!r}"
        for name, keys in config.model_dump(mode="json").items()
        for before in [saved.get(name, {})]
        if name not in MAY_CHANGE_SECTIONS
        for key, value in keys.items()
        if before.get(key) != value and f"{name}.{key}" not in free
    ]
