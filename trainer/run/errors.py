"""One-line errors for what ends a run: a non-finite loss, a lack of GPU memory, a failing sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from store.errors import EngineError, TrainingError
from trainer.method.update import NonFiniteError
from trainer.run.run_dir import Position, RunFiles


@contextmanager
def explain_step(run: RunFiles, step: Position, saved: Path | None) -> Iterator[None]:
    """Turns an error of a step into one line that names the cause and the last checkpoint."""
    where = f"the last checkpoint is {saved}" if saved else "no checkpoint exists yet"
    try:
        yield
    except NonFiniteError as error:
        batch = run.write_failed_batch(step, error.sequences)
        cause = f"{error}; its batch is in {batch}; a smaller train.learning_rate often helps"
        raise TrainingError(f"{step}: {cause}; {where}") from error
    except (FloatingPointError, EngineError) as error:
        raise TrainingError(f"{step}: {error}; {where}") from error
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{step}: out of GPU memory; lower train.max_tokens_per_microbatch or rollout.batch_size "
            f"(both leave the result as it is), or set student.gradient_checkpointing; {where}"
        ) from error


@contextmanager
def explain_memory(doing: str) -> Iterator[None]:
    """Turns a lack of GPU memory outside of steps into one line that names the way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory while {doing}: `ampo train --dry-run` shows what takes how much, and the "
            "settings that fit"
        ) from error
