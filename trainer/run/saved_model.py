"""Finds the student that a path names: a model, a checkpoint of a run, or a directory of adapters."""

from __future__ import annotations

from pathlib import Path

from precompute.engines.checks import check_there
from store.errors import EngineError
from store.records import content_hash
from trainer.config import StudentConfig
from trainer.run.checkpoint import instead_of_run
from trainer.student.adapters import adapter_settings, as_trained


def check_model(student: StudentConfig, *, named: str = "student.model") -> None:
    """Raises EngineError, one line that begins with `named`, when `student.model` cannot be loaded.

    For a run's directory the error names the checkpoint to use instead.
    """
    if not student.model:
        raise EngineError(f"{named} is not set: give a model directory or a hub name")
    key = f"{named} = {student.model!r}"
    if instead := instead_of_run(Path(student.model)):
        raise EngineError(f"{key}: {instead}")
    model, revision = student.model, student.revision
    while settings := adapter_settings(model):
        key += f": the base model {settings['base_model_name_or_path']!r} of its adapters"
        model, revision = settings["base_model_name_or_path"], settings.get("revision")
    check_there(model, revision, named=key)


def as_saved(student: StudentConfig) -> StudentConfig:
    """Returns the config for `load_policy` of `student.model`: a whole model, or adapters with their own
    settings, in 4 bits where they were trained so."""
    plain = {"use_peft": False, "load_in_4bit": False, "lora_targets": (), "gradient_checkpointing": False}
    student = student.model_copy(update=plain)
    trained = as_trained(student)
    return student.model_copy(update={"use_peft": True} | trained) if trained else student


def fingerprint(model: str) -> str | None:
    """Returns a hash of the names, sizes and times of a model directory's files; None for a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return content_hash([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
