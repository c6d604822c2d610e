"""Keys of a teacher that an engine cannot honour on this machine, found before a model is loaded."""

from __future__ import annotations

import os
from importlib.util import find_spec

from precompute.config import TeacherConfig
from store.errors import EngineError

BITSANDBYTES = "bitsandbytes"


def check_options(teacher: TeacherConfig, engine_name: str) -> None:
    """Raises EngineError with one line for a key that the resolved engine cannot honour on this machine."""
    checks = {"vllm": _vllm_problem, "openai": _openai_problem, "transformers": _transformers_problem}
    if engine_name in checks and (problem := checks[engine_name](teacher)):
        raise EngineError(problem)


def _transformers_problem(teacher: TeacherConfig) -> str | None:
    if teacher.quantization not in {None, BITSANDBYTES}:
        return (
            f"quantization = {teacher.quantization!r} is not for transformers, which takes {BITSANDBYTES!r} "
            "alone; a checkpoint that is quantized already needs no key"
        )
    if teacher.quantization and find_spec("bitsandbytes") is None:
        return f'quantization = {BITSANDBYTES!r} needs bitsandbytes: pip install "ampo[qlora]"'
    return None


def _vllm_problem(teacher: TeacherConfig) -> str | None:
    import torch

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
