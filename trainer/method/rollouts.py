"""Rollouts: the problems of a step, and G rewarded samples of each from the student.

Every sample has a seed of its own, derived from (seed, purpose, problem, sample), so a step gives the same
samples in any batch, after any resume and on any number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any, TypeVar

from precompute.engines import Engine, Request, Sampling
from store.errors import ProblemsError
from store.records import content_hash
from trainer.config import RolloutConfig
from trainer.method.groups import Group, Prompt, Rewarder, Sample

T = TypeVar("T")
SampleIndex = tuple[int, int]
"""(0-based index of the prompt, 0-based index of the sample)"""
OnSample = Callable[[int, int], None]
Timer = Callable[[str], AbstractContextManager[Any]]
"""Context in which the time is the named phase's: a StepTimer, or `nullcontext` where nothing is measured."""


def seed_of(*parts: object) -> int:
    """Returns a seed below 2**31 from the content of `parts`."""
    return int(content_hash(*parts), 16) % 2**31


def problems_of_step(items: Sequence[T], *, step: int, per_step: int, seed: int) -> list[T]:
    """Returns the `per_step` items of 1-based step `step`, a function of (seed, step) alone.

    Each epoch is a new permutation; its remainder below a whole step is dropped, so that no step holds a
    problem twice.

    Raises:
        ProblemsError: there are fewer items than a step needs.
    """
    if len(items) < per_step:
        raise ProblemsError(
            f"train.problems_per_step = {per_step}, but only {len(items)} problems can be trained on"
        )
    epoch, nth = divmod(step - 1, len(items) // per_step)
    order = Random(seed_of(seed, "epoch", epoch)).sample(items, len(items))
    return order[nth * per_step : (nth + 1) * per_step]


def refills_of_step(
    prompts: Sequence[Prompt], own: Sequence[Prompt], *, step: int, seed: int
) -> Iterator[Prompt]:
    """Yields all prompts but the step's `own`, in the order in which they replace groups."""
    used = {prompt.problem.problem_id for prompt in own}
    others = [prompt for prompt in prompts if prompt.problem.problem_id not in used]
    Random(seed_of(seed, "refill", step)).shuffle(others)
    yield from others


def sample_groups(
    engine: Engine,
    rewarder: Rewarder,
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    *,
    seed: int,
    key: str,
    on_sample: OnSample,
    timer: Timer,
) -> list[Group]:
    """Returns a group of G rewarded samples for each prompt; arguments as `rewarded_samples`."""
    sampling = sampling_of(rollout)
    size = range(rollout.num_generations)
    indices = [(p, s) for p in range(len(prompts)) for s in size]
    found = dict(
        rewarded_samples(
            engine, rewarder, prompts, sampling, indices, seed=seed, key=key, on_sample=on_sample, timer=timer
        )
    )
    return [
        Group(prompt=prompt, samples=tuple(found[p, s] for s in size)) for p, prompt in enumerate(prompts)
    ]


def sampling_of(rollout: RolloutConfig) -> Sampling:
    """Returns the parameters of the student's samples."""
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_completion_length,
        logprobs="sampler",  # the trainer's refer to that distribution, too
    )


def rewarded_samples(
    engine: Engine,
    rewarder: Rewarder,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    indices: Sequence[SampleIndex],
    *,
    seed: int,
    key: str,
    on_sample: OnSample = lambda done, total: None,
    timer: Timer = nullcontext,
) -> Iterator[tuple[SampleIndex, Sample]]:
    """Yields the samples of `indices`, each as soon as it and those sampled before it are verified.

    Args:
        seed: the run's seed.
        key: purpose of the samples, e.g. `step 12`; another key gives other samples.
        on_sample: called with (samples done, samples in all).
        timer: `verify` gets the time spent on waiting for verdicts once everything is sampled.
    """
    requests = [
        Request(
            request_id=f"{p}/{s}",
            prompt_ids=prompts[p].ids,
            seed=seed_of(seed, key, prompts[p].problem.problem_id, s),
        )
        for p, s in indices
    ]
    waiting: deque[Any] = deque()
    for done, completion in enumerate(engine.generate(requests, sampling), start=1):
        p, s = map(int, completion.request_id.split("/"))
        sample = Sample(
            token_ids=completion.token_ids,
            text=completion.text,
            finish_reason=completion.finish_reason,
            logprobs=completion.logprobs,
        )
        waiting.append(((p, s), prompts[p], sample, rewarder.verify(prompts[p], sample)))
        on_sample(done, len(indices))
        while waiting and (waiting[0][3] is None or waiting[0][3].done()):
            index, *rest = waiting.popleft()
            yield index, rewarder.reward(*rest)
    with timer("verify"):
        for index, *rest in waiting:
            yield index, rewarder.reward(*rest)
