"""One teacher at work on what the store lacks of it: prompts, waves of samples, verdicts, traces."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from precompute.collector import Collector
from precompute.config import StoreConfig, TeacherConfig
from precompute.engines import Completion, Engine, Request, Sampling
from precompute.engines.select import check_fits
from precompute.progress import Reporter, TeacherProgress
from precompute.prompts import Prompt, answer_form_of, render_prompt, system_turn
from precompute.verify import Verdict, Verifier
from precompute.waves import next_samples, sample_seed, samples_left
from store.records import Problem, TeacherRecord, Trace
from store.writer import StoreWriter

STAGE_PROBLEMS = 500
"""Problems between two reports of a preparation."""

Done = dict[str, dict[int, bool]]
"""problem_id -> sample_index -> is_correct"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One teacher with all that has to be settled before its model is loaded."""

    config: TeacherConfig
    engine: str
    tokenizer: Any
    record: TeacherRecord

    @property
    def name(self) -> str:
        """The teacher's."""
        return self.config.name


def fill_prompts(job: Job, problems: Sequence[Problem], reporter: Reporter) -> dict[str, Prompt]:
    """problem_id -> prompt. EngineError when one does not fit the model together with max_tokens."""
    prompts = {}
    for number, problem in enumerate(problems, start=1):
        prompts[problem.problem_id] = render_prompt(
            job.tokenizer,
            problem,
            system_prompt=job.config.system_prompt,
            chat_template_kwargs=job.config.chat_template_kwargs,
        )
        if number % STAGE_PROBLEMS == 0 or number == len(problems):
            reporter.stage(f"{job.name}: filling prompts", number, len(problems))
    check_fits(job.config, longest_prompt(prompts))
    return prompts


def longest_prompt(prompts: Mapping[str, Prompt]) -> int:
    """In tokens."""
    return max(len(prompt.ids) for prompt in prompts.values())


class TeacherWork:
    """One teacher at work: what is done, and the waves of what is not."""

    def __init__(
        self, job: Job, problems: Sequence[Problem], done: Done, verifier: Verifier, reporter: Reporter
    ) -> None:
        self.job = job
        self.done = {problem.problem_id: done.get(problem.problem_id, {}) for problem in problems}
        self.left = [p for p in problems if next_samples(job.config, self.done[p.problem_id])]
        self.prompts: dict[str, Prompt] = {}
        self._verifier = verifier
        self._reporter = reporter
        self._judged = self._verified = self._tokens = 0
        self._there = sum(map(len, self.done.values()))
        self._to_come = sum(samples_left(job.config, samples) for samples in self.done.values())
        self._started: float | None = None

    def fill_prompts(self) -> None:
        """For the problems that still get samples."""
        self.prompts = fill_prompts(self.job, self.left, self._reporter)

    def run(self, engine: Engine, writer: StoreWriter, config: StoreConfig) -> None:
        """Wave after wave, until no problem lacks a sample."""
        self._started = time.monotonic()
        teacher = self.job.config
        sampling = Sampling(
            temperature=teacher.temperature,
            top_p=teacher.top_p,
            top_k=teacher.top_k,
            max_tokens=teacher.max_tokens,
        )
        with Collector(
            writer.append,
            part_traces=config.part_traces,
            part_seconds=config.part_seconds,
            on_trace=self._note,
        ) as collector:
            while wave := self._wave():
                requests = [request for request, _, _ in wave.values()]
                for completion in engine.generate(requests, sampling):
                    self._submit(collector, completion, *wave[completion.request_id])
                # What is to be drawn next depends on the verdicts.
                collector.wait()

    def progress(self) -> TeacherProgress:
        """How far it is."""
        return TeacherProgress(
            teacher=self.job.name,
            done=self._there,
            total=self._there + self._to_come,
            verified=self._verified,
            judged=self._judged,
            tokens=self._tokens,
            seconds=0.0 if self._started is None else time.monotonic() - self._started,
        )

    def _wave(self) -> dict[str, tuple[Request, Problem, int]]:
        """By request id: what is to be drawn now."""
        wave = {}
        for problem in self.left:
            for index in next_samples(self.job.config, self.done[problem.problem_id]):
                request = Request(
                    request_id=f"{problem.problem_id}-{index}",
                    prompt_ids=self.prompts[problem.problem_id].ids,
                    seed=sample_seed(problem.problem_id, self.job.name, index),
                )
                wave[request.request_id] = request, problem, index
        return wave

    def _submit(
        self, collector: Collector, completion: Completion, request: Request, problem: Problem, index: int
    ) -> None:
        verdict = self._verifier.submit(
            completion.text,
            problem.answer,
            answer_form_of(system_turn(problem, self.job.config.system_prompt)),
            opens_think=self.prompts[problem.problem_id].opens_think,
        )
        collector.submit(verdict, lambda known: self._trace(known, completion, request, problem, index))

    def _trace(
        self, verdict: Verdict, completion: Completion, request: Request, problem: Problem, index: int
    ) -> Trace:
        return Trace(
            problem_id=problem.problem_id,
            teacher=self.job.name,
            sample_index=index,
            text=completion.text,
            answer=verdict.answer,
            answer_start=verdict.answer_start,
            n_tokens=len(completion.token_ids),
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            verdict=verdict.reason,
            is_correct=verdict.is_correct and completion.finish_reason == "stop",
            seed=request.seed,
            generation_fingerprint=self.job.record.generation_fingerprint,
            created_at=datetime.now(UTC),
        )

    def _note(self, trace: Trace) -> None:
        """Called by the collector's thread alone."""
        samples = self.done[trace.problem_id]
        self._to_come -= samples_left(self.job.config, samples)
        samples[trace.sample_index] = trace.is_correct
        self._to_come += samples_left(self.job.config, samples)
        self._there += 1
        self._judged += 1
        self._verified += trace.is_correct
        self._tokens += trace.n_tokens
        self._reporter.progress(self.progress())
