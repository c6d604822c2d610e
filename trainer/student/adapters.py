"""LoRA adapters: new ones, or those of a directory (ours, TRL's or peft's), over their base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from store.errors import EngineError, install_hint
from trainer.config import StudentConfig

ADAPTERS = "adapter_config.json"
"""A directory with this file holds adapters and no model."""


def adapter_settings(model: str | Path) -> dict[str, Any] | None:
    """Returns peft's settings of a directory of adapters; None for other directories and for hub names."""
    path = Path(model) / ADAPTERS
    if not path.is_file():
        return None
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    if kind != "LORA" or not base:
        lack = f"peft_type = {kind!r}" if base else "no base_model_name_or_path"
        raise EngineError(
            f"{path} has {lack}: give LoRA adapters that name their base model, or a whole model"
        )
    return settings


def trained_student(checkpoint: Path) -> StudentConfig | None:
    """Returns [student] of the run that wrote the checkpoint; None for other directories."""
    path = checkpoint / "state.json"
    if not path.is_file():
        return None
    return StudentConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"]["student"])


def as_trained(student: StudentConfig) -> dict[str, Any]:
    """Returns key -> value of [student] with which the adapters at `student.model` were trained."""
    settings, run = adapter_settings(student.model), trained_student(Path(student.model))
    if settings is None:
        return {}
    found = {"lora_r": settings["r"], "lora_alpha": settings["lora_alpha"]}
    if student.lora_targets:
        targets = settings["target_modules"]
        found["lora_targets"] = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    return found if run is None else found | {"load_in_4bit": run.load_in_4bit}


def over_base(student: StudentConfig) -> tuple[StudentConfig, Path | None]:
    """Returns (config, adapters): where `student.model` is a directory of adapters, the config of the model
    that they were trained on.

    Raises EngineError where the config would not train these adapters further.
    """
    folder, settings = Path(student.model), adapter_settings(student.model)
    if settings is None:
        return student, None
    key = f"student.model = {student.model!r}"
    if not student.use_peft:
        raise EngineError(
            f"{key} holds LoRA adapters: set student.use_peft = true to train them further, or merge them "
            f"into their model first: ampo model merge {folder} OUT"
        )
    given = student.model_copy(update={"lora_targets": tuple(sorted(student.lora_targets))})
    wanted = [
        f"student.{name} = {json.dumps(value)}"
        for name, value in as_trained(student).items()
        if getattr(given, name) != value
    ]
    if wanted:
        raise EngineError(
            f"{key} holds LoRA adapters of other settings: set {', '.join(wanted)} to train them further, or "
            f"merge them first: ampo model merge {folder} OUT"
        )
    base, run = settings["base_model_name_or_path"], trained_student(folder)
    revision = run.revision if run and run.model == base else settings.get("revision")
    return student.model_copy(update={"model": base, "revision": revision}), folder


def with_adapters(model: Any, student: StudentConfig, adapters: Path | None) -> Any:
    """Returns the model frozen, with float32 LoRA adapters on `student.lora_targets`.

    `adapters` holds their weights; None starts new ones, which change nothing at first (B = 0). A model on
    the meta device gets the adapters' shapes. Raises EngineError without peft.
    """
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights at the first forward pass in eval mode, into a form
        # without gradients: after one rollout nothing below the last layer would learn.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    peft = import_peft()
    lora = peft.LoraConfig(
        r=student.lora_r,
        lora_alpha=student.lora_alpha,
        target_modules=list(student.lora_targets) or "all-linear",
        revision=student.revision,
        task_type="CAUSAL_LM",
    )
    if adapters is not None:
        lora = peft.LoraConfig.from_pretrained(adapters)
    lora.lora_dropout, lora.inference_mode = student.lora_dropout, False
    if adapters is None or next(model.parameters()).is_meta:
        return peft.get_peft_model(model, lora)
    return peft.PeftModel.from_pretrained(model, adapters, config=lora, is_trainable=True)


@contextmanager
def dropping_out(model: Any) -> Iterator[None]:
    """Switches the adapters' dropout (`student.lora_dropout`) on for the block, and nothing else."""
    dropouts = [module for name, module in model.named_modules() if "lora_dropout" in name]
    for module in dropouts:
        module.training = True
    try:
        yield
    finally:
        for module in dropouts:
            module.training = False


def import_peft() -> Any:
    """Returns the module. Raises EngineError without it."""
    try:
        import peft
    except ImportError:
        raise EngineError(f"student.use_peft needs peft: {install_hint('qlora')}") from None
    return peft
