"""One teacher solves the problems that lack samples; `Solver._solve` and `_sample` are a problem's whole way.

    prompt --request--> engine --completion--> verifier --verdict--> trace --> part

Every problem is a coroutine. The coroutines run in a thread beside the engine, so that neither a verdict nor
the disk keeps the engine waiting; a problem's next sample begins as soon as a verdict calls for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from precompute.config import FiltersConfig, StoreConfig, TeacherConfig
from precompute.engines import Engine, Request, Sampling
from precompute.engines.feed import RequestQueue, loop_in_thread
from precompute.engines.registry import most_prompt_tokens
from precompute.problems.prompts import Prompt, demanded_form, prompt_warning, render_prompt, replaced_warning
from precompute.run.progress import Reporter, TeacherProgress
from precompute.run.traces import Append, PartBuffer, trace_of
from precompute.verify.verifier import Verifier
from store.errors import EngineError
from store.records import Problem, TeacherRecord, Trace, content_hash

STAGE_PROBLEMS = 500
"""Problems between two reports of a preparation."""
OPEN_PROBLEMS = 1024
"""Problems under way at once, or four times the engine's batch where that is more."""
FEWEST_FAILURES = 16
"""Failed samples, without any that succeeded, that end a run; or twice the engine's batch where that is more:
failures come first, since they take no time."""

Done = dict[str, dict[int, bool]]
"""problem_id -> sample_index -> usable (verified, and not filtered)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTeacher:
    """A teacher with all that is settled before its model is loaded."""

    config: TeacherConfig
    engine: str
    """Resolved."""
    tokenizer: Any
    record: TeacherRecord

    @property
    def name(self) -> str:
        """The teacher's name in the store."""
        return self.config.name


def next_samples(teacher: TeacherConfig, done: Mapping[int, bool]) -> list[int]:
    """Returns the sample indexes to begin with, given the verified ones (sample_index -> usable).

    With `until_verified = m` there are as many as usable traces are missing, the lowest free indexes first:
    a sample that could turn out not to be needed is never begun, so that a run that was killed anywhere ends
    with the samples of an uninterrupted one.
    """
    free = [index for index in range(teacher.sample_budget) if index not in done]
    if teacher.until_verified is None:
        return free
    return free[: max(teacher.until_verified - sum(done.values()), 0)]


def samples_left(teacher: TeacherConfig, done: Mapping[int, bool]) -> int:
    """Returns how many samples the problem may still get; with `until_verified` an upper bound."""
    if not next_samples(teacher, done):
        return 0
    return sum(index not in done for index in range(teacher.sample_budget))


def sample_seed(problem_id: str, teacher: str, sample_index: int) -> int:
    """Returns a seed below 2**31, its own for each sample: a shared seed gives n identical samples."""
    return int(content_hash(problem_id, teacher, sample_index), 16) % 2**31


def fill_prompts(
    teacher: PreparedTeacher, problems: Sequence[Problem], done: Done, reporter: Reporter
) -> dict[str, Prompt]:
    """Returns problem_id -> prompt, of the problems whose prompt fits the model together with max_tokens.

    Reports those that do not fit; EngineError when none does and none of `done` did.
    """
    prompts = {}
    for number, problem in enumerate(problems, start=1):
        prompts[problem.problem_id] = render_prompt(
            teacher.tokenizer,
            problem,
            system_prompt=teacher.config.system_prompt,
            chat_template_kwargs=teacher.config.chat_template_kwargs,
            user_template=teacher.config.user_template,
        )
        if number % STAGE_PROBLEMS == 0 or number == len(problems):
            reporter.show(f"{teacher.name}: filling prompts", number, len(problems))
    first = next(iter(prompts.values())).text
    config, key = teacher.config, f"teachers.{teacher.name}"
    for warning in (
        prompt_warning(teacher.tokenizer, first, key=f"{key}.chat_template", template=config.chat_template),
        replaced_warning(problems, config.system_prompt, key=f"{key}.system_prompt"),
    ):
        if warning:
            reporter.message(f"warning: {warning}")
    return _fitting(teacher.config, prompts, done, reporter)


