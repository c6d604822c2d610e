"""Drawing a step's samples with transformers: our refilled batches, one static batch, continuous batching.

    python -m bench.rollouts [--models lab/models/student lab/models/teacher-words] [--problems 16]

The same model, prompts (lab/problems/train.jsonl, 8 samples each) and sampling (temperature 1, at most 160
tokens), float32, each way in a process of its own with one thread; one pass warms up. The lab's
student writes responses of one length, its teachers of many. A GPU is used where there is one.

    refilled    what `ampo` samples with (`TransformersEngine`): a seed for each row, prompts
                are read once a problem, ended rows leave and others take their places
    static      `generate(do_sample=True)` over the whole step as one padded batch
    continuous  `generate_batch`: transformers' continuous batching with a paged cache, sized for the whole
                step on a CPU (left to itself it never begins there, transformers 5.19) and by itself on CUDA

    python -m bench.rollouts --model .cache/smollm2-135m

A larger model on the problems of `make real` (at most 48 tokens), by precision and engine: refilled in
float32; autocast (float32 weights, computed in bfloat16); bfloat16 (weights too); vllm in either.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil  # type: ignore[import-untyped]  # comes with vLLM and peft
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from bench.measure import alone, ways_table
from precompute.config import TeacherConfig
from precompute.engines import Engine, Request, Sampling
from precompute.engines.batch import left_padded
from precompute.engines.checks import eos_ids
from precompute.engines.transformers_engine import TransformersEngine
from precompute.engines.vllm_engine import VllmEngine, llm_options
from precompute.problems.problem_files import load_problems
from precompute.problems.prompts import render_prompt

SAMPLES = 8
PAGE = 32
"""Tokens of a page of the paged cache."""

Prompts = list[tuple[int, ...]]
Draw = Callable[[Prompts], int]
"""Draws a sample for each prompt and returns how many tokens they have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does."""

    model: str
    way: str
    problems: int
    repeats: int
    file: str = "lab/problems/train.jsonl"
    max_tokens: int = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The best of the repeats by CPU seconds, which what else runs on the machine moves little."""

    cpu_seconds: float
    seconds: float
    tokens: int


