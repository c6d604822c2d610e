"""A step's numbers, by TRL's names where TRL has one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from trainer.method.groups import Group, Sample, outcome_shares
from trainer.method.guidance import QueryRow
from trainer.method.update import UpdateReport

MEASURED = ("seconds/", "share/", "tokens_per_second/", "memory/", "mfu/", "store/latency_ms")
"""How the names begin of what a clock or a meter tells: it differs between two runs that are equal."""


def step_metrics(
    *,
    step: int,
    groups: Sequence[Group],
    queries: Sequence[QueryRow],
    update: UpdateReport,
    learning_rate: float,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """One line of metrics.jsonl.

    Groups are counted before replacement; rewards, lengths and accuracy are the student's own samples'.
    Values that do not exist in a step (no update, no query) are None. `cost`: see `PerformanceMeter.row`.
    """
    return {
        "step": step,
        **_update_metrics(update, learning_rate),
        **_sample_metrics(groups),
        **{f"groups/{name}": share for name, share in outcome_shares(groups).items()},
        **_query_metrics(queries),
        **_teacher_metrics(queries),
        **cost,
    }


def _update_metrics(update: UpdateReport, learning_rate: float) -> dict[str, Any]:
    if not update.optimizer_steps:
        names = (
            "loss",
            "grad_norm",
            "entropy",
            "kl",
            "clip_ratio/low_mean",
            "clip_ratio/high_mean",
            "sampling/logp_difference",
            "sampling/is_capped",
        )
        return {
            **dict.fromkeys(names),
            "train_tokens": 0,
            "optimizer_steps": 0,
            "learning_rate": learning_rate,
        }
    return {
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "entropy": update.entropy,
        "kl": update.kl,
        "clip_ratio/low_mean": update.clip_low,
        "clip_ratio/high_mean": update.clip_high,
        "sampling/logp_difference": update.sampler_difference,
        "sampling/is_capped": update.sampler_capped,
        "train_tokens": update.tokens,
        "optimizer_steps": update.optimizer_steps,
        "learning_rate": learning_rate,
    }


def _sample_metrics(groups: Sequence[Group]) -> dict[str, float]:
    samples = [sample for group in groups for sample in group.samples]
    rewards = [[sample.reward for sample in group.samples] for group in groups]
    return {
        "reward": fmean(sample.reward for sample in samples),
        "reward_std": fmean(_std(row) for row in rewards),
        "frac_reward_zero_std": fmean(_std(row) == 0 for row in rewards),
        "accuracy": fmean(sample.is_correct for sample in samples),
        "format": fmean(sample.has_format for sample in samples),
        "completions/mean_length": fmean(_lengths(samples)),
        "completions/max_length": max(_lengths(samples)),
        "completions/clipped_ratio": fmean(sample.finish_reason == "length" for sample in samples),
    }


def _lengths(samples: Sequence[Sample]) -> list[int]:
    return [len(sample.token_ids) for sample in samples]


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1)."""
    if min(values) == max(values):
        return 0.0
    mean = fmean(values)
    return float((sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5)


def _query_metrics(queries: Sequence[QueryRow]) -> dict[str, Any]:
    asked = {row.problem_id for row in queries}
    answered = {row.problem_id for row in queries if row.trace_id is not None}
    scored = [row for row in queries if row.score is not None]
    return {
        "store/queries": len(asked),
        "store/hit_rate": len(answered) / len(asked) if asked else None,
        "store/no_trace": len(asked) - len(answered),
        "store/latency_ms": queries[0].latency_ms if queries else None,
        "comprehension/selected_mean": _mean([row.score for row in scored if row.selected]),
        "comprehension/rejected_mean": _mean([row.score for row in scored if not row.selected]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _teacher_metrics(queries: Sequence[QueryRow]) -> dict[str, float]:
    """Of the traces used in this step, the share of each teacher that was asked about."""
    teachers = sorted({row.teacher for row in queries if row.teacher is not None})
    used = [row.teacher for row in queries if row.selected]
    return {
        f"teacher/{name}/selected_share": used.count(name) / len(used) if used else 0.0 for name in teachers
    }