def _fitting(
    teacher: TeacherConfig, prompts: Mapping[str, Prompt], done: Done, reporter: Reporter
) -> dict[str, Prompt]:
    """Returns the prompts that leave room for max_tokens."""
    limit = most_prompt_tokens(teacher)
    if limit is None:
        return dict(prompts)
    most, name = limit
    fitting = {problem_id: prompt for problem_id, prompt in prompts.items() if len(prompt.ids) <= most}
    too_long = {problem_id: len(prompts[problem_id].ids) for problem_id in prompts.keys() - fitting.keys()}
    if not too_long:
        return fitting
    shortest, asked = min(too_long.values()), f"max_tokens = {teacher.max_tokens}"
    if not fitting and not any(done.values()):
        raise EngineError(
            f"teacher {teacher.name!r}: {asked} and the shortest prompt of {shortest} tokens exceed {name}; "
            f"max_tokens may be {max(most + teacher.max_tokens - shortest, 0)} at most"
        )
    example = max(too_long, key=lambda problem_id: too_long[problem_id])
    reporter.message(
        f"{teacher.name}: {len(too_long)} of {len(prompts)} problems are left out: prompt and {asked} exceed "
        f"{name} (longest: {example}, {too_long[example]} tokens)"
    )
    return fitting


def longest_prompt(prompts: Mapping[str, Prompt]) -> int:
    """Returns the length of the longest prompt in tokens; 0 without prompts."""
    return max((len(prompt.ids) for prompt in prompts.values()), default=0)


