"""The checkpoint that a run resumes from, and the checks that it continues the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from precompute.config_file import load_config
from store.errors import RunError
from trainer.config import Config
from trainer.run import checkpoint
from trainer.run.checkpoint import TrainState
from trainer.run.errors import explain_memory
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import Parts
from trainer.telemetry.metrics import read_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Result of a call of `train`."""

    run: Path
    done: Position
    """Steps taken in all, those before a resume included."""
    checkpoint: Path | None
    """The last checkpoint; None without one."""
    interrupted_by: str | None
    """`SIGINT` or `SIGTERM`; None when it ran to the end."""


def find_complete_start(run: RunFiles, config: Config, resume: str) -> Path | None:
    """Returns `find_start`. Raises RunError when the checkpoint is damaged, or another config trained it."""
    start_from = find_start(run, config, resume)
    if start_from is not None:
        checkpoint.check_complete(start_from)
        checkpoint.check_config(checkpoint.read_state(start_from), config, start_from)
    return start_from


def check_unchanged(run: RunFiles, config: Config, resume: str, start_from: Path | None) -> None:
    """Raises RunError when another process trained the run while this one was loading."""
    if find_start(run, config, resume) != start_from:
        raise RunError(
            f"{run.root} was trained by another process meanwhile; the same command goes on from there"
        )


def find_start(run: RunFiles, config: Config, resume: str) -> Path | None:
    """Returns the checkpoint to resume from, None for a new run. Raises RunError when steps would be lost."""
    own = checkpoint.checkpoints(run.checkpoints)
    if resume == "auto":
        if not own:
            check_same_beginning(run, config)
        return own[-1] if own else None
    if resume == "never":
        if (run.root / "config.toml").exists():
            raise RunError(
                f"{run.root} already holds a run; give this one another run.name, or --resume auto"
            )
        return None
    start = Path(resume).absolute()
    checkpoint.read_state(start)
    later = [path for path in own if Position.of(path) > Position.of(start) or path.parent != start.parent]
    if later:
        raise RunError(
            f"{run.root} holds {later[-1].name}, which this would overwrite; choose another run.name"
        )
    return start


def check_same_beginning(run: RunFiles, config: Config) -> None:
    """Raises RunError when a run without a checkpoint was begun with another config."""
    if any(row["step"] > 0 or "sft/step" in row for row in read_metrics(run.root)):
        begun_with = load_config(Config, str(run.root / "config.toml"), [])
        if changed := checkpoint.differences(begun_with.model_dump(mode="json"), config):
            raise RunError(f"{run.root} holds a run with {'; '.join(changed)}; choose another run.name")


def optimizer_at(parts: Parts, done: Position) -> torch.optim.Optimizer:
    """Returns the optimizer that took the last step: SFT has its own."""
    return parts.sft.optimizer if done.step == 0 and done.sft_step else parts.optimizer


def resume_state(parts: Parts, start_from: Path | None, *, changed_store: bool) -> Position:
    """Restores the optimizer, and returns the steps that are done."""
    if start_from is None:
        return Position()
    state = checkpoint.read_state(start_from)
    if state.problems_fingerprint != parts.problems_fingerprint:
        raise RunError(
            f"problems.train holds other problems than {start_from} was trained on; "
            "give it the same file, or start again under another run.name"
        )
    if changed := checkpoint.store_differences(state.store, parts.usable):
        if not changed_store:
            raise RunError(
                f"the store holds other traces than {start_from} was trained with: {'; '.join(changed)}. "
                "Give it the same store, start again under another run.name, or add "
                "--resume-with-changed-store"
            )
        parts.reporter.warned(f"the store holds other traces than before: {'; '.join(changed)}")
    checkpoint.restore_optimizer(start_from, parts.policy, optimizer_at(parts, state.done))
    return state.done


def save_checkpoint(parts: Parts, done: Position) -> Path:
    """Saves a checkpoint of the step that was just finished."""
    state = TrainState(
        done=done,
        config=parts.config.model_dump(mode="json"),
        problems_fingerprint=parts.problems_fingerprint,
        store=parts.usable,
    )
    with explain_memory(f"saving {done} (older checkpoints in {parts.run.checkpoints} are complete)"):
        path = checkpoint.save(
            parts.run.checkpoints,
            parts.policy,
            optimizer_at(parts, done),
            state,
            keep_last=parts.config.run.keep_last,
            world=parts.world,
        )
    parts.reporter.line(f"saved {path}")
    return path
