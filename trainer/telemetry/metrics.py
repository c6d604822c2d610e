"""The metrics of a step, by TRL's names where TRL has one: what was learnt, and what it cost."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `ampo inspect` reads metrics without torch
    import torch

    from trainer.method.groups import Group
    from trainer.method.guidance import QueryRow

MEASURED = ("seconds/", "share/", "tokens_per_second/", "memory/", "store/latency_ms")
"""Prefixes of the names that a clock or a meter measures: they differ between two equal runs."""

PHASES = ("sample", "verify", "query", "score", "place", "update", "sync")
"""In the order of a step. `verify` is the wait for verdicts after sampling, most of which arrive meanwhile;
`sync` is the sampler's time to free memory and to get the new weights."""
MEMORY_PHASES = ("sample", "score", "update")
"""Phases whose peak memory is reported; the others allocate little."""


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
    sampled = [logprob for sample in samples for logprob in sample.logprobs or ()]
    return {
        **dict.fromkeys(("loss", "grad_norm")),
        **{name if name != "entropy" else "entropy/trained": value for name, value in update.items()},
        # Of all sampled tokens, also of groups without a gradient: the mean of -log p is unbiased.
        "entropy": -fmean(sampled) if sampled else update.get("entropy"),
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


class StepTimer:
    """Seconds and peak memory by phase. A phase inside another stops the outer one's clock until it ends."""

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, peak_memory: Callable[[], int] = lambda: 0
    ) -> None:
        """`peak_memory`: waits for the device's work and returns the most bytes held since the last call."""
        self._clock, self._peak_memory = clock, peak_memory
        self._peak_memory()
        self._open = ["other"]
        self._began = self._since = clock()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.peaks: dict[str, int] = {}
        """Bytes by phase; `other` outside of phases."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the block's time as the phase's; a phase may be entered often."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Adds the time since the last call to the innermost open phase."""
        phase = self._open[-1]
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._peak_memory())
        before, self._since = self._since, self._clock()
        if phase != "other":
            self.seconds[phase] += self._since - before

    def metrics(self, groups: Sequence[Group], trained_tokens: float) -> dict[str, Any]:
        """Returns the cost of the step, which ends here: seconds and share by phase, tokens per second, MiB.

        `trained_tokens`: response tokens that carried a gradient. A rate of nothing is None.
        """
        spent, total = self.seconds, self._clock() - self._began
        sampled_tokens = sum(len(sample.token_ids) for group in groups for sample in group.samples)
        rates = {
            "sampled": (sampled_tokens, spent["sample"] + spent["verify"]),
            "trained": (trained_tokens, spent["update"]),
        }
        mib = {phase: round(size / 2**20, 1) for phase, size in self.peaks.items()}
        return {
            **{f"seconds/{phase}": round(seconds, 4) for phase, seconds in spent.items()},
            "seconds/step": round(total, 4),
            **{f"share/{phase}": round(seconds / total, 4) for phase, seconds in spent.items()},
            **{
                f"tokens_per_second/{kind}": round(tokens / seconds, 4) if tokens and seconds else None
                for kind, (tokens, seconds) in rates.items()
            },
            "memory/peak_mib": max(mib.values()),
            **{f"memory/peak_mib/{phase}": mib.get(phase) for phase in MEMORY_PHASES},
        }


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took since the last call, on the CPU the most that the process
    held resident since it began. Waits for what CUDA still computes."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without a last one that a crash truncated."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]
