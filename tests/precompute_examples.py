"""The lab's models and problems as a run of the pipeline, and readings of the store that it fills."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from precompute.config import PrecomputeConfig
from precompute.engines import Completion, Request
from store.reader import TraceStore
from store.records import Trace

LAB = Path(__file__).parents[1] / "lab"
PROBLEM_FILE = LAB / "problems" / "train.jsonl"
GOOD = {"name": "totals", "model": str(LAB / "models" / "teacher-totals")}
POOR = {"name": "student", "model": str(LAB / "models" / "student")}


def lab_config(
    store: Path, *teachers: dict[str, Any], part_traces: int = 5, **sections: Any
) -> PrecomputeConfig:
    """The lab's training problems for these teachers, whose answers have at most 120 tokens."""
    usual = {"system_prompt": "", "max_tokens": 120}
    return PrecomputeConfig.model_validate(
        {
            "problems": {"train": str(PROBLEM_FILE)},
            "store": {"path": str(store), "part_traces": part_traces},
            "verify": {"workers": 1},
            "teachers": [usual | teacher for teacher in teachers],
            **sections,
        }
    )


def traces_of(store: Path) -> list[Trace]:
    with TraceStore(store) as opened:
        return opened.traces(tokens=True)


def keys_of(store: Path) -> dict[tuple[str, str, int], str]:
    """Every (problem, teacher, sample) with its trace_id; one that is in two parts fails."""
    keys = {
        (trace.problem_id, trace.teacher, trace.sample_index): trace.trace_id for trace in traces_of(store)
    }
    assert len(keys) == rows_in_parts(store)
    return keys


def parts_of(store: Path) -> list[Path]:
    return list(store.rglob("part-*.parquet"))


def rows_in_parts(store: Path) -> int:
    """Rows of all parts; a reader would not see a doubled one."""
    return sum(pq.read_metadata(part).num_rows for part in parts_of(store))


def jsonl(path: Path, *rows: Any) -> Path:
    """Writes the rows to `path`; returns it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_id(completions: Iterable[Completion]) -> dict[str, Completion]:
    return {completion.request_id: completion for completion in completions}


@torch.no_grad()
def forward_logits(model: Any, request: Request, completion: Completion) -> torch.Tensor:
    """[T, V] of one forward without a cache; row t predicts completion token t."""
    ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(request.prompt_ids) - 1 : -1]


def forward_logprobs(model: Any, request: Request, completion: Completion) -> list[float]:
    """[T] of the completion's tokens at temperature 1."""
    logprobs = forward_logits(model, request, completion).log_softmax(-1)
    found: list[float] = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()
    return found


def start_child(work: Callable[..., object], *arguments: Any) -> Any:
    """Starts `work` in a child of a server that has the heavy imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["precompute.engines.transformers_engine", "precompute.run.pipeline"])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process
