"""Rollouts: the student samples G responses of each problem, and each gets its reward.

Every sample has a seed of its own, derived from (seed, purpose, problem, sample), so the same step gives the
same samples in any batch, after any resume and on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from precompute.config import AnswerForm
from precompute.engines import Completion, Engine, Request, Sampling
from precompute.prompts import answer_form_of, render_prompt, system_turn
from store.errors import ProblemsError
from store.records import Problem, content_hash
from trainer.config import RolloutConfig, StudentConfig
from trainer.groups import Group
from trainer.rewards import Judge, PendingSample
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
    timer = timer or StepTimer()
    pending: dict[str, PendingSample] = {}
    for completion in _completions(engine, prompts, sampling, samples=samples, seed=seed, key=key):
        prompt = prompts[int(completion.request_id.partition("/")[0])]
        pending[completion.request_id] = judge.submit(
            text=completion.text,
            gold=prompt.problem.answer,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            logprobs=completion.logprobs,
            opens_think=prompt.opens_think,
        )
        on_sample(len(pending), len(prompts) * samples)
    with timer("verify"):
        return [
            Group(
                problem=prompt.problem,
                prompt_ids=prompt.ids,
                opens_think=prompt.opens_think,
                samples=tuple(judge.settle(pending[f"{p}/{s}"]) for s in range(samples)),
            )
            for p, prompt in enumerate(prompts)
        ]


def _completions(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, *, samples: int, seed: int, key: str
) -> Iterator[Completion]:
    requests = [
        Request(
            request_id=f"{p}/{s}",
            prompt_ids=prompt.ids,
            seed=seed_of(seed, key, prompt.problem.problem_id, s),
        )
        for p, prompt in enumerate(prompts)
        for s in range(samples)
    ]
    return engine.generate(requests, sampling)