class Solver:
    """One teacher at work: `done` is what the store has and `left` are the problems that lack samples."""

    def __init__(
        self,
        teacher: PreparedTeacher,
        problems: Sequence[Problem],
        done: Done,
        *,
        verifier: Verifier,
        filters: FiltersConfig,
        reporter: Reporter,
    ) -> None:
        self.teacher = teacher
        self.done = {problem.problem_id: done.get(problem.problem_id, {}) for problem in problems}
        self.left = [p for p in problems if next_samples(teacher.config, self.done[p.problem_id])]
        self._has_earlier = any(self.done.values())
        self.prompts: dict[str, Prompt] = {}
        self._verifier = verifier
        self._filters = filters
        self._reporter = reporter
        self._progress = TeacherProgress(
            teacher=teacher.name,
            done=sum(map(len, self.done.values())),
            total=sum(len(each) + samples_left(teacher.config, each) for each in self.done.values()),
        )
        self._started: float | None = None
        self._failed: list[Trace] = []
        """Failed samples of this run, which are written once another has succeeded."""
        self._kept_failures, self._successes = 0, 0

    def fill_prompts(self) -> None:
        """Renders the prompts of the problems that still get samples; those that do not fit get none."""
        if not self.left:
            return
        self.prompts = fill_prompts(self.teacher, self.left, self.done, self._reporter)
        for problem in self.left:
            if problem.problem_id not in self.prompts:
                self._progress.total -= samples_left(self.teacher.config, self.done[problem.problem_id])
        self.left = [problem for problem in self.left if problem.problem_id in self.prompts]

    def warm_up(self, engine: Engine, max_tokens: int) -> None:
        """Lets the engine sample a few tokens and drops them."""
        sampling = replace(self._sampling(), max_tokens=min(max_tokens, self.teacher.config.max_tokens))
        for _ in engine.generate([self._request(self.left[0], 0)], sampling):
            pass

    def run(self, engine: Engine, append: Append, config: StoreConfig) -> None:
        """Samples until no problem lacks a sample. Whatever ends it, all that was verified is appended."""
        self._started = time.monotonic()
        queue = RequestQueue()
        part = PartBuffer(append, part_traces=config.part_traces, part_seconds=config.part_seconds)
        try:
            with loop_in_thread() as loop:
                work = asyncio.run_coroutine_threadsafe(self._solve_all(queue, part), loop)
                for completion in engine.generate(queue.requests(work), self._sampling()):
                    queue.deliver(completion)
                if not work.done():
                    raise EngineError(f"engine {self.teacher.engine!r} ended before the requests did")
            self._keep_failed(part, at_end=True)
        finally:
            part.write()

    def failed_line(self) -> str:
        """Returns one line about the samples of this run that failed; empty without any."""
        if not self._failed:
            return ""
        problems, first = len({trace.problem_id for trace in self._failed}), self._failed[0]
        return (
            f"{self.teacher.name}: {len(self._failed)} samples of {problems} problems failed, e.g. "
            f"{first.problem_id}: {first.verdict_detail}; they are not tried again before `ampo store forget "
            f"--teacher {self.teacher.name} --failed`"
        )

    def progress(self) -> TeacherProgress:
        """Returns how far the teacher is."""
        seconds = 0.0 if self._started is None else time.monotonic() - self._started
        return replace(self._progress, seconds=seconds)

    async def _solve_all(self, queue: RequestQueue, part: PartBuffer) -> None:
        problems = iter(self.left)

        async def solve_next() -> None:
            for problem in problems:
                await self._solve(problem, queue, part)

        at_once = min(max(OPEN_PROBLEMS, 4 * self.teacher.config.batch_size), len(self.left))
        await asyncio.gather(*(solve_next() for _ in range(at_once)))

    async def _solve(self, problem: Problem, queue: RequestQueue, part: PartBuffer) -> None:
        """Takes the samples of one problem.

        With `until_verified` one searcher for each missing trace goes through the free indexes, which all
        searchers share, until it finds a usable one.
        """
        config, done = self.teacher.config, self.done[problem.problem_id]
        free = iter([index for index in range(config.sample_budget) if index not in done])

        async def search() -> None:
            again = False
            for index in free:
                trace = await self._sample(problem, index, queue, part, again=again)
                if config.until_verified is None or trace.is_usable:
                    return
                again = True

        await asyncio.gather(*(search() for _ in next_samples(config, done)))

    async def _sample(
        self, problem: Problem, index: int, queue: RequestQueue, part: PartBuffer, *, again: bool
    ) -> Trace:
        """Brings one sample from the prompt into a part.

        A further try (`again`) is sampled first: the tries of the hardest problems follow one another, and
        begun late they would keep an engine busy that has nothing else to do.
        """
        record, opens_think = self.teacher.record, self.prompts[problem.problem_id].opens_think
        request = self._request(problem, index)
        completion = await queue.sample(request, first=again)
        verdict = await asyncio.wrap_future(
            self._verifier.submit(
                completion.text,
                problem,
                demanded_form(record, problem),
                opens_think=opens_think,
            )
        )
        trace = trace_of(
            completion,
            verdict,
            problem,
            record,
            sample_index=index,
            seed=request.seed,
            filters=self._filters,
            opens_think=opens_think,
        )
        if completion.error:
            self._failed.append(trace)
        else:
            self._successes += 1
            part.add(trace)
        self._keep_failed(part)
        self._count(trace)
        return trace

    def _keep_failed(self, part: PartBuffer, *, at_end: bool = False) -> None:
        """Adds failed samples to the part once one has succeeded; EngineError where all fail."""
        held = self._failed[self._kept_failures :]
        has_some = self._successes or (at_end and self._has_earlier)
        if held and has_some:
            self._kept_failures += len(held)
            for trace in held:
                part.add(trace)
        elif held and (at_end or len(held) >= max(FEWEST_FAILURES, 2 * self.teacher.config.batch_size)):
            raise EngineError(
                f"teacher {self.teacher.name!r}: all {len(held)} samples failed: {held[0].verdict_detail}"
            )

    def _request(self, problem: Problem, index: int) -> Request:
        return Request(
            request_id=f"{problem.problem_id}-{index}",
            prompt_ids=self.prompts[problem.problem_id].ids,
            messages=self.prompts[problem.problem_id].messages,
            seed=sample_seed(problem.problem_id, self.teacher.name, index),
        )

    def _sampling(self) -> Sampling:
        config = self.teacher.config
        return Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_tokens,
        )

    def _count(self, trace: Trace) -> None:
        samples, progress = self.done[trace.problem_id], self._progress
        progress.total -= samples_left(self.teacher.config, samples)
        samples[trace.sample_index] = trace.is_usable
        progress.total += 1 + samples_left(self.teacher.config, samples)
        progress.done += 1
        progress.verified += trace.is_correct
        progress.filtered += trace.is_correct and not trace.is_usable
        progress.new += 1
        progress.tokens += trace.n_tokens
        self._reporter.progress(self.progress())
