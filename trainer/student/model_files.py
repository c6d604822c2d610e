"""Model directories: what is in them, and what tells two of them apart."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

from store.errors import EngineError
from trainer.config import StudentConfig

ADAPTERS = "adapter_config.json"
"""Its presence says that a directory holds adapters and no model."""

WHOLE_BYTES = 1 << 20
"""Larger files are looked at in places."""
PLACES = 16


def as_saved(student: StudentConfig) -> tuple[StudentConfig, Path | None]:
    """(config, weights) for `load_policy` of `student.model`, which may be a directory of adapters: those
    come on their own base, in 4 bits where they were trained so. Raises EngineError."""
    folder = Path(student.model)
    if not (folder / ADAPTERS).is_file():
        return student.model_copy(update={"use_peft": False, "load_in_4bit": False}), None
    trained = trained_student(folder) or student.model_copy(
        update={"model": _base(folder), "revision": None, "use_peft": True}
    )
    own = {key: getattr(student, key) for key in ("dtype", "device", "chat_template")}
    return trained.model_copy(update=own | {"gradient_checkpointing": False}), folder


def trained_student(checkpoint: Path) -> StudentConfig | None:
    """[student] of the run that wrote the checkpoint; None where it is none of ours."""
    path = checkpoint / "state.json"
    if not path.is_file():
        return None
    return StudentConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"]["student"])


def _base(folder: Path) -> str:
    name = json.loads((folder / ADAPTERS).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise EngineError(f"{folder / ADAPTERS} does not name the model that its adapters belong to")
    return str(name)


def fingerprint(model: str) -> str | None:
    """Of a model directory's files; None for a hub name. Large files count by size and sixteen places of
    64 KiB: training changes all of them."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in {"optimizer.pt", "state.json"}:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            _update(digest, path)
    return digest.hexdigest()


def _update(digest: blake2b, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return
        for place in range(PLACES):
            file.seek((size - 2**16) * place // (PLACES - 1))
            digest.update(file.read(2**16))
