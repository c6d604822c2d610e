"""Traces: made of completions and their verdicts, and collected until they become a part of the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from precompute.config import FiltersConfig
from precompute.engines import Completion
from precompute.problems.prompts import demanded_form
from precompute.run.filters import why_filtered
from precompute.verify.verifier import Verdict
from store.records import Problem, TeacherRecord, Trace

UNKNOWN_SEED = -1
NO_FILTERS = FiltersConfig()

Append = Callable[[Sequence[Trace]], object]
"""Writes one part, e.g. `StoreWriter.append`."""


class PartBuffer:
    """Writes a part once it has `part_traces` traces, or a trace arrives `part_seconds` after its first."""

    def __init__(self, append: Append, *, part_traces: int, part_seconds: float) -> None:
        self._append = append
        self._part_traces = part_traces
        self._part_seconds = part_seconds
        self._traces: list[Trace] = []
        self._deadline = 0.0
        self._failed = False

    def add(self, trace: Trace) -> None:
        """Raises what `append` raises."""
        if not self._traces:
            self._deadline = time.monotonic() + self._part_seconds
        self._traces.append(trace)
        if len(self._traces) >= self._part_traces or time.monotonic() >= self._deadline:
            self.write()

    def write(self) -> None:
        """Writes a part with the traces that wait, if any; nothing more once `append` has failed."""
        traces, self._traces = self._traces, []
        if traces and not self._failed:
            self._failed = True
            self._append(traces)
            self._failed = False


def trace_of(
    completion: Completion,
    verdict: Verdict,
    problem: Problem,
    record: TeacherRecord,
    *,
    sample_index: int,
    seed: int = UNKNOWN_SEED,
    filters: FiltersConfig = NO_FILTERS,
    opens_think: bool = False,
) -> Trace:
    """Returns the trace of a teacher's verified completion; `opens_think`: its prompt ended in `<think>`."""
    return Trace(
        problem_id=problem.problem_id,
        teacher=record.name,
        sample_index=sample_index,
        text=completion.text,
        answer=verdict.answer,
        answer_start=verdict.answer_start,
        n_tokens=completion.length,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        verdict="error" if completion.error else verdict.reason,
        is_correct=verdict.is_correct and completion.finish_reason == "stop",
        seed=seed,
        generation_fingerprint=record.generation_fingerprint,
        created_at=datetime.now(UTC),
        verified_by=verdict.verifier,
        verdict_detail=completion.error or verdict.detail,
        parsed_answer=verdict.parsed_answer,
        parsed_gold=verdict.parsed_gold,
        filtered=why_filtered(
            filters,
            text=completion.text,
            n_tokens=completion.length,
            form=demanded_form(record, problem),
            opens_think=opens_think,
        ),
    )
