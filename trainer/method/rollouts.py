"""Rollouts: the student samples G responses of each problem, and each gets its reward.

Every sample has a seed of its own, derived from (seed, purpose, problem, sample), so the same step gives the
same samples in any batch, after any resume and on any number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from precompute.config import AnswerForm
from precompute.engines import Completion, Engine, Request, Sampling
from precompute.problems.prompts import answer_form_of, render_prompt, system_turn
from store.errors import ProblemsError
from store.records import Problem, content_hash
from trainer.config import RolloutConfig, StudentConfig
from trainer.method.groups import Group, Sample
from trainer.method.rewards import Judge, PendingSample
from trainer.timing import StepTimer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A problem as the student sees it."""

    problem: Problem
    text: str
    ids: tuple[int, ...]
    """[P]"""
    opens_think: bool
    """It ends inside a `<think>` block."""


Draw = tuple[int, int]
"""(place of the prompt, 0-based index of the sample)"""


def student_prompts(
    problems: Sequence[Problem], tokenizer: Any, student: StudentConfig, *, max_prompt_length: int
) -> tuple[list[Prompt], int]:
    """Prompts of all problems that fit, and how many are too long.

    Raises ProblemsError when none is left.
    """
    prompts = []
    for problem in problems:
        rendered = render_prompt(
            tokenizer,
            problem,
            system_prompt=student.system_prompt,
            chat_template_kwargs=student.chat_template_kwargs,
        )
        prompts.append(
            Prompt(problem=problem, text=rendered.text, ids=rendered.ids, opens_think=rendered.opens_think)
        )
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= max_prompt_length]
    if not fitting:
        raise ProblemsError(
            f"no problem has a prompt of at most rollout.max_prompt_length = {max_prompt_length}"
        )
    return fitting, len(prompts) - len(fitting)


def demanded_form(student: StudentConfig, problems: Sequence[Problem]) -> AnswerForm:
    """The form in which the student must answer."""
    if student.answer_form != "auto":
        return student.answer_form
    return answer_form_of(system_turn(problems[0], student.system_prompt))


def seed_of(*parts: object) -> int:
    """A seed below 2**31 from the content of `parts`."""
    return int(content_hash(*parts), 16) % 2**31


def sampling_of(rollout: RolloutConfig) -> Sampling:
    """How a training step samples."""
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_completion_length,
        logprobs="sampler",  # the trainer's are of that distribution, too
    )


def sample_groups(
    engine: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    key: str,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
    timer: StepTimer | None = None,
) -> list[Group]:
    """G = `samples` judged responses of each prompt, in the order of `prompts`.

    Args:
        seed: the run's seed.
        key: what the samples are for, e.g. `step 12`; another key draws other samples.
        on_sample: called with (samples drawn, samples in all).
        timer: `verify` gets what is left to wait for verdicts once all is drawn.
    """
    draws = [(p, s) for p in range(len(prompts)) for s in range(samples)]
    judged = judged_samples(
        engine, judge, prompts, sampling, draws, seed=seed, key=key, on_sample=on_sample, timer=timer
    )
    found = dict(judged)
    return [
        Group(
            problem=prompt.problem,
            prompt_ids=prompt.ids,
            opens_think=prompt.opens_think,
            samples=tuple(found[p, s] for s in range(samples)),
        )
        for p, prompt in enumerate(prompts)
    ]


def judged_samples(
    engine: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    draws: Sequence[Draw],
    *,
    seed: int,
    key: str,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
    timer: StepTimer | None = None,
) -> Iterator[tuple[Draw, Sample]]:
    """The samples that `draws` name, each as soon as it and those drawn before it are judged; the other
    arguments as in `sample_groups`."""
    timer = timer or StepTimer()
    waiting: deque[tuple[Draw, PendingSample]] = deque()
    for drawn, (draw, completion) in enumerate(
        _completions(engine, prompts, sampling, draws, seed=seed, key=key), start=1
    ):
        prompt = prompts[draw[0]]
        pending = judge.submit(
            text=completion.text,
            gold=prompt.problem.answer,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            logprobs=completion.logprobs,
            opens_think=prompt.opens_think,
        )
        waiting.append((draw, pending))
        on_sample(drawn, len(draws))
        while waiting and waiting[0][1].is_judged:
            draw, pending = waiting.popleft()
            yield draw, judge.settle(pending)
    for draw, pending in waiting:
        with timer("verify"):
            sample = judge.settle(pending)
        yield draw, sample


def _completions(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    draws: Sequence[Draw],
    *,
    seed: int,
    key: str,
) -> Iterator[tuple[Draw, Completion]]:
    named = {f"{p}/{s}": (p, s) for p, s in draws}
    requests = [
        Request(
            request_id=name,
            prompt_ids=prompts[p].ids,
            seed=seed_of(seed, key, prompts[p].problem.problem_id, s),
        )
        for name, (p, s) in named.items()
    ]
    for completion in engine.generate(requests, sampling):
        yield named[completion.request_id], completion