def main() -> None:
    options = parse()
    models, ways = ([options.model], BY_PRECISION) if options.model else (options.models, options.ways)
    size = {"problems": options.problems, "repeats": options.repeats}
    size |= {"file": "lab/real/train.jsonl", "max_tokens": 48} if options.model else {}
    found = {model: {way: alone(run, Task(model=model, way=way, **size)) for way in ways} for model in models}
    Console().print(ways_table("drawing a step's samples", "model", found, FIGURES))
    rows = {model: {way: summary(row) for way, row in ways.items()} for model, ways in found.items()}
    print(json.dumps({"bench": "rollouts", **rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lab/models/student", "lab/models/teacher-words"])
    parser.add_argument("--model")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[:3])
    return parser.parse_args()


def run(task: Task) -> Measured:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    prompts = prompts_of(task)
    draw = WAYS[task.way](task)
    draw(prompts)
    return min((timed(draw, prompts) for _ in range(task.repeats)), key=lambda found: found.cpu_seconds)


def timed(draw: Draw, prompts: Prompts) -> Measured:
    started, cpu = time.perf_counter(), cpu_seconds()
    tokens = draw(prompts)
    return Measured(cpu_seconds=cpu_seconds() - cpu, seconds=time.perf_counter() - started, tokens=tokens)


def cpu_seconds() -> float:
    """Of this process and of those that it has started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def prompts_of(task: Task) -> Prompts:
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    problems = load_problems(task.file).problems[: task.problems]
    rendered = [
        render_prompt(tokenizer, problem, system_prompt="", chat_template_kwargs={}).ids
        for problem in problems
    ]
    return [ids for ids in rendered for _ in range(SAMPLES)]


def loaded(task: Task, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def refilled(task: Task, dtype: torch.dtype = torch.float32, *, autocast: bool = False) -> Draw:
    engine = TransformersEngine(*loaded(task, dtype), batch_size=128)
    draw = by_engine(engine, task)

    def under_autocast(prompts: Prompts) -> int:
        with torch.autocast("cpu", torch.bfloat16):
            return draw(prompts)

    return under_autocast if autocast else draw


def by_vllm(task: Task, dtype: str) -> Draw:
    prompts = prompts_of(task)
    teacher = TeacherConfig.model_validate(
        {"name": "bench", "model": task.model, "dtype": dtype, "batch_size": 128}
    )
    options = llm_options(teacher, max_length=max(map(len, prompts)) + task.max_tokens)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    return by_engine(VllmEngine(options, tokenizer, stop_ids=[tokenizer.eos_token_id], given={}), task)


def by_engine(engine: Engine, task: Task) -> Draw:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=task.max_tokens)

    def draw(prompts: Prompts) -> int:
        requests = [
            Request(request_id=str(index), prompt_ids=ids, seed=index) for index, ids in enumerate(prompts)
        ]
        return sum(len(completion.token_ids) for completion in engine.generate(requests, sampling))

    return draw


def sampling_config(model: Any, tokenizer: Any, max_tokens: int) -> GenerationConfig:
    ends = eos_ids(model.generation_config, tokenizer)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )


def static(task: Task) -> Draw:
    model, tokenizer = loaded(task)
    config = sampling_config(model, tokenizer, task.max_tokens)
    ends = torch.tensor(config.eos_token_id, device=model.device)

    def draw(prompts: Prompts) -> int:
        ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts, pad_id=config.pad_token_id))
        drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        ended = torch.isin(drawn[:, ids.shape[1] :], ends).cumsum(dim=1)
        # All tokens before the first that ends a row, and that one.
        return int((ended == 0).sum()) + int((ended[:, -1] > 0).sum())

    return draw


def continuous(task: Task) -> Draw:
    model, tokenizer = loaded(task)
    config = sampling_config(model, tokenizer, task.max_tokens)
    on_cpu = model.device.type == "cpu"

    def draw(prompts: Prompts) -> int:
        with torch.no_grad():
            found = model.generate_batch(
                [list(ids) for ids in prompts],
                generation_config=config,
                continuous_batching_config=paged(prompts, task.max_tokens) if on_cpu else None,
                progress_bar=False,
            )
        return sum(len(output.generated_tokens) for output in found.values())

    return draw


def paged(prompts: Prompts, max_tokens: int) -> ContinuousBatchingConfig:
    """Pages for all requests at once, and nothing that needs CUDA."""
    pages = -(-(max(map(len, prompts)) + max_tokens) // PAGE)
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages * len(prompts),
        max_batch_tokens=max(sum(map(len, prompts)), len(prompts)),
        max_requests_per_batch=len(prompts),
        use_async_batching=False,
        use_cuda_graph=False,
    )


WAYS: dict[str, Callable[[Task], Draw]] = {
    "refilled": refilled,
    "static": static,
    "continuous": continuous,
    "autocast": partial(refilled, autocast=True),
    "bfloat16": partial(refilled, dtype=torch.bfloat16),
    "vllm float32": partial(by_vllm, dtype="float32"),
    "vllm bfloat16": partial(by_vllm, dtype="bfloat16"),
}
BY_PRECISION = ("refilled", "autocast", "bfloat16", "vllm float32", "vllm bfloat16")


FIGURES: dict[str, Callable[[Measured], str]] = {
    "tokens": lambda row: f"{row.tokens:,}",
    "seconds": lambda row: f"{row.seconds:.3f}",
    "CPU s": lambda row: f"{row.cpu_seconds:.3f}",
    "tokens per CPU s": lambda row: f"{row.tokens / row.cpu_seconds:,.0f}",
}


def summary(row: Measured) -> dict[str, float]:
    return {
        "tokens": row.tokens,
        "seconds": round(row.seconds, 4),
        "cpu_seconds": round(row.cpu_seconds, 4),
        "tokens_per_cpu_second": round(row.tokens / row.cpu_seconds, 1),
    }


if __name__ == "__main__":
    main()
