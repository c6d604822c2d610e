"""Finds the student that a path names: a model, a checkpoint of a run, or a directory of adapters."""

from __future__ import annotations

import json
from pathlib import Path

from precompute.engines.checks import check_there
from store.errors import EngineError
from store.records import content_hash
from trainer.config import StudentConfig
from trainer.run.checkpoint import instead_of_run

ADAPTERS = "adapter_config.json"
"""A directory with this file holds adapters and no model."""


def check_model(student: StudentConfig, *, named: str = "student.model") -> None:
    """Raises EngineError, one line that begins with `named`, when `student.model` cannot be loaded.

    For a run's directory the error names the checkpoint to use instead.
    """
    if not student.model:
        raise EngineError(f"{named} is not set: give a model directory or a hub name")
    key = f"{named} = {student.model!r}"
    if instead := instead_of_run(Path(student.model)):
        raise EngineError(f"{key}: {instead}")
    check_there(student.model, student.revision, named=key)


def as_saved(student: StudentConfig) -> tuple[StudentConfig, Path | None]:
    """Returns (config, weights) for `load_policy` of `student.model`, which may be a directory of adapters.

    Adapters are loaded over the model that they were trained on, in 4 bits where they were trained so. Raises
    EngineError when that model does not exist.
    """
    folder = Path(student.model)
    if not (folder / ADAPTERS).is_file():
        return student.model_copy(update={"use_peft": False, "load_in_4bit": False}), None
    base = json.loads((folder / ADAPTERS).read_text(encoding="utf-8")).get("base_model_name_or_path")
    trained = trained_student(folder) or student.model_copy(
        update={"model": base, "revision": None, "use_peft": True}
    )
    check_model(trained, named=f"student.model of {folder}")
    kept = {key: getattr(student, key) for key in ("dtype", "device", "chat_template")}
    return trained.model_copy(update=kept | {"gradient_checkpointing": False}), folder


def trained_student(checkpoint: Path) -> StudentConfig | None:
    """Returns [student] of the run that wrote the checkpoint; None for other directories."""
    path = checkpoint / "state.json"
    if not path.is_file():
        return None
    return StudentConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"]["student"])


def fingerprint(model: str) -> str | None:
    """Returns a hash of the names, sizes and times of a model directory's files; None for a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return content_hash([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
