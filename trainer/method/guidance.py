"""Guidance: ask the store for problems whose rollouts all failed, rank what comes back, place the best.

    groups --trigger--> asked --store--> candidates --comprehension--> the k best --> places of failed samples

Every question and every candidate becomes a QueryRow, so what was asked, what came back and what was used
can be read from the run's files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch

from trainer.config import GuidanceConfig
from trainer.method.comprehension import SCORES, ReadingSequence, bare_answer, reading_sequence
from trainer.method.groups import TRIGGERS, Group, Sample, guidance_size, place_guidance
from trainer.method.rewards import Judge
from trainer.method.rollouts import seed_of
from trainer.method.teacher_traces import CandidateStore, Recent, StudentTrace, TraceTokens
from trainer.student.batches import fill, pad
from trainer.student.policy import Policy
from trainer.timing import StepTimer


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRow:
    """One candidate of one question; a problem without a candidate has one row with nulls."""

    step: int
    problem_id: str
    trace_id: str | None
    teacher: str | None
    score: float | None
    """s, the mean log-probability of the gold answer; None where nothing had to be ranked by it."""
    n_tokens: int | None
    """In the student's tokens."""
    rank: int | None
    """1 is best."""
    selected: bool
    latency_ms: float
    """Of the one store query of this step."""


class Guide:
    """Asks, ranks and places. Holds only caches, so that a trace asked for again is there."""

    def __init__(
        self,
        config: GuidanceConfig,
        store: CandidateStore | None,
        policy: Policy,
        judge: Judge,
        *,
        max_completion_length: int,
        max_tokens_per_microbatch: int,
        seed: int,
    ) -> None:
        self.config = config
        self.store = store
        self.policy = policy
        self.judge = judge
        self.max_completion_length = max_completion_length
        self.max_tokens = max_tokens_per_microbatch
        self.seed = seed
        self.traces = TraceTokens(policy, judge.answer_form, own_ids=config.ratio == "teacher")
        self._samples: Recent[Sample] = Recent()

    def guide(
        self, groups: Sequence[Group], *, step: int, timer: StepTimer | None = None
    ) -> tuple[list[Group], list[QueryRow]]:
        """The groups with guidance placed, and the log of what was asked.

        `timer` gets `query` (the store, and traces into the student's tokens), `score` and `place`.
        """
        timer = timer or StepTimer()
        asked = [group for group in groups if group.outcome in TRIGGERS[self.config.trigger]]
        if not asked:
            return list(groups), []
        with timer("query"):
            candidates, latency_ms = self._ask(asked)
        with timer("score"):
            ranked = self._rank(asked, candidates, step)
        guided, rows = {}, []
        with timer("place"):
            for group in asked:
                best_first = ranked[group.problem.problem_id]
                k = guidance_size(group, len(best_first), self.config.k)
                guided[group.problem.problem_id] = self._place(group, best_first[:k], step)
                rows += _query_rows(group, best_first, k, step=step, latency_ms=latency_ms)
        return [guided.get(group.problem.problem_id, group) for group in groups], rows

    def _ask(self, asked: Sequence[Group]) -> tuple[dict[str, list[StudentTrace]], float]:
        assert self.store is not None, "a trigger other than never needs a store"
        started = time.perf_counter()
        found = self.store.candidates(
            [group.problem.problem_id for group in asked],
            teachers=self.config.teachers or None,
            tokens=self.config.ratio == "teacher",
        )
        latency_ms = (time.perf_counter() - started) * 1000
        thinking = {group.problem.problem_id: group.opens_think for group in asked}
        fitting: dict[str, list[StudentTrace]] = {}
        for problem_id, traces in found.items():
            opens_think = thinking[problem_id]
            ours = [self.traces.of(trace, opens_think=opens_think) for trace in traces]
            # A trace is never cut to fit: half a solution is no solution.
            fitting[problem_id] = [t for t in ours if len(t.token_ids) <= self.max_completion_length]
        return fitting, latency_ms

    def _rank(
        self, asked: Sequence[Group], candidates: Mapping[str, list[StudentTrace]], step: int
    ) -> dict[str, list[tuple[StudentTrace, float | None]]]:
        """problem_id -> (trace, score), best first."""
        scores: dict[str, float] = {}
        if self.config.select == "comprehension":
            pairs = [(group, trace) for group in asked for trace in self._to_score(group, candidates)]
            scores = dict(zip((t.trace.trace_id for _, t in pairs), self.score(pairs), strict=True))
        ranked = {}
        for group in asked:
            rng = Random(seed_of(self.seed, "select", step, group.problem.problem_id))
            ordered = SELECTIONS[self.config.select](candidates[group.problem.problem_id], scores, rng)
            ranked[group.problem.problem_id] = [(t, scores.get(t.trace.trace_id)) for t in ordered]
        return ranked

    def _to_score(self, group: Group, candidates: Mapping[str, list[StudentTrace]]) -> Sequence[StudentTrace]:
        """The group's candidates; nothing where all of them are placed, or none."""
        found = candidates[group.problem.problem_id]
        return found if 0 < guidance_size(group, len(found), self.config.k) < len(found) else []

    def score(self, pairs: Sequence[tuple[Group, StudentTrace]]) -> list[float]:
        """s of each (group, trace): all groups of the step at once, by length under the token budget."""
        sequences = [self._reading(group, trace) for group, trace in pairs]
        scores = reading_scores(self.policy, sequences, score=self.config.score, max_tokens=self.max_tokens)
        return [_finite(score, *pair) for score, pair in zip(scores, pairs, strict=True)]

    def _reading(self, group: Group, trace: StudentTrace) -> ReadingSequence:
        answer_ids = self.traces.encode(bare_answer(group.problem.answer))
        return reading_sequence(
            prompt_ids=group.prompt_ids, reasoning_ids=trace.reasoning_ids, answer_ids=answer_ids
        )

    def _place(self, group: Group, best: Sequence[tuple[StudentTrace, float | None]], step: int) -> Group:
        rng = Random(seed_of(self.seed, "place", step, group.problem.problem_id))
        return place_guidance(group, [self._as_sample(trace, group) for trace, _ in best], rng)

    def _as_sample(self, trace: StudentTrace, group: Group) -> Sample:
        """The trace with the reward that the same verifier and the same rule give it, never a forced one."""

        def judged() -> Sample:
            pending = self.judge.submit(
                text=trace.text,
                gold=group.problem.answer,
                token_ids=trace.token_ids,
                finish_reason=trace.trace.finish_reason,
                logprobs=trace.teacher_logprobs,
                opens_think=group.opens_think,
                trace_id=trace.trace.trace_id,
                teacher=trace.trace.teacher,
            )
            return self.judge.settle(pending)

        return self._samples.get((trace.trace.trace_id, group.opens_think), judged)


