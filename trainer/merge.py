"""`ampo model merge`: a checkpoint as an ordinary transformers directory, adapters merged into their model.

Adapters were trained on the weights as they compute. So those of a 4-bit student are added to its 4-bit
weights, taken out of their codes again, and not to the original ones, which the student never saw.
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
from trainer.sampling.weight_sync import dequantized
from trainer.student.adapters import with_adapters
from trainer.student.load import load_policy
from trainer.student.model_check import check_base, check_model
from trainer.student.model_files import as_saved, trained_student
from trainer.student.policy import Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What was written."""

    out: Path
    dtype: str
    adapters: bool
    """There were some, and they are merged."""
    four_bits: bool
    """They were trained on 4-bit weights, which stand in the model as what they stood for."""
    parameters: int
    bytes: int
    """Of the whole directory."""


def merge(checkpoint: Path, out: Path, *, dtype: str = "auto") -> MergeReport:
    """Writes model, tokenizer and generation config to `out`, which appears whole or not at all.

    Args:
        checkpoint: of a run, or any directory of a model or of adapters.
        dtype: a key of DTYPES; auto: the type in which the model that training began from is stored.

    Raises EngineError when it cannot be loaded, RunError when `out` is there or cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} is there already; give a new directory")
    check_model(StudentConfig(model=str(checkpoint)), named="CHECKPOINT")
    student, weights = as_saved(StudentConfig(model=str(checkpoint)))
    check_base(student, weights)
    if not student.load_in_4bit:
        student = student.model_copy(update={"device": "cpu"})
    # In float32, whatever the student computed in: the sum is rounded once, when it is written.
    policy = load_policy(student.model_copy(update={"dtype": "float32"}), temperature=1.0, weights=weights)
    model = merged(policy, student, weights)
    kind = _stored_dtype(checkpoint, student) if dtype == "auto" else DTYPES[dtype]
    _write(model.to(kind), policy, out)
    return MergeReport(
        out=out,
        dtype=str(kind).removeprefix("torch."),
        adapters=weights is not None,
        four_bits=student.load_in_4bit,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(file.stat().st_size for file in out.iterdir()),
    )


def merged(policy: Policy, student: StudentConfig, adapters: Path | None) -> Any:
    """A plain transformers model with the policy's distribution. Takes the policy's model apart."""
    if adapters is None:
        return policy.model
    if student.load_in_4bit:
        return with_adapters(_in_full(policy, student), student, adapters).merge_and_unload()
    return policy.model.merge_and_unload()


def _in_full(policy: Policy, student: StudentConfig) -> Any:
    """The model below the adapters with its 4-bit weights as the numbers that they stand for."""
    config = AutoConfig.from_pretrained(student.model, revision=student.revision)
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=policy.dtype)  # type: ignore[no-untyped-call]
    missing, unexpected = plain.load_state_dict(dequantized(policy), strict=False)
    plain.tie_weights()
    tied = set(getattr(plain, "all_tied_weights_keys", None) or ())
    assert not unexpected, unexpected
    assert set(missing) <= tied, missing
    return plain


def _stored_dtype(checkpoint: Path, student: StudentConfig) -> torch.dtype:
    """Of the model that training began from; float32 where that cannot be known any more."""
    origin = trained_student(checkpoint) or student
    try:
        found = AutoConfig.from_pretrained(origin.model, revision=origin.revision).dtype
    except (OSError, ValueError):
        return torch.float32
    return found if found in DTYPES.values() else torch.float32


def _write(model: Any, policy: Policy, out: Path) -> None:
    """Aside, then renamed."""
    eos = list(policy.eos_ids)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        # All that ended a response in training ends one at a server, too.
        eos_token_id=eos[0] if len(eos) == 1 else eos,
        pad_token_id=policy.pad_id,
        bos_token_id=model.generation_config.bos_token_id,
    )
    aside = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        policy.tokenizer.save_pretrained(aside)
        for file in aside.iterdir():
            sync(file)
        aside.rename(out)
        sync(out.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise RunError(f"cannot write {out}: {reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
