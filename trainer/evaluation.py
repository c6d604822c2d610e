"""Evaluation: avg@n and the unbiased pass@k on held-out problems, with confidence intervals.

pass@k = 1 - C(n - c, k) / C(n, k)      with c of n samples correct (Chen et al. 2021, arXiv 2107.03374)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import comb
from statistics import fmean

import numpy as np

from precompute.engines import Engine, Sampling
from store.records import Trace
from trainer.config import Config, EvalConfig
from trainer.method.groups import Prompt, Rewarder
from trainer.method.rollouts import OnSample, rewarded_samples
from trainer.parallel.world import ALONE, World

RESAMPLES = 2000
"""Bootstrap samples behind each 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """One verified response: a row of a run's evals/step-N.parquet."""

    set: str = ""
    """Name in `eval.sets`; empty for `problems.eval`."""
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
    pass_at: Mapping[int, Estimate]
    """k -> mean over problems of the unbiased estimate; always holds 1, the mean accuracy."""
    mean_length: float
    """Response tokens."""
    cut_share: float
    """Share of samples that reached max_completion_length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation."""

    name: str = ""
    """Name in `eval.sets`; empty for `problems.eval`."""
    n: int
    """Samples per problem; a problem that its file repeats more often has that many."""
    overall: Score
    sources: Mapping[str, Score]
    """Scores per source where the problem file names several; else empty."""
    samples: tuple[EvalSample, ...] = ()
    """During training, in the order of the problems; `ampo eval` has them in its store."""

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
        overall, place = self.overall, f"eval/{self.name}".rstrip("/")
        return {
            f"{place}/avg@{self.n}": overall.pass_at[1].value,
            **{f"{place}/pass@{k}": found.value for k, found in overall.pass_at.items()},
            f"{place}/mean_length": overall.mean_length,
            f"{place}/cut_share": overall.cut_share,
            **{
                f"{place}/{source}/pass@{k}": found.value
                for source, score in self.sources.items()
                for k, found in score.pass_at.items()
            },
        }


def metrics_of(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Returns the values of all held-out sets; `eval/pass@k` is that of `problems.eval`, or without it the
    mean of the sets."""
    found = {key: value for each in evaluations for key, value in each.metrics.items()}
    for k in evaluations[0].overall.pass_at:
        found.setdefault(f"eval/pass@{k}", fmean(each.overall.pass_at[k].value for each in evaluations))
    return found


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


def evaluate(
    config: Config,
    engine: Engine,
    rewarder: Rewarder,
    prompts: Sequence[Prompt],
    *,
    name: str = "",
    world: World = ALONE,
    on_sample: OnSample = lambda done, total: None,
    halts: Callable[[], object] = lambda: False,
) -> Evaluation | None:
    """Generates and verifies `eval.samples` responses per prompt; each rank takes its share of the prompts.

    None where `halts` became true in a rank, which then stops sampling.

    A problem that its file repeats more often gets that many. One seed always gives the same samples, so that
    two evaluations differ by the policy alone. `name`: of the set.
    """
    own = world.share(prompts)
    counts = [max(config.eval.samples, prompt.problem.repeats) for prompt in own]
    indices = [(p, s) for p, count in enumerate(counts) for s in range(count)]
    sampling = Sampling(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=0,
        max_tokens=config.rollout.max_completion_length,
    )
    seed = config.train.seed
    rows = [
        EvalSample(
            set=name,
            problem_id=own[p].problem.problem_id,
            source=own[p].problem.source,
            sample_index=s,
            is_correct=sample.is_correct,
            has_format=sample.has_format,
            n_tokens=len(sample.token_ids),
            finish_reason=sample.finish_reason,
            text=sample.text,
        )
        for (p, s), sample in takewhile(
            lambda _: not halts(),
            rewarded_samples(
                engine, rewarder, own, sampling, indices, seed=seed, key="eval", on_sample=on_sample
            ),
        )
    ]
    shares = world.gather(rows if len(rows) == len(indices) else None)
    if None in shares:
        return None
    gathered = [row for share in shares for row in share or ()]
    order = {prompt.problem.problem_id: index for index, prompt in enumerate(prompts)}
    gathered.sort(key=lambda row: (order[row.problem_id], row.sample_index))
    sources = {prompt.problem.problem_id: prompt.problem.source for prompt in prompts}
    return replace(evaluation_of(config.eval, gathered, sources), name=name, samples=tuple(gathered))


def evaluation_of(
    config: EvalConfig, samples: Sequence[EvalSample | Trace], sources: Mapping[str, str]
) -> Evaluation:
    """Computes an evaluation from all its samples; `sources`: problem_id -> the problem's source."""
    found = {sources[sample.problem_id] for sample in samples}
    return Evaluation(
        n=config.samples,
        overall=_score(samples, config.k),
        sources={
            source: _score([each for each in samples if sources[each.problem_id] == source], config.k)
            for source in (sorted(found) if len(found) > 1 else ())
        },
    )


def _score(samples: Sequence[EvalSample | Trace], k: Sequence[int]) -> Score:
    counts = Counter(sample.problem_id for sample in samples)
    correct = Counter(sample.problem_id for sample in samples if sample.is_correct)
    return Score(
        problems=len(counts),
        pass_at={
            each: mean_with_interval(
                [pass_at_k(samples=n, correct=correct[problem], k=each) for problem, n in counts.items()]
            )
            for each in sorted({1, *k})
        },
        mean_length=fmean(sample.n_tokens for sample in samples),
        cut_share=fmean(sample.finish_reason == "length" for sample in samples),
    )
