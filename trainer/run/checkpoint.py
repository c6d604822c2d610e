"""Checkpoints: whole or not there, and enough to go on as if nothing had happened.

    checkpoints/step-000050/
      config.json, *.safetensors, tokenizer files     an ordinary transformers model
      optimizer.pt                                    the optimizer's state and torch's generators
      state.json                                      steps, config, what the problems and the store were,
                                                      size and checksum of every other file
    checkpoints/sft-000050/                           the same in SFT, with its optimizer

Sampling, order of problems and placement are functions of (seed, step, problem), so no position is needed
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
"""Sections (None: whole) and keys that may differ on resume: they do not change what a step computes.
Problems and store may lie elsewhere: what they hold is compared by fingerprint.
A chat template's path may; what it says is compared when the tokenizer is loaded.
`sft.steps` may until the first sampling step, see `check_config`.
A schedule that runs down to max_steps is the exception, see `differences`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """What a checkpoint says of itself."""

    done: Position
    config: Mapping[str, Any]
    problems_fingerprint: str
    """Content hash of the training problems, in order."""
    store: Mapping[str, Usable]
    """teacher -> what may be asked of it; empty where nothing is asked."""


def save(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    keep_last: int,
    world: World = ALONE,
) -> Path:
    """Writes `folder/step-N` aside, renames it, then removes all but the last `keep_last`.

    Every process calls it; weights dealt out over them come together at the first one, which writes.

    Raises RunError when the disk is full or not writable; what was there before stays.
    """
    target = folder / state.done.name
    aside = folder / f".tmp-{target.name}"
    weights, moments = trained_weights(policy), optimizer_state(policy, optimizer)
    if not world.is_main:
        return target
    try:
        clear_leftovers(folder)
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
        raise RunError(f"cannot save {target}: {reason}; older checkpoints are whole") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoints(folder)[:-keep_last]:
        _remove(old)
    return target


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed save or removal left behind."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Renames first: a removal that is killed half-way must not leave what looks whole."""
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
    body = {"optimizer": moments, "generators": _generators(policy.device)}
    torch.save(body, aside / "optimizer.pt")
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
        return [file.stat().st_size, hashlib.file_digest(opened, _checksum).hexdigest()]


def _checksum() -> Any:
    return hashlib.blake2b(digest_size=16)


def check_whole(checkpoint: Path) -> None:
    """RunError, with the way out, when a file is not what was saved: cut, changed or gone."""
    reason = _damage(checkpoint)
    if reason is None:
        return
    older = [path for path in checkpoints(checkpoint.parent) if Position.of(path) < Position.of(checkpoint)]
    whole = next((path for path in reversed(older) if _damage(path) is None), None)
    way_out = (
        f"remove it to go on from {whole}, the last one that is whole"
        if whole
        else "no older one is whole: start anew under another run.name"
    )
    raise RunError(f"{checkpoint} is damaged: {reason}; {way_out}")


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None: nothing."""
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


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators of the CPU and of the student's device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints below `folder`, oldest first."""
    names = (*folder.glob("sft-*"), *folder.glob("step-*"))
    return sorted((path for path in names if (path / "state.json").is_file()), key=Position.of)


def instead_of_run(path: Path) -> str | None:
    """What to give instead of a run's directory, or of its `checkpoints`; None: `path` is neither."""
    if (path / "config.json").is_file() or (path / "state.json").is_file():
        return None
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
            return f"it is a run: give one of its checkpoints, the last one is {found[-1]}"
    is_run = (path / "config.toml").is_file() and (path / "checkpoints").is_dir()
    return "it is a run that has no checkpoint yet" if is_run else None


def read_state(checkpoint: Path) -> TrainState:
    """RunError when the folder is no checkpoint."""
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


def check_problems(state: TrainState, problems_fingerprint: str, checkpoint: Path) -> None:
    """RunError when going on with these problems would not be the same run."""
    if state.problems_fingerprint != problems_fingerprint:
        raise RunError(
            f"problems.train holds other problems than {checkpoint} was trained on; "
            f"give it the same file, or start anew under another run.name"
        )


def check_config(state: TrainState, config: Config, checkpoint: Path) -> None:
    """RunError, with the difference, when going on with this config would not be the same run."""
    changed = differences(state.config, config)
    if changed:
        raise RunError(
            f"{checkpoint} was trained with {'; '.join(changed)}. "
            f"Set it back, or start anew under another run.name"
        )
    if state.done.step > config.train.max_steps:
        raise RunError(
            f"{checkpoint} is at {state.done}, past train.max_steps = {config.train.max_steps}: to go on, "
            f"set train.max_steps above {state.done.step}; or start anew under another run.name"
        )
    steps = config.sft.steps
    if state.done.sft_step > steps or (state.done.step and state.done.sft_step != steps):
        raise RunError(
            f"{checkpoint} has {state.done.sft_step} SFT steps behind it; set sft.steps = "
            f"{state.done.sft_step} again, not {steps}, or start anew under another run.name"
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
    """What may be asked for now and could not be then, or the other way round, by teacher."""
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
