"""What engines settle before they draw: where a completion ends, what fits, why a model failed to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from precompute.engines import Request, Sampling
from store.errors import EngineError


def eos_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion, ascending: the generation config may list several, and chat models
    often end a turn with one that the tokenizer does not name.

    Raises EngineError when there is none: no completion could ever end by itself.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise EngineError("neither generation_config.json nor the tokenizer names an eos_token_id; set one")
    return tuple(sorted(int(i) for i in ids))


def stop_ids_of(model: str, revision: str | None, tokenizer: Any) -> tuple[int, ...]:
    """The EOS ids of a model that is loaded elsewhere. EngineError when there is no such model."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return eos_ids(GenerationConfig.from_pretrained(model, revision=revision or "main"), tokenizer)
    except OSError:
        pass  # the file is optional: the model's config says the same
    try:
        return eos_ids(AutoConfig.from_pretrained(model, revision=revision), tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(model, error) from error


def check_lengths(requests: Sequence[Request], sampling: Sampling, context_length: int | None) -> None:
    """Raises EngineError when a request does not fit into `context_length` positions (None: no limit)."""
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    if context_length is not None and longest + sampling.max_tokens > context_length:
        raise EngineError(
            f"max_tokens = {sampling.max_tokens} and a prompt of {longest} tokens exceed the model's "
            f"{context_length} positions; max_tokens may be {max(context_length - longest, 0)} at most"
        )
    empty = next((request.request_id for request in requests if not request.prompt_ids), None)
    if empty is not None:
        raise EngineError(f"request {empty} has an empty prompt; a prompt needs one token at least")


def cannot_load(model: str, error: BaseException | str) -> EngineError:
    """One line that names the model, out of a library error that runs over many."""
    return EngineError(f"model {model!r} cannot be loaded: {load_failure(model, error)}")


def load_failure(model: str, error: BaseException | str) -> str:
    """Why a model cannot be loaded, in one line. A path that is not there is said to be just that: the
    library takes it for a hub name and says what is wrong with the name."""
    return missing_directory(model) or (" ".join(str(error).split()) or type(error).__name__)[:300]


def missing_directory(model: str) -> str | None:
    """That there is no such directory, where `model` looks like a path and no hub would have it."""
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_a_path and not Path(model).exists():
        return f"there is no directory {Path(model).absolute()}"
    return None
