"""Evaluation: avg@n and the unbiased pass@k on held-out problems, with confidence intervals.

pass@k = 1 - C(n - c, k) / C(n, k)      with c of n samples correct (Chen et al. 2021, arXiv 2107.03374)

Evaluations during training and `ampo eval` generate the same samples from the same weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np

from precompute.engines import Engine, Sampling
from trainer.config import Config, EvalConfig
from trainer.method.groups import Prompt, Rewarder
from trainer.method.rollouts import OnSample, rewarded_samples
from trainer.parallel.world import ALONE, World

RESAMPLES = 2000
"""Bootstrap samples behind each 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """One verified response: a row of an evaluation's Parquet files."""

    problem_id: str
    source: str
    """The problem's source in its file, e.g. `aime`; empty where the file names none."""
    sample_index: int
    """0-based."""
    is_correct: bool
    """A truncated response is never correct."""
    has_format: bool
    """Exactly one final answer in the demanded form, and the response ended by itself."""
    n_tokens: int
    """Response tokens, the final EOS included."""
    finish_reason: str
    """`stop` or `length`."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems with its 95 % bootstrap interval, None where all problems have one value."""

    value: float
    low: float | None
    high: float | None

    def text(self, *, between: str = " ") -> str:
        """Returns `0.433 [.36 .51]`, without brackets where the interval is undefined."""
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        low, high = (f"{end:.2f}".removeprefix("0") for end in (self.low, self.high))
        return f"{self.value:.3f}{between}[{low} {high}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The result on a set of problems."""

    problems: int
    samples: tuple[int, int]
    """The fewest and the most samples of one problem."""
    pass_at: Mapping[int, Estimate]
    """k -> mean over problems of the unbiased estimate; always holds 1, the mean accuracy."""
    mean_length: float
    """Response tokens."""
    cut_share: float
    """Share of samples that reached max_completion_length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation with all its samples."""

    n: int
    """Samples per problem; a problem that its file repeats more often has that many."""
    overall: Score
    sources: Mapping[str, Score]
    """Scores per source where the problem file names several; else empty."""
    samples: tuple[EvalSample, ...]
    """In the order of the problems."""

    @property
    def mean_of_sources(self) -> dict[str, float]:
        """`pass@k` -> unweighted mean over the sources; empty where there are fewer than two."""
        return {
            f"pass@{k}": fmean(score.pass_at[k].value for score in self.sources.values())
            for k in (self.overall.pass_at if self.sources else ())
        }

    @property
    def metrics(self) -> dict[str, float]:
        """Values by their names in metrics.jsonl; avg@n is the share of correct samples."""
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
    """Returns the probability that k <= samples of them, drawn without replacement, include a correct one."""
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def mean_with_interval(values: Sequence[float]) -> Estimate:
    """Returns the mean of one value per problem, and its interval by bootstrap over problems."""
    low = high = None
    if min(values) < max(values):
        indices = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        means = np.asarray(values)[indices].mean(axis=1)  # [RESAMPLES]
        low, high = map(float, np.quantile(means, (0.025, 0.975), method="inverted_cdf"))
    return Estimate(value=fmean(values), low=low, high=high)


def eval_sampling(config: Config) -> Sampling:
    """Returns the sampling of evaluations: their own temperature and top_p, the rollouts' length."""
    return Sampling(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=0,
        max_tokens=config.rollout.max_completion_length,
    )


def evaluate(
    config: Config,
    engine: Engine,
    rewarder: Rewarder,
    prompts: Sequence[Prompt],
    *,
    world: World = ALONE,
    on_sample: OnSample = lambda done, total: None,
) -> Evaluation:
    """Generates and verifies `eval.samples` responses per prompt; each rank takes its share of the prompts.

    One seed always gives the same samples, so that two evaluations differ by the policy alone.
    """
    rows = list(eval_samples(config, engine, rewarder, world.share(prompts), on_sample=on_sample))
    gathered = [row for shares in world.gather(rows) for row in shares]
    return evaluation_of(config.eval, gathered, prompts)


def eval_samples(
    config: Config,
    engine: Engine,
    rewarder: Rewarder,
    prompts: Sequence[Prompt],
    *,
    existing: Collection[tuple[str, int]] = (),
    on_sample: OnSample = lambda done, total: None,
) -> Iterator[EvalSample]:
    """Yields the samples that are not `existing` (problem_id, sample_index) as soon as they are verified.

    `on_sample` is called with (samples done, samples in all), the existing ones included.
    """
    wanted = sample_keys(config.eval, prompts)
    by_id = {prompt.problem.problem_id: p for p, prompt in enumerate(prompts)}
    missing = [(by_id[key], s) for key, s in wanted if (key, s) not in existing]
    verified = rewarded_samples(
        engine,
        rewarder,
        prompts,
        eval_sampling(config),
        missing,
        seed=config.train.seed,
        key="eval",
        on_sample=lambda done, _: on_sample(len(wanted) - len(missing) + done, len(wanted)),
    )
    for (p, s), sample in verified:
        yield EvalSample(
            problem_id=prompts[p].problem.problem_id,
            source=prompts[p].problem.source,
            sample_index=s,
            is_correct=sample.is_correct,
            has_format=sample.has_format,
            n_tokens=len(sample.token_ids),
            finish_reason=sample.finish_reason,
            text=sample.text,
        )


def sample_keys(config: EvalConfig, prompts: Sequence[Prompt]) -> list[tuple[str, int]]:
    """Returns (problem_id, sample_index) of every sample; a problem has at least its repeats in the file."""
    problems = [prompt.problem for prompt in prompts]
    return [(each.problem_id, s) for each in problems for s in range(max(config.samples, each.repeats))]


def evaluation_of(config: EvalConfig, rows: Sequence[EvalSample], prompts: Sequence[Prompt]) -> Evaluation:
    """Computes an evaluation from rows in any order; other problems and samples are ignored."""
    found = {(row.problem_id, row.sample_index): row for row in rows}
    ordered = [found[key] for key in sample_keys(config, prompts)]
    sources = {
        source: _score([row for row in ordered if row.source == source], config.k)
        for source in sorted({row.source for row in ordered})
    }
    return Evaluation(
        n=config.samples,
        overall=_score(ordered, config.k),
        sources=sources if len(sources) > 1 else {},
        samples=tuple(ordered),
    )


def _score(rows: Sequence[EvalSample], k: Sequence[int]) -> Score:
    samples = Counter(row.problem_id for row in rows)
    correct = Counter(row.problem_id for row in rows if row.is_correct)
    return Score(
        problems=len(samples),
        samples=(min(samples.values()), max(samples.values())),
        pass_at={
            each: mean_with_interval(
                [pass_at_k(samples=n, correct=correct[problem], k=each) for problem, n in samples.items()]
            )
            for each in sorted({1, *k})
        },
        mean_length=fmean(row.n_tokens for row in rows),
        cut_share=fmean(row.finish_reason == "length" for row in rows),
    )
