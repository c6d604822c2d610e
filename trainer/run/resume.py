"""Stopping and resuming: the checkpoint to start from, saving and restoring, and how an error ends a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from precompute.config_file import load_config
from store.errors import EngineError, RunError, TrainingError
from store.reader import Usable
from trainer.config import Config
from trainer.method.update import NonFiniteError
from trainer.run import checkpoint
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import Run, explain_memory
from trainer.telemetry.console import TrainReporter
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


def find_start(files: RunFiles, config: Config, resume: str, *, checksums: bool = False) -> Path | None:
    """Returns the checkpoint to resume from, None for a new run.

    Raises RunError when steps would be lost, when another config trained the checkpoint, or, with
    `checksums`, when it is damaged.
    """
    own = checkpoint.checkpoints(files.checkpoints)
    start = own[-1] if own else None
    if resume == "never":
        if (files.root / "config.toml").exists():
            raise RunError(
                f"{files.root} already holds a run; give this one another run.name, or --resume auto"
            )
        return None
    if resume != "auto":
        start = Path(resume).absolute()
        checkpoint.read_state(start)
        if own and (own[-1].parent != start.parent or Position.of(own[-1]) > Position.of(start)):
            raise RunError(
                f"{files.root} holds {own[-1].name}, which this would overwrite; choose another run.name"
            )
    if start is not None:
        if checksums:
            checkpoint.check_complete(start)
        is_fork = start.parent != files.checkpoints
        checkpoint.check_config(checkpoint.read_state(start), config, start, is_fork=is_fork)
    elif any(row["step"] > 0 or "sft/step" in row for row in read_metrics(files.root)):
        begun_with = load_config(Config, str(files.root / "config.toml"), [])
        if changed := checkpoint.differences(begun_with.model_dump(mode="json"), config):
            raise RunError(f"{files.root} holds a run with {'; '.join(changed)}; choose another run.name")
    return start


def restore(run: Run, start: Path, *, changed_store: bool) -> None:
    """Restores the progress, the optimizer and torch's generators. Raises what `check_data` raises."""
    state = check_data(
        start, run.problems_fingerprint, run.usable, changed_store=changed_store, reporter=run.reporter
    )
    if start.parent != run.files.checkpoints:
        changed = checkpoint.differences(state.config, run.config)
        run.files.write_fork(start, changed)
        run.reporter.line(f"a fork of {start}" + (f", trained with {'; '.join(changed)}" if changed else ""))
    run.done, run.saved = state.done, start
    with explain_memory(f"loading the optimizer of {start}"):
        checkpoint.restore_optimizer(start, run.policy, run.last_optimizer, run.buffer)


def check_data(
    start: Path,
    problems_fingerprint: str,
    usable: Mapping[str, Usable],
    *,
    changed_store: bool,
    reporter: TrainReporter,
) -> checkpoint.TrainState:
    """Returns the checkpoint's state. Raises RunError when problems or traces are others than its own;
    `changed_store`: for other traces it only warns.

    Args:
        usable: teacher -> its usable traces now.
    """
    state = checkpoint.read_state(start)
    if state.problems_fingerprint != problems_fingerprint:
        raise RunError(
            f"problems.train holds other problems than {start} was trained on; "
            "give it the same file, or start again under another run.name"
        )
    teachers = sorted({*state.store, *usable})
    if changed := [name for name in teachers if state.store.get(name) != usable.get(name)]:
        others = f"the store holds other traces of {', '.join(changed)} than {start} was trained with"
        if not changed_store:
            raise RunError(
                f"{others}. Give it the same store, start again under another run.name, or add "
                "--resume-with-changed-store"
            )
        reporter.warned(others)
    return state


def is_evaluated(run: Run, step: int) -> bool:
    """Returns whether the step ends with an evaluation."""
    due = step == run.config.train.max_steps or step % (run.config.eval.every or 1) == 0
    return due and bool(run.eval_prompts)


def lacks_evaluation(run: Run) -> bool:
    """Returns whether the evaluation after the last step is still to come, as after a stop in it."""
    rows = [row for row in read_metrics(run.files.root) if row["step"] == run.done.step]
    missing = run.done.step == 0 or (rows and not any(key.startswith("eval/") for row in rows for key in row))
    return bool(missing) and is_evaluated(run, run.done.step)


def save(run: Run) -> None:
    """Saves a checkpoint of the steps that are done, unless it exists."""
    if run.done == Position() or (run.saved is not None and run.saved.name == run.done.name):
        return
    state = checkpoint.TrainState(
        done=run.done,
        config=run.config.model_dump(mode="json"),
        problems_fingerprint=run.problems_fingerprint,
        store=run.usable,
    )
    folder = run.files.checkpoints
    with explain_memory(f"saving {run.done} (older checkpoints in {folder} are complete)"):
        run.saved = checkpoint.save(
            folder,
            run.policy,
            run.last_optimizer,
            state,
            keep_last=run.config.run.keep_last,
            world=run.world,
            buffer=run.buffer,
        )
    run.reporter.line(f"saved {run.saved}")


@contextmanager
def explain_step(run: Run, step: Position) -> Iterator[None]:
    """Turns an error of a step into one line that names the cause and the last checkpoint."""
    where = f"the last checkpoint is {run.saved}" if run.saved else "no checkpoint exists yet"
    try:
        with explain_memory(f"taking {step} ({where})"):
            yield
    except NonFiniteError as error:
        batch = run.files.write_failed_batch(step, error.sequences)
        cause = f"{error}; its batch is in {batch}; a smaller train.learning_rate often helps"
        raise TrainingError(f"{step}: {cause}; {where}") from error
    except (FloatingPointError, EngineError) as error:
        raise TrainingError(f"{step}: {error}; {where}") from error
