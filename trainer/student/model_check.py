"""Whether there is a student at all: asked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from precompute.engines.hub import check_there
from store.errors import EngineError
from trainer.config import StudentConfig
from trainer.run.checkpoint import instead_of_run


def check_model(student: StudentConfig, *, named: str = "student.model") -> None:
    """EngineError, one line that begins with `named`, when nothing can be loaded by `student.model`.

    A run's directory is none of a model; the error says which of its checkpoints is one.
    """
    if not student.model:
        raise EngineError(f"{named} is not set: give a model directory or a hub name")
    whole = f"{named} = {student.model!r}"
    if instead := instead_of_run(Path(student.model)):
        raise EngineError(f"{whole}: {instead}")
    check_there(student.model, student.revision, named=whole)


def check_base(student: StudentConfig, adapters: Path | None) -> None:
    """EngineError when the model that `adapters` belong to is gone; None: there are none."""
    if adapters is not None:
        check_model(student, named=f"student.model of {adapters}")
