"""The metrics of a step, by TRL's names where TRL has one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `ampo inspect` reads metrics without torch
    from trainer.method.groups import Group
    from trainer.method.guidance import QueryRow

MEASURED = ("seconds/", "share/", "tokens_per_second/", "memory/", "store/latency_ms")
"""Prefixes of the names that a clock or a meter measures: they differ between two equal runs."""


def step_metrics(
    groups: Sequence[Group], queries: Sequence[QueryRow], update: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the metrics of a step but for its cost.

    Groups are counted before replacement; rewards, lengths and accuracy are those of the student's own
    samples. A mean over nothing is None, or absent where it comes from the loss.

    Args:
        update: metrics of the optimizer steps, see `Updater.update`.
    """
    samples = [sample for group in groups for sample in group.samples]
    stds = [stdev(sample.reward for sample in group.samples) for group in groups]
    lengths = [len(sample.token_ids) for sample in samples]
    return {
        **dict.fromkeys(("loss", "grad_norm", "entropy")),
        **update,
        "reward": fmean(sample.reward for sample in samples),
        "reward_std": fmean(stds),
        "frac_reward_zero_std": fmean(std == 0 for std in stds),
        **{f"rewards/{name}": fmean(s.rewards[name] for s in samples) for name in samples[0].rewards},
        "accuracy": fmean(sample.is_correct for sample in samples),
        "format": fmean(sample.has_format for sample in samples),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(sample.finish_reason == "length" for sample in samples),
        "groups/all_fail": fmean(group.n_correct == 0 for group in groups),
        "groups/all_solved": fmean(group.n_correct == len(group.samples) for group in groups),
        "groups/mixed": fmean(0 < group.n_correct < len(group.samples) for group in groups),
        **query_metrics(queries),
    }


def query_metrics(queries: Sequence[QueryRow]) -> dict[str, Any]:
    """Returns the metrics of a step's queries of the store."""
    queried = {row.problem_id for row in queries}
    answered = {row.problem_id for row in queries if row.trace_id is not None}
    used = [row.teacher for row in queries if row.selected]
    teachers = sorted({row.teacher for row in queries if row.teacher is not None})
    scores: dict[bool, list[float]] = {True: [], False: []}
    for row in queries:
        if row.score is not None:
            scores[row.selected].append(row.score)
    return {
        "store/queries": len(queried),
        "store/hit_rate": len(answered) / len(queried) if queried else None,
        "store/no_trace": len(queried) - len(answered),
        "store/latency_ms": queries[0].latency_ms if queries else None,
        "comprehension/selected_mean": fmean(scores[True]) if scores[True] else None,
        "comprehension/rejected_mean": fmean(scores[False]) if scores[False] else None,
        **{
            f"teacher/{name}/selected_share": used.count(name) / len(used) if used else 0.0
            for name in teachers
        },
    }


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without a last one that a crash truncated."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]
