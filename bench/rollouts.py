"""Drawing a step's samples with transformers: our refilled batches, one static batch, continuous batching.

    python -m bench.rollouts [--models lab/models/student lab/models/teacher-words] [--problems 16]

The same model, prompts (lab/problems/train.jsonl, 8 samples each) and sampling (temperature 1, at most 160
tokens), no vLLM, float32, each way in a process of its own with one thread; one pass warms up. The lab's
student writes responses of one length, its teachers of many. A GPU is used where there is one.

    refilled    what `ampo` samples with (`TransformersEngine`): a seed for each row, prompts
                are read once a problem, ended rows leave and others take their places
    static      `generate(do_sample=True)` over the whole step as one padded batch
    continuous  `generate_batch`: transformers' continuous batching with a paged cache, sized for the whole
                step on a CPU (left to itself it never begins there, transformers 5.19) and by itself on CUDA

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from bench.measure import alone, ways_table
from precompute.engines import Request, Sampling
from precompute.engines.batch import left_padded
from precompute.engines.checks import eos_ids
from precompute.engines.transformers_engine import TransformersEngine
from precompute.problems.problem_files import load_problems
from precompute.problems.prompts import render_prompt

PROBLEMS = "lab/problems/train.jsonl"
SAMPLES = 8
MAX_TOKENS = 160
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The best of the repeats by CPU seconds, which what else runs on the machine moves little."""

    cpu_seconds: float
    seconds: float
    tokens: int


def main() -> None:
    options = parse()
    found = {
        model: {
            way: alone(run, Task(model=model, way=way, problems=options.problems, repeats=options.repeats))
            for way in options.ways
        }
        for model in options.models
    }
    Console().print(ways_table("drawing a step's samples", "model", found, FIGURES))
    rows = {model: {way: summary(row) for way, row in ways.items()} for model, ways in found.items()}
    print(json.dumps({"bench": "rollouts", **rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lab/models/student", "lab/models/teacher-words"])
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    return parser.parse_args()


def run(task: Task) -> Measured:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    draw = WAYS[task.way](model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
    prompts = list(prompts_of(tokenizer, task.problems))
    draw(prompts)
    return min((timed(draw, prompts) for _ in range(task.repeats)), key=lambda found: found.cpu_seconds)


def timed(draw: Draw, prompts: Prompts) -> Measured:
    started, cpu = time.perf_counter(), time.process_time()
    tokens = draw(prompts)
    return Measured(
        cpu_seconds=time.process_time() - cpu, seconds=time.perf_counter() - started, tokens=tokens
    )


def prompts_of(tokenizer: Any, problems: int) -> Iterator[tuple[int, ...]]:
    loaded = load_problems(PROBLEMS).problems[:problems]
    for problem in loaded:
        rendered = render_prompt(tokenizer, problem, system_prompt="", chat_template_kwargs={})
        yield from [rendered.ids] * SAMPLES


def refilled(model: Any, tokenizer: Any) -> Draw:
    engine = TransformersEngine(model, tokenizer, batch_size=128)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=MAX_TOKENS)

    def draw(prompts: Prompts) -> int:
        requests = [
            Request(request_id=str(place), prompt_ids=ids, seed=place) for place, ids in enumerate(prompts)
        ]
        return sum(len(completion.token_ids) for completion in engine.generate(requests, sampling))

    return draw


def sampling_config(model: Any, tokenizer: Any) -> GenerationConfig:
    ends = eos_ids(model.generation_config, tokenizer)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )


def static(model: Any, tokenizer: Any) -> Draw:
    config = sampling_config(model, tokenizer)
    ends = torch.tensor(config.eos_token_id, device=model.device)

    def draw(prompts: Prompts) -> int:
        ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts, pad_id=config.pad_token_id))
        drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        ended = torch.isin(drawn[:, ids.shape[1] :], ends).cumsum(dim=1)
        # All tokens before the first that ends a row, and that one.
        return int((ended == 0).sum()) + int((ended[:, -1] > 0).sum())

    return draw


def continuous(model: Any, tokenizer: Any) -> Draw:
    config = sampling_config(model, tokenizer)

    def draw(prompts: Prompts) -> int:
        with torch.no_grad():
            found = model.generate_batch(
                [list(ids) for ids in prompts],
                generation_config=config,
                continuous_batching_config=paged(prompts) if model.device.type == "cpu" else None,
                progress_bar=False,
            )
        return sum(len(output.generated_tokens) for output in found.values())

    return draw


def paged(prompts: Prompts) -> ContinuousBatchingConfig:
    """Pages for all requests at once, and nothing that needs CUDA."""
    pages = -(-(max(map(len, prompts)) + MAX_TOKENS) // PAGE)
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages * len(prompts),
        max_batch_tokens=max(sum(map(len, prompts)), len(prompts)),
        max_requests_per_batch=len(prompts),
        use_async_batching=False,
        use_cuda_graph=False,
    )


WAYS: dict[str, Callable[[Any, Any], Draw]] = {
    "refilled": refilled,
    "static": static,
    "continuous": continuous,
}


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
