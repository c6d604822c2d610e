"""Keys of a teacher that an engine cannot honour on this machine, found before a model is loaded."""

from __future__ import annotations

import os
from importlib.util import find_spec

from precompute.config import TeacherConfig
from store.errors import EngineError

BITSANDBYTES = "bitsandbytes"
CPU_QUANTIZATION = ("awq", "auto_awq", "gptq", "auto_gptq", "compressed-tensors", "inc", "int8")
"""Beginnings of the names of quantizations that vllm computes on a CPU."""


def check_options(teacher: TeacherConfig, engine_name: str) -> None:
    """Raises EngineError with one line for a key that the resolved engine cannot honour on this machine."""
    checks = {"vllm": _check_vllm, "openai": _check_openai, "transformers": _check_transformers}
    if engine_name in checks:
        checks[engine_name](teacher)


def _check_transformers(teacher: TeacherConfig) -> None:
    if teacher.quantization is None:
        return
    if teacher.quantization != BITSANDBYTES:
        raise EngineError(
            f"quantization = {teacher.quantization!r} is not for transformers, which takes {BITSANDBYTES!r} "
            "alone; a checkpoint that is quantized already needs no key"
        )
    if find_spec("bitsandbytes") is None:
        raise EngineError(f'quantization = {BITSANDBYTES!r} needs bitsandbytes: pip install "ampo[qlora]"')


def _check_vllm(teacher: TeacherConfig) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if teacher.tensor_parallel_size > max(gpus, 1):
        raise EngineError(
            f"tensor_parallel_size = {teacher.tensor_parallel_size} needs as many GPUs; there are {gpus}"
        )
    quantization = teacher.quantization
    if quantization is not None and not gpus and not quantization.startswith(CPU_QUANTIZATION):
        raise EngineError(
            f"quantization = {quantization!r} needs a GPU with vllm; on the CPU take engine = "
            f'"transformers" with quantization = {BITSANDBYTES!r}'
        )
    if quantization == BITSANDBYTES and find_spec("vllm_bnb_plugin") is None:
        raise EngineError(
            f"quantization = {BITSANDBYTES!r}: vllm has moved it into a package of its own; "
            'pip install vllm-bnb-plugin, or take engine = "transformers"'
        )


def _check_openai(teacher: TeacherConfig) -> None:
    if not teacher.base_urls:
        raise EngineError('engine "openai" needs base_urls, e.g. base_urls = ["http://127.0.0.1:8000/v1"]')
    name = teacher.api_key_env
    if name is not None and not os.environ.get(name):
        raise EngineError(f"api_key_env = {name!r}: there is no such variable in the environment; export it")
    if teacher.quantization is not None:
        raise EngineError(
            f"quantization = {teacher.quantization!r}: the servers at base_urls decide; leave it out"
        )
