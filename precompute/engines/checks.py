"""The ids that end a completion, and the reasons why a model cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from store.errors import EngineError


def eos_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Returns every id that ends a completion, ascending.

    The generation config may list several: chat models often end a turn with one that the tokenizer does not
    name. Raises EngineError without any: no completion could ever end by itself.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise EngineError("neither generation_config.json nor the tokenizer names an eos_token_id; set one")
    return tuple(sorted(int(i) for i in ids))


def stop_ids_of(model: str, revision: str | None, tokenizer: Any) -> tuple[int, ...]:
    """Returns the EOS ids of a model that is loaded elsewhere. EngineError if there is no such model."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return eos_ids(GenerationConfig.from_pretrained(model, revision=revision or "main"), tokenizer)
    except OSError:
        pass  # the file is optional; the model's config has the ids as well
    try:
        return eos_ids(AutoConfig.from_pretrained(model, revision=revision), tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(model, error) from error


def cannot_load(model: str, error: BaseException | str) -> EngineError:
    """Returns an error of one line that names the model, from a library error of many lines."""
    return EngineError(f"model {model!r} cannot be loaded: {load_failure(model, error)}")


def load_failure(model: str, error: BaseException | str) -> str:
    """Returns why a model cannot be loaded, in one line. A missing directory is reported as such: the library
    takes its path for a hub name and complains about the name."""
    return missing_directory(model) or (" ".join(str(error).split()) or type(error).__name__)[:300]


def missing_directory(model: str) -> str | None:
    """Returns a complaint if `model` looks like a path, which no hub would have, and does not exist."""
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_a_path and not Path(model).exists():
        return f"there is no directory {Path(model).absolute()}"
    return None
