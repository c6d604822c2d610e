"""Checks of a model and a teacher's keys before anything is loaded, and the reasons why loading fails."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from precompute.config import TeacherConfig
from store.errors import EngineError, install_hint

BITSANDBYTES = "bitsandbytes"


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


def check_there(model: str, revision: str | None, *, named: str) -> None:
    """Raises EngineError, one line that begins with `named`, if there is no such model or no hub to ask.

    Libraries would ask a hub for minutes, and log every try; this asks once. They ask for downloaded models,
    too: without a hub they need HF_HUB_OFFLINE. Unclear answers of a hub raise nothing here; loading the
    model will explain them.
    """
    if reason := why_not_there(model, revision):
        raise EngineError(f"{named}: {reason}")


def why_not_there(model: str, revision: str | None) -> str | None:
    """Returns why there is no such model, with the way out; None if there may be."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    has_no_config = not Path(model, "config.json").exists()
    if model.endswith(".gguf") or (has_no_config and any(Path(model).glob("*.gguf"))):
        return (
            "GGUF weights are not loaded here: give the model that they were made from, or serve a teacher's "
            '(llama.cpp, Ollama) and set engine = "openai", api = "chat"'
        )
    if Path(model).is_dir():
        return None
    if missing := missing_directory(model):
        return missing
    absent = f"there is no such directory, it was not downloaded before (`hf download {model}`)"
    hub, downloaded = constants.ENDPOINT, False
    try:
        downloaded = isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
        if constants.is_offline_mode():
            return None if downloaded else f"{absent}, and HF_HUB_OFFLINE is set: unset it to download"
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision))
    except errors.HFValidationError:
        return "it is neither a directory nor a name that a hub could have (OWNER/NAME)"
    except errors.HfHubHTTPError as error:
        absences = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        if downloaded or not isinstance(error, absences):
            return None
        wanted = f"revision {revision!r} of it" if revision else "such model"
        return (
            f"there is no such directory, and {hub} gives you no {wanted}: is the name right? (a private or "
            f"gated one needs its terms at {hub}/{model} and `hf auth login`)"
        )
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # of any HTTP client
        unreachable = f"{hub} cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
        if downloaded:
            return f"{unreachable}: set HF_HUB_OFFLINE=1 to take it as it was downloaded"
        return f"{absent}, and {unreachable}: download it first with a network, then set HF_HUB_OFFLINE=1"
    return None


def check_options(teacher: TeacherConfig, engine_name: str) -> None:
    """Raises EngineError with one line for a key that the resolved engine cannot honour on this machine."""
    checks = {"vllm": _vllm_problem, "openai": _openai_problem, "transformers": _transformers_problem}
    if engine_name in checks and (problem := checks[engine_name](teacher)):
        raise EngineError(problem)


def _transformers_problem(teacher: TeacherConfig) -> str | None:
    if teacher.api == "chat":
        return 'api = "chat" is for servers: set engine = "openai" and base_urls'
    if teacher.quantization not in {None, BITSANDBYTES}:
        return (
            f"quantization = {teacher.quantization!r} is not for transformers, which takes {BITSANDBYTES!r} "
            "alone; a checkpoint that is quantized already needs no key"
        )
    if teacher.quantization and find_spec("bitsandbytes") is None:
        return f"quantization = {BITSANDBYTES!r} needs bitsandbytes: {install_hint('qlora')}"
    return None


def _vllm_problem(teacher: TeacherConfig) -> str | None:
    import torch

    if teacher.api == "chat":
        return 'api = "chat" is for servers: set engine = "openai" and base_urls'

    if (Path(teacher.model) / "adapter_config.json").is_file():
        return (
            f"{teacher.model} holds LoRA adapters, which are not loaded into vllm here; merge them first: "
            f"ampo model merge {teacher.model} OUT"
        )
    gpus = torch.cuda.device_count()
    if teacher.tensor_parallel_size > max(gpus, 1):
        return f"tensor_parallel_size = {teacher.tensor_parallel_size} needs as many GPUs; there are {gpus}"
    if teacher.quantization == BITSANDBYTES and find_spec("vllm_bnb_plugin") is None:
        return (
            f"quantization = {BITSANDBYTES!r}: vllm has moved it into a package of its own; "
            'pip install vllm-bnb-plugin, or take engine = "transformers"'
        )
    return None


def _openai_problem(teacher: TeacherConfig) -> str | None:
    if not teacher.base_urls:
        return 'engine "openai" needs base_urls, e.g. base_urls = ["http://127.0.0.1:8000/v1"]'
    name = teacher.api_key_env
    if name is not None and not os.environ.get(name):
        return f"api_key_env = {name!r}: there is no such variable in the environment; export it"
    if teacher.quantization is not None:
        return f"quantization = {teacher.quantization!r}: the servers at base_urls decide; leave it out"
    return None
