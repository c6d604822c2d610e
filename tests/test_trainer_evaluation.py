"""Evaluation: the unbiased pass@k by hand and by brute force, and what a whole evaluation says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from precompute.engines import Completion, Request, Sampling
from precompute.engines.transformers_engine import TransformersEngine
from precompute.verify import Verifier
from store.records import Problem
from trainer.config import EvalConfig, RolloutConfig, StudentConfig
from trainer.evaluation import Evaluation, eval_sampling, evaluate, pass_at_k
from trainer.rewards import Judge
from trainer.rollout import Prompt, student_prompts

PROBLEMS = [Problem(question=f"{n}+{n}", answer=str(2 * n)) for n in range(3)]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=24)


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (4, 1, 1, 0.25),  # 1 - 3/4
        (4, 1, 2, 0.5),  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        (4, 1, 4, 1.0),  # all four are drawn, the right one with them: C(3, 4) = 0
        (5, 2, 2, 0.7),  # 1 - C(3, 2) / C(5, 2) = 1 - 3/10
        (5, 2, 3, 0.9),  # 1 - C(3, 3) / C(5, 3) = 1 - 1/10
        (8, 0, 8, 0.0),
        (8, 8, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(samples: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(samples=samples, correct=correct, k=k) == pytest.approx(expected)


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_sample(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(combinations([True] * correct + [False] * (samples - correct), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(samples=samples, correct=correct, k=k) == pytest.approx(share)


@given(sizes=st.lists(st.integers(1, 300), min_size=2, max_size=2), share=st.floats(0, 1))
def test_pass_at_k_is_a_chance_and_grows_with_k_and_with_what_is_right(
    sizes: list[int], share: float
) -> None:
    k, samples = sorted(sizes)
    correct = round(share * samples)
    here = pass_at_k(samples=samples, correct=correct, k=k)
    assert 0 <= here <= 1
    assert (here == 0) == (correct == 0)
    if k < samples:
        assert pass_at_k(samples=samples, correct=correct, k=k + 1) >= here
    if correct < samples:
        assert pass_at_k(samples=samples, correct=correct + 1, k=k) >= here


@pytest.mark.parametrize(
    ("samples", "correct", "k"),
    [
        (4, 1, 5),  # more are drawn than there are: no unbiased estimate
        (4, 1, 0),
        (4, 5, 2),
        (4, -1, 2),
        (0, 0, 1),
    ],
)
def test_a_pass_at_k_that_does_not_exist_is_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"pass@{k} of {correct} correct in {samples} samples"):
        pass_at_k(samples=samples, correct=correct, k=k)


def test_evaluations_sample_at_their_own_temperature_and_the_rollouts_length() -> None:
    found = eval_sampling(
        EvalConfig(temperature=0.3, top_p=0.9),
        RolloutConfig(temperature=0.7, top_p=0.5, top_k=5, max_completion_length=77),
    )
    assert found == Sampling(temperature=0.3, top_p=0.9, top_k=0, max_tokens=77)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Verifier(workers=1) as verifier:
        yield Judge(verifier, answer_form="boxed", format_weight=0.1)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    found, _ = student_prompts(
        PROBLEMS, tiny_tokenizer(), StudentConfig(system_prompt=""), max_prompt_length=64
    )
    return found


def random_engine(*, batch_size: int = 64) -> TransformersEngine:
    return TransformersEngine(tiny_model(), tiny_tokenizer(), batch_size=batch_size)


def drawn(evaluation: Evaluation) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in group.samples] for group in evaluation.groups]


def test_the_same_seed_draws_the_same_samples_again_and_another_seed_others(
    judge: Judge, prompts: list[Prompt]
) -> None:
    engine = random_engine()
    first, again, other = (
        evaluate(engine, judge, prompts, SAMPLING, samples=4, k=(1, 4), seed=seed) for seed in (0, 0, 1)
    )
    assert drawn(first) == drawn(again)
    assert first.metrics == again.metrics
    assert drawn(first) != drawn(other)
    # Each sample has a seed of its own: 3 problems x 4 samples, and no two alike.
    assert len({ids for group in drawn(first) for ids in group}) == 12


def test_a_problems_samples_depend_on_no_other_problem_and_on_no_batch(
    judge: Judge, prompts: list[Prompt]
) -> None:
    whole = evaluate(random_engine(), judge, prompts, SAMPLING, samples=4, k=(1,), seed=0)
    turned = evaluate(random_engine(batch_size=3), judge, prompts[::-1], SAMPLING, samples=4, k=(1,), seed=0)
    assert drawn(turned) == drawn(whole)[::-1]
    fewer = evaluate(random_engine(), judge, prompts[:1], SAMPLING, samples=2, k=(1,), seed=0)
    assert drawn(fewer) == [drawn(whole)[0][:2]]


def test_lengths_and_cuts_are_those_of_the_samples(judge: Judge, prompts: list[Prompt]) -> None:
    found = evaluate(random_engine(), judge, prompts, SAMPLING, samples=16, k=(1,), seed=0)
    ids = [ids for group in drawn(found) for ids in group]
    assert len(ids) == 48
    assert found.mean_length == pytest.approx(sum(map(len, ids)) / 48)
    cut = [sample for sample in ids if sample[-1] != 1]  # 1 is the EOS
    assert all(len(sample) == 24 for sample in cut)
    assert found.cut_share == pytest.approx(len(cut) / 48)
    assert 0 < found.cut_share < 1


class Reciting:
    """An engine that answers what it was given, sample by sample of each problem."""

    name = "reciting"
    version = "1"

    def __init__(self, *texts: Sequence[str]) -> None:
        self.texts = texts

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """The last request first: nobody may count on an order."""
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


def test_what_an_evaluation_says_by_hand(judge: Judge, prompts: list[Prompt]) -> None:
    right, wrong = "\\boxed{2}", "\\boxed{3}"  # 9 characters each; the second problem's gold answer is 2
    engine = Reciting([wrong] * 4, [wrong, right, wrong, right + "..."], ["\\boxed{4}"] * 4)
    found = evaluate(engine, judge, prompts, SAMPLING, samples=4, k=(2, 4), seed=0)
    # Right: 0, 1 (the cut one is never right) and 4 of 4.
    assert [[s.is_correct for s in group.samples] for group in found.groups] == [
        [False] * 4,
        [False, True, False, False],
        [True] * 4,
    ]
    assert found.metrics == pytest.approx(
        {
            "eval/avg@4": 5 / 12,
            "eval/pass@1": 5 / 12,  # (0 + 1/4 + 1) / 3; there although it was not asked for
            "eval/pass@2": 0.5,  # (0 + 1/2 + 1) / 3
            "eval/pass@4": 2 / 3,  # (0 + 1 + 1) / 3
            "eval/mean_length": (12 * 9 + 3) / 12,
            "eval/cut_share": 1 / 12,
        }
    )


def test_progress_counts_every_sample_up_to_the_whole(judge: Judge, prompts: list[Prompt]) -> None:
    seen: list[tuple[int, int]] = []
    engine = Reciting(["no"] * 2, ["no"] * 2, ["no"] * 2)
    evaluate(
        engine,
        judge,
        prompts,
        SAMPLING,
        samples=2,
        k=(1,),
        seed=0,
        on_sample=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]  # 3 problems x 2 samples
