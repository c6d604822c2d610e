"""Evaluation: avg@n and the unbiased pass@k of a policy on held-out problems.

pass@k = 1 - C(n - c, k) / C(n, k)      with c of n samples correct (Chen et al. 2021, arXiv 2107.03374)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

from precompute.engines import Engine, Sampling
from trainer.config import EvalConfig, RolloutConfig
from trainer.distributed import ALONE, World
from trainer.groups import Group
from trainer.rewards import Judge
from trainer.rollout import Prompt, sample_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation, with every sample it rests on."""

    samples: int
    """n, of each problem."""
    pass_at: dict[int, float]
    """k -> mean over problems of the unbiased estimate."""
    mean_length: float
    """Response tokens."""
    cut_share: float
    """Share of samples that reached max_completion_length."""
    groups: tuple[Group, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """By the names that metrics.jsonl uses; avg@n is the share of correct samples."""
        return {
            f"eval/avg@{self.samples}": self.pass_at[1],
            **{f"eval/pass@{k}": value for k, value in self.pass_at.items()},
            "eval/mean_length": self.mean_length,
            "eval/cut_share": self.cut_share,
        }


def pass_at_k(*, samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples, drawn from `samples` with `correct` right ones, is right.

    Raises ValueError for k > samples, where no unbiased estimate exists.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct in {samples} samples does not exist")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


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
    """Samples and judges `samples` responses of each prompt. The same seed draws the same samples again,
    so that two evaluations differ by the policy alone. Each process of `world` draws its share."""
    own = sample_groups(
        engine,
        judge,
        world.share(prompts),
        sampling,
        samples=samples,
        seed=seed,
        key="eval",
        on_sample=on_sample,
    )
    groups = world.merged(own)
    correct = [sum(sample.is_correct for sample in group.samples) for group in groups]
    everything = [sample for group in groups for sample in group.samples]
    return Evaluation(
        samples=samples,
        pass_at={
            each: sum(pass_at_k(samples=samples, correct=c, k=each) for c in correct) / len(correct)
            for each in sorted({1, *k})
        },
        mean_length=sum(len(sample.token_ids) for sample in everything) / len(everything),
        cut_share=sum(sample.finish_reason == "length" for sample in everything) / len(everything),
        groups=tuple(groups),
    )
