"""One teacher at work on what the store lacks of it: prompts, samples, verdicts, traces.

    feed --what to draw now--> engine --completions--> verifier --verdicts--> traces --> parts
      ^---------------------------- judged: may it be used? -----------------------|

A problem's next sample is drawn as soon as a verdict asks for it, while the engine is busy with others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from precompute.config import FiltersConfig, StoreConfig, TeacherConfig
from precompute.engines import Completion, Engine, Request, Sampling
from precompute.engines.registry import check_fits
from precompute.problems.prompts import Prompt, demanded_form, prompt_warning, render_prompt
from precompute.run.collector import Collector
from precompute.run.draws import Done, DrawFeed, next_samples, sample_seed, samples_left
from precompute.run.filters import why_filtered
from precompute.run.progress import Reporter, TeacherProgress
from precompute.verify.verifier import Verdict, Verifier
from store.records import Problem, TeacherRecord, Trace

STAGE_PROBLEMS = 500
"""Problems between two reports of a preparation."""

Append = Callable[[Sequence[Trace]], object]
"""Keeps traces, e.g. `StoreWriter.append`."""


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
    key, template = f"teachers.{job.name}.chat_template", job.config.chat_template
    warning = prompt_warning(job.tokenizer, next(iter(prompts.values())).text, key=key, template=template)
    if warning:
        reporter.message(f"warning: {warning}")
    check_fits(job.config, longest_prompt(prompts))
    return prompts


def longest_prompt(prompts: Mapping[str, Prompt]) -> int:
    """In tokens."""
    return max(len(prompt.ids) for prompt in prompts.values())


class TeacherWork:
    """One teacher at work: what is done, and the drawing of what is not."""

    def __init__(
        self,
        job: Job,
        problems: Sequence[Problem],
        done: Done,
        *,
        verifier: Verifier,
        filters: FiltersConfig,
        reporter: Reporter,
    ) -> None:
        self.job = job
        self.done = {problem.problem_id: done.get(problem.problem_id, {}) for problem in problems}
        self.left = [p for p in problems if next_samples(job.config, self.done[p.problem_id])]
        self.prompts: dict[str, Prompt] = {}
        self._problems = {problem.problem_id: problem for problem in self.left}
        self._verifier = verifier
        self._filters = filters
        self._reporter = reporter
        self._judged = self._verified = self._filtered = self._tokens = 0
        self._there = sum(map(len, self.done.values()))
        self._to_come = sum(samples_left(job.config, samples) for samples in self.done.values())
        self._started: float | None = None

    def fill_prompts(self) -> None:
        """For the problems that still get samples."""
        self.prompts = fill_prompts(self.job, self.left, self._reporter)

    def warm_up(self, engine: Engine, max_tokens: int) -> None:
        """Lets the engine draw a few tokens for nobody."""
        sampling = replace(self._sampling(), max_tokens=min(max_tokens, self.job.config.max_tokens))
        for _ in engine.generate([self._request(self.left[0].problem_id, 0)], sampling):
            pass

    def run(self, engine: Engine, append: Append, config: StoreConfig) -> None:
        """Draws until no problem lacks a sample."""
        self._started = time.monotonic()
        feed = DrawFeed(self.job.config, list(self._problems), self.done)
        with Collector(
            append,
            part_traces=config.part_traces,
            part_seconds=config.part_seconds,
            on_trace=lambda trace: self._note(trace, feed),
        ) as collector:
            for completion in engine.generate(self._requests(feed, collector), self._sampling()):
                self._submit(collector, completion)

    def progress(self) -> TeacherProgress:
        """How far it is."""
        return TeacherProgress(
            teacher=self.job.name,
            done=self._there,
            total=self._there + self._to_come,
            verified=self._verified,
            filtered=self._filtered,
            judged=self._judged,
            tokens=self._tokens,
            seconds=0.0 if self._started is None else time.monotonic() - self._started,
        )

    def _sampling(self) -> Sampling:
        teacher = self.job.config
        return Sampling(
            temperature=teacher.temperature,
            top_p=teacher.top_p,
            top_k=teacher.top_k,
            max_tokens=teacher.max_tokens,
        )

    def _requests(self, feed: DrawFeed, collector: Collector) -> Iterator[Request | None]:
        for draw in feed:
            if draw is None:
                # A collector that has failed brings no verdict: this would be a wait without an end.
                collector.check()
                yield None
            else:
                yield self._request(*draw)

    def _request(self, problem_id: str, index: int) -> Request:
        return Request(
            request_id=f"{problem_id}-{index}",
            prompt_ids=self.prompts[problem_id].ids,
            seed=sample_seed(problem_id, self.job.name, index),
        )

    def _submit(self, collector: Collector, completion: Completion) -> None:
        problem_id, _, index = completion.request_id.rpartition("-")
        problem = self._problems[problem_id]
        verdict = self._verifier.submit(
            completion.text,
            problem.answer,
            demanded_form(self.job.config, problem),
            opens_think=self.prompts[problem_id].opens_think,
        )
        collector.submit(verdict, lambda known: self._trace(known, completion, problem, int(index)))

    def _trace(self, verdict: Verdict, completion: Completion, problem: Problem, index: int) -> Trace:
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
            seed=sample_seed(problem.problem_id, self.job.name, index),
            generation_fingerprint=self.job.record.generation_fingerprint,
            created_at=datetime.now(UTC),
            verdict_detail=verdict.detail,
            parsed_answer=verdict.parsed_answer,
            parsed_gold=verdict.parsed_gold,
            filtered=why_filtered(
                self._filters,
                text=completion.text,
                n_tokens=len(completion.token_ids),
                form=demanded_form(self.job.config, problem),
                opens_think=self.prompts[problem.problem_id].opens_think,
            ),
        )

    def _note(self, trace: Trace, feed: DrawFeed) -> None:
        """Called by the collector's thread alone."""
        samples = self.done[trace.problem_id]
        self._to_come -= samples_left(self.job.config, samples)
        samples[trace.sample_index] = trace.is_usable
        self._to_come += samples_left(self.job.config, samples)
        self._there += 1
        self._judged += 1
        self._verified += trace.is_correct
        self._filtered += trace.is_correct and not trace.is_usable
        self._tokens += trace.n_tokens
        feed.judged(trace.problem_id, trace.sample_index, trace.is_usable)
        self._reporter.progress(self.progress())
