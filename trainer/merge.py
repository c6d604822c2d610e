"""`ampo model merge`: writes a checkpoint as an ordinary transformers directory, with its adapters merged.

Adapters of a 4-bit student were trained over its 4-bit weights. They are added to those, dequantized, and not
to the original weights, which the student never saw.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from store.errors import RunError
from trainer.config import StudentConfig
from trainer.run.saved_model import as_saved, check_model
from trainer.student.adapters import over_base, trained_student, with_adapters
from trainer.student.load import load_policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(checkpoint: Path, out: Path, *, dtype: str = "auto") -> dict[str, Any]:
    """Writes model, tokenizer and generation config to `out`, which appears whole or not at all.

    Args:
        checkpoint: of a run, or any directory of a model or of adapters.
        dtype: a key of DTYPES; auto: the type in which the model that training began from is stored.

    Returns the report of `--json`. Raises EngineError when the checkpoint cannot be loaded, RunError when
    `out` exists or cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} exists; give a new directory")
    given = StudentConfig(model=str(checkpoint))
    check_model(given, named="CHECKPOINT")
    student = as_saved(given)
    # Merged in float32, whatever the student computed in: the sum is rounded once, when it is written.
    device = "auto" if student.load_in_4bit else "cpu"
    student = student.model_copy(update={"dtype": "float32", "device": device})
    policy = load_policy(student, temperature=1.0)
    model = policy.model
    if student.load_in_4bit:
        model = with_adapters(model.unload().dequantize(dtype=torch.float32), student, checkpoint)
    if student.use_peft:
        model = model.merge_and_unload()
    origin = over_base(student)[0] if student.use_peft else trained_student(checkpoint) or student
    target = DTYPES.get(dtype) or _stored_dtype(origin)
    model.to(target)
    # Every token that ended a response in training ends one at a server, too.
    model.generation_config.eos_token_id = list(policy.eos_ids)
    model.generation_config.pad_token_id = policy.pad_id
    _write(model, policy.tokenizer, out, processor_files(origin))
    return {
        "out": str(out),
        "dtype": str(target).removeprefix("torch."),
        "adapters": student.use_peft,
        "four_bits": student.load_in_4bit,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _stored_dtype(origin: StudentConfig) -> torch.dtype:
    """Returns the type of the model that training began from; float32 where that model is gone."""
    try:
        found = AutoConfig.from_pretrained(origin.model, revision=origin.revision).dtype
    except (OSError, ValueError):
        return torch.float32
    return found if found in DTYPES.values() else torch.float32


def processor_files(origin: StudentConfig) -> list[str]:
    """Returns the paths of the model's files for images and other media; empty for a model of text alone."""
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    try:
        found = [cached_file(origin.model, name, revision=origin.revision, **lenient) for name in names]
    except OSError:  # the model is gone
        return []
    return [path for path in found if path]


def _write(model: Any, tokenizer: Any, out: Path, files: Sequence[str]) -> None:
    """Writes to a directory beside `out`, with copies of the files, then renames it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".tmp-", dir=out.parent) as temporary:
            whole = Path(temporary) / out.name
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            for file in files:
                shutil.copy(file, whole)
            whole.rename(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise RunError(f"cannot write {out}: {reason}") from error
