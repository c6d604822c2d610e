"""Evaluation: the unbiased pass@k by hand and by brute force, and whole evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from precompute.config import VerifyConfig
from precompute.engines import Completion, Request, Sampling
from precompute.engines.transformers_engine import TransformersEngine
from precompute.verify.verifier import Verifier
from store.records import Problem
from trainer.config import DEFAULT_REWARDS, Config, EvalConfig, RolloutConfig, StudentConfig, TrainConfig
from trainer.evaluation import (
    Estimate,
    Evaluation,
    evaluate,
    mean_with_interval,
    pass_at_k,
)
from trainer.method.groups import Prompt, Rewarder
from trainer.run.prompts import fitting_prompts
from trainer.telemetry.console import TrainReporter


def sampling_of(samples: int, k: tuple[int, ...] = (1,), seed: int = 0) -> Config:
    """Evaluations at temperature 1 and top_p 0.9, not the rollouts', with responses of at most 24 tokens."""
    return Config(
        eval=EvalConfig(samples=samples, k=k, temperature=1.0, top_p=0.9),
        rollout=RolloutConfig(temperature=0.7, top_k=5, max_completion_length=24),
        train=TrainConfig(seed=seed),
    )


PROBLEMS = [Problem(question=f"{n}+{n}", answer=str(2 * n)) for n in range(3)]


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (4, 1, 1, 0.25),  # 1 - 3/4
        (4, 1, 2, 0.5),  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        (4, 1, 4, 1.0),  # all four, the correct one among them: C(3, 4) = 0
        (5, 2, 2, 0.7),  # 1 - C(3, 2) / C(5, 2) = 1 - 3/10
        (5, 2, 3, 0.9),  # 1 - C(3, 3) / C(5, 3) = 1 - 1/10
        (8, 0, 8, 0.0),
        (8, 8, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(samples: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(samples=samples, correct=correct, k=k) == pytest.approx(expected)


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(combinations([True] * correct + [False] * (samples - correct), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(samples=samples, correct=correct, k=k) == pytest.approx(share)


@pytest.fixture(scope="module")
def rewarder() -> Iterator[Rewarder]:
    with Verifier(VerifyConfig(workers=1)) as verifier:
        yield Rewarder(verifier, max_length=500, weights=DEFAULT_REWARDS)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    config = Config(student=StudentConfig(system_prompt=""))
    return fitting_prompts(config, PROBLEMS, tiny_tokenizer(), TrainReporter())


def random_engine(*, batch_size: int = 64) -> TransformersEngine:
    return TransformersEngine(tiny_model(), tiny_tokenizer(), batch_size=batch_size)


def texts_of(evaluation: Evaluation) -> list[list[str]]:
    """The texts of each problem, in the order of the problems."""
    texts: dict[str, list[str]] = {}
    for sample in evaluation.samples:
        texts.setdefault(sample.problem_id, []).append(sample.text)
    return list(texts.values())


def test_a_seed_gives_the_same_samples_again_and_another_seed_others(
    rewarder: Rewarder, prompts: list[Prompt]
) -> None:
    engine = random_engine()
    first, again, other = (
        evaluate(sampling_of(4, (1, 4), seed), engine, rewarder, prompts) for seed in (0, 0, 1)
    )
    assert texts_of(first) == texts_of(again)
    assert first.metrics == again.metrics
    assert texts_of(first) != texts_of(other)
    # Each sample has a seed of its own: 3 problems x 4 samples, and no two alike.
    assert len({ids for group in texts_of(first) for ids in group}) == 12


def test_samples_depend_on_no_other_problem_and_on_no_batch(
    rewarder: Rewarder, prompts: list[Prompt]
) -> None:
    whole = evaluate(sampling_of(4), random_engine(), rewarder, prompts)
    turned = evaluate(sampling_of(4), random_engine(batch_size=3), rewarder, prompts[::-1])
    assert texts_of(turned) == texts_of(whole)[::-1]
    fewer = evaluate(sampling_of(2), random_engine(), rewarder, prompts[:1])
    assert texts_of(fewer) == [texts_of(whole)[0][:2]]


class Reciting:
    """An engine with a fixed answer for each sample of each problem."""

    name = "reciting"
    version = "1"

    def __init__(self, *texts: Sequence[str]) -> None:
        self.texts = texts

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """The last request first: the order is undefined."""
        assert sampling == Sampling(temperature=1.0, top_p=0.9, top_k=0, max_tokens=24)
        for request in reversed(requests):
            problem, sample = map(int, request.request_id.split("/"))
            text = self.texts[problem][sample]
            yield Completion(
                request_id=request.request_id,
                token_ids=(7,) * len(text),
                logprobs=(0.0,) * len(text),
                finish_reason="length" if text.endswith("...") else "stop",
                text=text,
            )

    def close(self) -> None:
        pass


def test_an_evaluation_by_hand(rewarder: Rewarder, prompts: list[Prompt]) -> None:
    right, wrong = "\\boxed{2}", "\\boxed{3}"  # 9 characters each; the second problem's gold answer is 2
    engine = Reciting([wrong] * 4, [wrong, right, wrong, right + "..."], ["\\boxed{4}"] * 4)
    found = evaluate(sampling_of(4, (2, 4)), engine, rewarder, prompts)
    # Right: 0, 1 (the cut one is never right) and 4 of 4.
    right_ones = [sample.is_correct for sample in found.samples]
    assert right_ones == [False] * 4 + [False, True, False, False] + [True] * 4
    assert found.metrics == pytest.approx(
        {
            "eval/avg@4": 5 / 12,
            "eval/pass@1": 5 / 12,  # (0 + 1/4 + 1) / 3; there although k = (2, 4)
            "eval/pass@2": 0.5,  # (0 + 1/2 + 1) / 3
            "eval/pass@4": 2 / 3,  # (0 + 1 + 1) / 3
            "eval/mean_length": (12 * 9 + 3) / 12,
            "eval/cut_share": 1 / 12,
        }
    )


def test_intervals_by_hand() -> None:
    # Five of ten solved: a bootstrap mean is Binomial(10, 1/2) / 10. P(X <= 1) = 11/1024 = 0.011 and
    # P(X <= 2) = 56/1024 = 0.055, so the 2.5 % quantile is 2 of 10, and by symmetry the 97.5 % one 8 of 10.
    found = mean_with_interval([1.0] * 5 + [0.0] * 5)
    assert (found.value, found.low, found.high) == (0.5, 0.2, 0.8)
    # Means 0, 0.3 and 0.6 with probabilities 1/4, 1/2, 1/4.
    found = mean_with_interval([0.0, 0.6])
    assert (found.value, found.low, found.high) == (0.3, 0.0, 0.6)
    assert mean_with_interval([0.25, 0.25]) == Estimate(value=0.25, low=None, high=None)


@given(values=st.lists(st.integers(0, 8).map(lambda correct: correct / 8), min_size=2, max_size=30))
def test_an_interval_lies_within_the_values_and_its_seed_is_fixed(values: list[float]) -> None:
    found = mean_with_interval(values)
    if min(values) == max(values):
        assert (found.low, found.high) == (None, None)
        return
    assert found.low is not None
    assert found.high is not None
    assert min(values) - 1e-9 <= found.low < found.high <= max(values) + 1e-9
    assert found == mean_with_interval(values)


def sourced(prompt: Prompt, source: str, repeats: int = 1) -> Prompt:
    return replace(prompt, problem=replace(prompt.problem, source=source, repeats=repeats))


def test_sources_are_scored_separately_and_a_repeated_problem_gets_as_many_samples(
    rewarder: Rewarder, prompts: list[Prompt]
) -> None:
    right, wrong = "\\boxed{2}", "\\boxed{3}"
    chosen = [
        sourced(prompts[0], "aime", repeats=4),
        sourced(prompts[1], "aime", repeats=2),
        sourced(prompts[2], "math"),
    ]
    # Gold answers 0, 2 and 4; two samples each are asked for. Right are 0 of 4, 1 of 2 and 1 of 2.
    engine = Reciting([wrong] * 4, [wrong, right], ["\\boxed{4}", wrong])
    found = evaluate(sampling_of(2, (1, 2)), engine, rewarder, chosen)
    aime, math = found.sources["aime"], found.sources["math"]
    assert (aime.problems, math.problems, len(found.samples)) == (2, 1, 8)
    assert aime.pass_at[1].value == 0.25  # (0 + 1/2) / 2: problems weigh the same, however many samples
    assert aime.pass_at[2].value == 0.5  # (0 + 1) / 2
    assert math.pass_at[1].value == 0.5
    assert found.overall.pass_at[1].value == pytest.approx(1 / 3)  # (0 + 1/2 + 1/2) / 3
    assert found.mean_of_sources == {"pass@1": 0.375, "pass@2": 0.75}  # (1/4 + 1/2) / 2, (1/2 + 1) / 2
    assert found.metrics["eval/aime/pass@1"] == 0.25
    one = [sourced(prompt, "math") for prompt in prompts]
    alone = evaluate(sampling_of(1), Reciting(["a"], ["b"], ["c"]), rewarder, one)
    assert (alone.sources, alone.mean_of_sources) == ({}, {})
