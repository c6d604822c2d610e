"""Evaluation: avg@n and the unbiased pass@k of a policy on held-out problems, with confidence intervals.

pass@k = 1 - C(n - c, k) / C(n, k)      with c of n samples correct (Chen et al. 2021, arXiv 2107.03374)

One way for all: evaluations while training and `ampo eval` draw the same samples from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np

from precompute.engines import Engine, Sampling
from store.records import Problem
from trainer.config import EvalConfig, RolloutConfig
from trainer.method.groups import Sample
from trainer.method.rewards import Judge
from trainer.method.rollouts import Prompt, judged_samples
from trainer.parallel.world import ALONE, World

RESAMPLES = 2000
"""Of the bootstrap."""
COVERAGE = 0.95
"""Of the confidence intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """One judged response: a row of an evaluation's Parquet files."""

    problem_id: str
    source: str
    """Where the problem file says that the problem comes from, e.g. `aime`; empty where it says nothing."""
    sample_index: int
    """0-based."""
    is_correct: bool
    """The verifier's boolean; a cut response is never correct."""
    has_format: bool
    """Exactly one final answer in the demanded form, and it ended by itself."""
    n_tokens: int
    """Of the response, the final EOS included."""
    finish_reason: str
    """`stop` or `length`."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems."""

    value: float
    low: float | None
    """The 95 % interval by bootstrap over problems; None where all problems have the same value, from which
    no interval can be had."""
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a set of problems came to."""

    problems: int
    samples: tuple[int, int]
    """The fewest and the most of one problem."""
    pass_at: Mapping[int, Estimate]
    """k -> mean over problems of the unbiased estimate; 1, which is the mean accuracy, is always there."""
    mean_length: float
    """Response tokens."""
    cut_share: float
    """Share of samples that reached max_completion_length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation, with every sample it rests on."""

    n: int
    """Samples of each problem; of one that its file states more often, as many as that."""
    overall: Score
    sources: Mapping[str, Score]
    """Where the problem file names several sources, each alone; else empty."""
    samples: tuple[EvalSample, ...]
    """In the order of the problems."""

    @property
    def mean_of_sources(self) -> dict[str, float]:
        """k -> mean over the sources, each weighing the same; empty where there is one."""
        scores = list(self.sources.values())
        return {
            f"pass@{k}": fmean(score.pass_at[k].value for score in scores)
            for k in (self.overall.pass_at if scores else ())
        }

    @property
    def metrics(self) -> dict[str, float]:
        """By the names that metrics.jsonl uses; avg@n is the share of correct samples."""
        overall = self.overall
        return {
            f"eval/avg@{self.n}": overall.pass_at[1].value,
            **{f"eval/pass@{k}": found.value for k, found in overall.pass_at.items()},
            "eval/mean_length": overall.mean_length,
            "eval/cut_share": overall.cut_share,
            **{
                f"eval/{source}/pass@{k}": found.value
                for source, score in self.sources.items()
                for k, found in score.pass_at.items()
            },
        }


def pass_at_k(*, samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples, drawn from `samples` with `correct` right ones, is right.

    Raises ValueError for k > samples, where no unbiased estimate exists.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct in {samples} samples does not exist")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def mean_with_interval(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean, and the 2.5 and 97.5 % quantiles of the means of RESAMPLES bootstrap samples.

    `values`: one a problem, for it is problems that a benchmark drew; how much the samples of one problem
    scatter is part of how much the problems do.
    """
    low = high = None
    if min(values) < max(values):
        drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
        means = np.asarray(values)[drawn].mean(axis=1)  # [RESAMPLES]
        tail = (1 - COVERAGE) / 2
        low, high = map(float, np.quantile(means, (tail, 1 - tail), method="inverted_cdf"))
    return Estimate(value=fmean(values), low=low, high=high)


def eval_sampling(config: EvalConfig, rollout: RolloutConfig) -> Sampling:
    """How evaluations sample: the evaluation's temperature, the rollouts' length."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        max_tokens=rollout.max_completion_length,
    )


def evaluate(
    engine: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    k: Sequence[int],
    seed: int,
    world: World = ALONE,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Samples and judges `samples` responses of each prompt, or as many as its problem file states it. The
    same seed draws the same samples again, so that two evaluations differ by the policy alone. Each process
    of `world` draws of its share of the prompts."""
    own = world.share(prompts)
    drawn = list(draw_samples(engine, judge, own, sampling, samples=samples, seed=seed, on_sample=on_sample))
    rows = [row for shares in world.gather(drawn) for row in shares]
    return evaluation_of(rows, prompts, samples=samples, k=k)


def draw_samples(
    engine: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    there: Collection[tuple[str, int]] = (),
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[EvalSample]:
    """Yields the samples of an evaluation that are not `there` (problem_id, sample_index), as they are
    judged; `on_sample` counts those that are with them."""
    wanted = [(p, s) for p, prompt in enumerate(prompts) for s in range(samples_of(prompt.problem, samples))]
    draws = [(p, s) for p, s in wanted if (prompts[p].problem.problem_id, s) not in there]
    have = len(wanted) - len(draws)
    judged = judged_samples(
        engine,
        judge,
        prompts,
        sampling,
        draws,
        seed=seed,
        key="eval",
        on_sample=lambda done, total: on_sample(have + done, have + total),
    )
    for (p, s), sample in judged:
        yield _row(prompts[p].problem, s, sample)


def samples_of(problem: Problem, samples: int) -> int:
    """How many samples of the problem an evaluation takes."""
    return max(samples, problem.repeats)


def _row(problem: Problem, index: int, sample: Sample) -> EvalSample:
    return EvalSample(
        problem_id=problem.problem_id,
        source=problem.source,
        sample_index=index,
        is_correct=sample.is_correct,
        has_format=sample.has_format,
        n_tokens=len(sample.token_ids),
        finish_reason=sample.finish_reason,
        text=sample.text,
    )


def evaluation_of(
    rows: Sequence[EvalSample], prompts: Sequence[Prompt], *, samples: int, k: Sequence[int]
) -> Evaluation:
    """What the samples of `prompts` come to, in whatever order they came; rows of other problems, and more
    than `samples` asks for, are left out."""
    found: dict[str, dict[int, EvalSample]] = {prompt.problem.problem_id: {} for prompt in prompts}
    for row in rows:
        if row.problem_id in found:
            found[row.problem_id][row.sample_index] = row
    groups = [
        [found[p.problem_id][s] for s in range(samples_of(p, samples))]
        for p in (prompt.problem for prompt in prompts)
    ]
    sources = sorted({group[0].source for group in groups})
    return Evaluation(
        n=samples,
        overall=_score(groups, k),
        sources={
            source: _score([group for group in groups if group[0].source == source], k)
            for source in (sources if len(sources) > 1 else ())
        },
        samples=tuple(row for group in groups for row in group),
    )


def _score(groups: Sequence[Sequence[EvalSample]], k: Sequence[int]) -> Score:
    """Of problems, each with its samples."""
    counts = [(len(group), sum(row.is_correct for row in group)) for group in groups]
    everything = [row for group in groups for row in group]
    return Score(
        problems=len(groups),
        samples=(min(n for n, _ in counts), max(n for n, _ in counts)),
        pass_at={
            each: mean_with_interval([pass_at_k(samples=n, correct=c, k=each) for n, c in counts])
            for each in sorted({1, *k})
        },
        mean_length=fmean(row.n_tokens for row in everything),
        cut_share=fmean(row.finish_reason == "length" for row in everything),
    )
