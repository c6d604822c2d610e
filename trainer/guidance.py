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
from typing import Protocol

import torch

from store.errors import StoreError
from store.records import TeacherRecord, Trace
from trainer.batch import fill, pad
from trainer.comprehension import SCORES, ReadingSequence, bare_answer, reading_sequence
from trainer.config import GuidanceConfig
from trainer.groups import TRIGGERS, Group, Sample, guidance_size, place_guidance
from trainer.policy import Policy
from trainer.rewards import Judge
from trainer.rollout import Prompt, seed_of
from trainer.student_form import in_students_form


class CandidateStore(Protocol):
    """All that the trainer sees of the store."""

    def candidates(
        self, problem_ids: Sequence[str], *, teachers: Sequence[str] | None = None, tokens: bool = False
    ) -> Mapping[str, Sequence[Trace]]:
        """The verified traces of each problem; a problem without one maps to an empty sequence.

        `teachers`: None for all. `tokens`: with the teacher's own token ids and log-probs.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTrace:
    """A trace in the student's tokens and answer form."""

    trace: Trace
    text: str
    token_ids: tuple[int, ...]
    """[T], the student's EOS included."""
    reasoning_ids: tuple[int, ...]
    """z_c, up to and including the opening of the final answer."""
    teacher_logprobs: tuple[float, ...] | None
    """[T] under `ratio = "teacher"`."""


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
    """Asks, ranks and places. Holds only caches: each trace is tokenised and judged once."""

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
        self._traces: dict[str, StudentTrace] = {}
        self._samples: dict[str, Sample] = {}

    def guide(self, groups: Sequence[Group], *, step: int) -> tuple[list[Group], list[QueryRow]]:
        """The groups with guidance placed, and the log of what was asked."""
        asked = [group for group in groups if group.outcome in TRIGGERS[self.config.trigger]]
        if not asked:
            return list(groups), []
        candidates, latency_ms = self._ask(asked)
        ranked = self._rank(asked, candidates, step)
        guided, rows = {}, []
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
            ours = [self._in_student_tokens(trace, opens_think) for trace in traces]
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

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Group, StudentTrace]]) -> list[float]:
        """s of each (group, trace): all groups of the step at once, by length under the token budget."""
        sequences = [self._reading(group, trace) for group, trace in pairs]
        scores = [0.0] * len(sequences)
        for indices in fill([len(sequence.ids) for sequence in sequences], self.max_tokens):
            chosen = [sequences[index] for index in indices]
            batch = pad(
                [sequence.ids for sequence in chosen],
                [sequence.answer_length for sequence in chosen],
                pad_id=self.policy.pad_id,
                device=self.policy.device,
            )
            found = SCORES[self.config.score](self.policy.logprobs(batch), batch.asked)
            for index, score in zip(indices, found.tolist(), strict=True):
                scores[index] = _finite(score, *pairs[index])
        return scores

    def _reading(self, group: Group, trace: StudentTrace) -> ReadingSequence:
        answer_ids = self._encode(bare_answer(group.problem.answer))
        return reading_sequence(
            prompt_ids=group.prompt_ids, reasoning_ids=trace.reasoning_ids, answer_ids=answer_ids
        )

    def _place(self, group: Group, best: Sequence[tuple[StudentTrace, float | None]], step: int) -> Group:
        rng = Random(seed_of(self.seed, "place", step, group.problem.problem_id))
        return place_guidance(group, [self._as_sample(trace, group) for trace, _ in best], rng)

    def _as_sample(self, trace: StudentTrace, group: Group) -> Sample:
        """The trace with the reward that the same verifier and the same rule give it, never a forced one."""
        trace_id = trace.trace.trace_id
        if trace_id not in self._samples:
            pending = self.judge.submit(
                text=trace.text,
                gold=group.problem.answer,
                token_ids=trace.token_ids,
                finish_reason=trace.trace.finish_reason,
                logprobs=trace.teacher_logprobs,
                opens_think=group.opens_think,
                trace_id=trace_id,
                teacher=trace.trace.teacher,
            )
            self._samples[trace_id] = self.judge.settle(pending)
        return self._samples[trace_id]

    def _in_student_tokens(self, trace: Trace, opens_think: bool) -> StudentTrace:
        if trace.trace_id not in self._traces:
            self._traces[trace.trace_id] = self._tokenised(trace, opens_think)
        return self._traces[trace.trace_id]

    def _tokenised(self, trace: Trace, opens_think: bool) -> StudentTrace:
        """The teacher's form is mapped explicitly to the student's; nothing is cut."""
        reasoning, text = in_students_form(trace, self.judge.answer_form, opens_think=opens_think)
        own_ids = self.config.ratio == "teacher"
        if own_ids:
            self._check_own_ids(trace, text)
        return StudentTrace(
            trace=trace,
            text=text,
            token_ids=trace.token_ids if own_ids else (*self._encode(text), self.policy.eos_id),
            reasoning_ids=self._encode(reasoning),
            teacher_logprobs=trace.logprobs if own_ids else None,
        )

    def check_teacher_ratio(self, prompts: Sequence[Prompt]) -> None:
        """Before training under `ratio = "teacher"`: every trace that may be asked for must bear it."""
        assert self.store is not None
        for start in range(0, len(prompts), 256):
            part = {prompt.problem.problem_id: prompt.opens_think for prompt in prompts[start : start + 256]}
            found = self.store.candidates(list(part), teachers=self.config.teachers or None, tokens=True)
            for problem_id, traces in found.items():
                for trace in traces:
                    self._check_own_ids(
                        trace,
                        in_students_form(trace, self.judge.answer_form, opens_think=part[problem_id])[1],
                    )

    def _check_own_ids(self, trace: Trace, text: str) -> None:
        """StoreError unless the teacher's own tokens are what the student would have to write."""
        reason = None
        if text != trace.text:
            reason = "answers in another form than the student, so its log-probs are of other tokens"
        elif not len(trace.logprobs) == len(trace.token_ids) > 0:
            reason = f"has {len(trace.logprobs)} log-probs for {len(trace.token_ids)} tokens"
        elif trace.token_ids[-1] not in self.policy.eos_ids:
            reason = "does not end with an EOS token of the student's"
        if reason is not None:
            raise StoreError(
                f'guidance.ratio = "teacher": trace {trace.trace_id} of {trace.teacher} {reason}; '
                f'use ratio = "student", or leave the teacher out of guidance.teachers'
            )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.policy.tokenizer(text, add_special_tokens=False)["input_ids"])


def check_tokenizers(
    teachers: Mapping[str, TeacherRecord], student_fingerprint: str, used: Sequence[str]
) -> None:
    """`ratio = "teacher"` compares probabilities of the same tokens: StoreError unless vocabularies agree."""
    for name in used or sorted(teachers):
        if teachers[name].tokenizer_fingerprint != student_fingerprint:
            raise StoreError(
                f'guidance.ratio = "teacher" needs the student\'s tokenizer in every teacher, and {name!r} '
                f'({teachers[name].model}) has another; use ratio = "student"'
            )


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
