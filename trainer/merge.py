"""`ampo model merge`: writes a checkpoint as an ordinary transformers directory, with its adapters merged.

Adapters of a 4-bit student were trained over its 4-bit weights. They are added to those, dequantized, and not
to the original weights, which the student never saw.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from store.errors import RunError
from store.format.files import sync
from trainer.config import StudentConfig
from trainer.run.saved_model import as_saved, check_model, trained_student
from trainer.student.load import dequantized_weights, load_policy, with_adapters
from trainer.student.policy import Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """A written model."""

    out: Path
    dtype: str
    adapters: bool
    """The checkpoint held adapters, which are merged now."""
    four_bits: bool
    """The adapters were trained over 4-bit weights, which are dequantized now."""
    parameters: int
    bytes: int
    """Size of the whole directory."""


def merge(checkpoint: Path, out: Path, *, dtype: str = "auto") -> MergeReport:
    """Writes model, tokenizer and generation config to `out`, which appears whole or not at all.

    Args:
        checkpoint: of a run, or any directory of a model or of adapters.
        dtype: a key of DTYPES; auto: the type in which the model that training began from is stored.

    Raises EngineError when the checkpoint cannot be loaded, RunError when `out` exists or cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} exists; give a new directory")
    given = StudentConfig(model=str(checkpoint))
    check_model(given, named="CHECKPOINT")
    student, adapters = as_saved(given)
    # Merged in float32, whatever the student computed in: the sum is rounded once, when it is written.
    device = "auto" if student.load_in_4bit else "cpu"
    student = student.model_copy(update={"dtype": "float32", "device": device})
    policy = load_policy(student, temperature=1.0, weights=adapters)
    target = _stored_dtype(checkpoint, student) if dtype == "auto" else DTYPES[dtype]
    model = _merged(policy, student, adapters).to(target)
    _write(model, policy, out)
    return MergeReport(
        out=out,
        dtype=str(target).removeprefix("torch."),
        adapters=adapters is not None,
        four_bits=student.load_in_4bit,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(file.stat().st_size for file in out.iterdir()),
    )


def _merged(policy: Policy, student: StudentConfig, adapters: Path | None) -> Any:
    """Returns a plain transformers model with the policy's distribution, made of the policy's parts."""
    if adapters is None:
        return policy.model
    if not student.load_in_4bit:
        return policy.model.merge_and_unload()
    config = AutoConfig.from_pretrained(student.model, revision=student.revision)
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=policy.dtype)  # type: ignore[no-untyped-call]
    missing, unexpected = plain.load_state_dict(dequantized_weights(policy), strict=False)
    plain.tie_weights()
    assert not unexpected, unexpected
    assert set(missing) <= set(plain.all_tied_weights_keys), missing
    return with_adapters(plain, student, adapters).merge_and_unload()


def _stored_dtype(checkpoint: Path, student: StudentConfig) -> torch.dtype:
    """Returns the type of the model that training began from; float32 where that model is gone."""
    origin = trained_student(checkpoint) or student
    try:
        found = AutoConfig.from_pretrained(origin.model, revision=origin.revision).dtype
    except (OSError, ValueError):
        return torch.float32
    return found if found in DTYPES.values() else torch.float32


def _write(model: Any, policy: Policy, out: Path) -> None:
    """Writes to a directory beside `out`, then renames it."""
    eos = list(policy.eos_ids)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        # Every token that ended a response in training ends one at a server, too.
        eos_token_id=eos[0] if len(eos) == 1 else eos,
        pad_token_id=policy.pad_id,
        bos_token_id=model.generation_config.bos_token_id,
    )
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        policy.tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            sync(file)
        temporary.rename(out)
        sync(out.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise RunError(f"cannot write {out}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