@torch.no_grad()
def reading_scores(
    policy: Policy, sequences: Sequence[ReadingSequence], *, score: str, max_tokens: int
) -> list[float]:
    """The score of each sequence, in few forward passes: by length, at most `max_tokens` of them a pass."""
    scores = [0.0] * len(sequences)
    for indices in fill([len(sequence.ids) for sequence in sequences], max_tokens):
        batch = pad(
            [sequences[index].ids for index in indices],
            [sequences[index].answer_length for index in indices],
            pad_id=policy.pad_id,
            device=policy.device,
        )
        found = SCORES[score](policy.logprobs(batch), batch.asked).tolist()
        for index, value in zip(indices, found, strict=True):
            scores[index] = value
    return scores


Selection = Callable[[Sequence[StudentTrace], Mapping[str, float], Random], list[StudentTrace]]
"""(candidates, scores by trace_id, generator) -> candidates, best first."""


def by_comprehension(
    traces: Sequence[StudentTrace], scores: Mapping[str, float], rng: Random
) -> list[StudentTrace]:
    """Best score first; exact ties, and traces that nothing was scored for, go to the shorter trace, then to
    the smaller trace_id."""
    return sorted(
        traces, key=lambda t: (-scores.get(t.trace.trace_id, 0.0), len(t.token_ids), t.trace.trace_id)
    )


def at_random(traces: Sequence[StudentTrace], scores: Mapping[str, float], rng: Random) -> list[StudentTrace]:
    """The ablation without ranking."""
    ordered = sorted(traces, key=lambda t: t.trace.trace_id)
    return rng.sample(ordered, len(ordered))


def by_length(traces: Sequence[StudentTrace], scores: Mapping[str, float], rng: Random) -> list[StudentTrace]:
    """Shortest first, in student tokens; ties go to the smaller trace_id."""
    return sorted(traces, key=lambda t: (len(t.token_ids), t.trace.trace_id))


SELECTIONS: dict[str, Selection] = {
    "comprehension": by_comprehension,
    "random": at_random,
    "shortest": by_length,
}
"""`guidance.select`; a new rule is a new short function here."""


def _finite(score: float, group: Group, trace: StudentTrace) -> float:
    if not math.isfinite(score):
        raise FloatingPointError(
            f"comprehension score of trace {trace.trace.trace_id} ({trace.trace.teacher}) "
            f"for problem {group.problem.problem_id} is {score}"
        )
    return score


def _query_rows(
    group: Group, ranked: Sequence[tuple[StudentTrace, float | None]], k: int, *, step: int, latency_ms: float
) -> list[QueryRow]:
    empty = QueryRow(
        step=step,
        problem_id=group.problem.problem_id,
        trace_id=None,
        teacher=None,
        score=None,
        n_tokens=None,
        rank=None,
        selected=False,
        latency_ms=latency_ms,
    )
    return [
        replace(
            empty,
            trace_id=trace.trace.trace_id,
            teacher=trace.trace.teacher,
            score=score,
            n_tokens=len(trace.token_ids),
            rank=rank,
            selected=rank <= k,
        )
        for rank, (trace, score) in enumerate(ranked, start=1)
    ] or [empty]
