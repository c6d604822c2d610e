"""Groups and rewards: failure is a boolean, one rule rewards all. Real verifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_examples import prompt_of, sample_of

import trainer.variants  # noqa: F401  enters more rewards
from precompute.config import VerifyConfig
from precompute.config_file import load_config, toml_of
from precompute.verify.verifier import Verdict, Verifier
from store.errors import ConfigError
from store.records import AnswerForm, Problem
from trainer.config import DEFAULT_REWARDS, Config
from trainer.method.groups import Group, Rewarder, Sample

PROBLEM = Problem(question="2+2", answer="4")


def test_a_high_reward_is_no_success() -> None:
    # Format alone may pay; a failed group stays a failed group whatever the weights are.
    failed = Group(prompt=prompt_of(PROBLEM), samples=(sample_of(0.9, is_correct=False), sample_of()))
    assert failed.n_correct == 0


def test_a_group_trains_something_as_soon_as_two_members_earn_differently() -> None:
    failed = (sample_of(), sample_of())
    assert not Group(prompt=prompt_of(PROBLEM), samples=failed).has_gradient
    trace = sample_of(1.0, trace_id="t")
    guided = Group(prompt=prompt_of(PROBLEM), samples=failed, guidance={1: trace})
    assert guided.has_gradient
    assert guided.members == (failed[0], trace)
    assert guided.n_correct == 0  # counted before replacement


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifyConfig(workers=1)) as opened:
        yield opened


def rewarded(
    verifier: Verifier,
    text: str,
    *,
    form: AnswerForm = "boxed",
    weights: Mapping[str, float] = DEFAULT_REWARDS,
    opens_think: bool = False,
    **changes: Any,
) -> Sample:
    """The sample of a response to a problem whose gold answer is 4."""
    rewarder = Rewarder(verifier, max_length=500, weights=weights)
    prompt = replace(prompt_of(PROBLEM, opens_think=opens_think), answer_form=form)
    fields: dict[str, Any] = {"token_ids": (7, 8, 1), "finish_reason": "stop", **changes}
    made = Sample(text=text, **fields)
    return rewarder.reward(prompt, made, rewarder.verify(prompt, made))


def outcome(sample: Sample) -> tuple[bool, bool, float]:
    return sample.is_correct, sample.has_format, round(sample.reward, 12)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("so \\boxed{4}", {}, (True, True, 1.0)),  # 0.9 * 1 + 0.1 * 1
        ("so \\boxed{\\frac{8}{2}}", {}, (True, True, 1.0)),  # equal as mathematics, not as text
        ("so \\boxed{5}", {}, (False, True, 0.1)),
        ("so it is 4", {}, (False, False, 0.0)),
        ("so \\boxed{4", {}, (False, False, 0.0)),  # never closed: no answer
        # Of two answers the last decides, and the format is lost.
        ("\\boxed{3}, no: \\boxed{4}", {}, (True, False, 0.9)),
        ("\\boxed{4}, no: \\boxed{3}", {}, (False, False, 0.0)),
        # The right answer in another form is correct without the format's share.
        ("so <answer>4</answer>", {}, (True, False, 0.9)),
        ("so <answer>4</answer>", {"form": "answer_tags"}, (True, True, 1.0)),
        ("so \\boxed{4}", {"form": "answer_tags"}, (True, False, 0.9)),
        # A cut response earns nothing although it holds the right answer.
        ("so \\boxed{4} and", {"finish_reason": "length"}, (False, False, 0.0)),
        # An answer inside the thought that the prompt opened neither counts nor costs the format.
        ("so \\boxed{4}", {"opens_think": True}, (False, False, 0.0)),
        ("\\boxed{3}?</think>so \\boxed{4}", {"opens_think": True}, (True, True, 1.0)),
        ("so \\boxed{4}", {"weights": {"correct": 0.75, "format": 0.0}}, (True, True, 0.75)),
    ],
)
def test_reward_of_a_response(
    verifier: Verifier, text: str, options: dict[str, Any], expected: tuple[bool, bool, float]
) -> None:
    assert outcome(rewarded(verifier, text, **options)) == expected


def test_a_sample_keeps_its_origin(verifier: Verifier) -> None:
    origin: dict[str, Any] = {"logprobs": (-0.5, -0.25, 0.0), "trace_id": "t1", "teacher": "ada"}
    assert rewarded(verifier, "so \\boxed{4}", **origin) == Sample(
        token_ids=(7, 8, 1),
        text="so \\boxed{4}",
        length_share=3 / 500,
        finish_reason="stop",
        is_correct=True,
        has_format=True,
        rewards={"correct": 1.0, "format": 1.0},
        reward=1.0,
        **origin,
    )


def brevity(problem: Problem, completion: Sample, verdict: Verdict | None) -> float:
    """A user's reward: minus a tenth of the tokens; 100 for the answer 4 as the verifier read it."""
    return (100.0 if verdict and verdict.answer == problem.answer else 0.0) - len(completion.token_ids) / 10


def test_a_reward_of_the_users_own_weighs_in_and_does_not_decide_about_failure(verifier: Verifier) -> None:
    weights = {**DEFAULT_REWARDS, "test_trainer_groups:brevity": 0.5}
    right = rewarded(verifier, "so \\boxed{4}", weights=weights)
    assert right.reward == pytest.approx(1.0 + 0.5 * (100 - 0.3))
    assert right.rewards["brevity"] == pytest.approx(99.7)
    cut = rewarded(verifier, "so \\boxed{4}", weights=weights, finish_reason="length")
    assert (cut.is_correct, cut.reward) == (False, pytest.approx(-0.15))


def test_rewards_of_the_config_keep_the_others_defaults_and_are_read_back(tmp_path: Path) -> None:
    config = Config.model_validate({"rewards": {"my/file.py:f": 0.2}})
    assert config.rewards == {"correct": 0.9, "format": 0.1, "my/file.py:f": 0.2}
    (tmp_path / "config.toml").write_text(toml_of(config))
    assert load_config(Config, str(tmp_path / "config.toml"), []) == config


def test_an_unknown_reward_is_refused_with_the_known_ones(verifier: Verifier) -> None:
    with pytest.raises(ConfigError, match=r"rewards = 'typo': give one of correct, format, .*, or module"):
        rewarded(verifier, "", weights={"typo": 1.0})


def test_verdicts_come_back_to_their_own_samples_in_any_order(verifier: Verifier) -> None:
    rewarder, prompt = Rewarder(verifier, max_length=500, weights=DEFAULT_REWARDS), prompt_of(PROBLEM)
    samples = [Sample(text=f"\\boxed{{{n}}}", token_ids=(n,), finish_reason="stop") for n in range(8)]
    pending = [rewarder.verify(prompt, each) for each in samples]
    settled = {n: rewarder.reward(prompt, samples[n], pending[n]) for n in reversed(range(8))}
    assert [n for n, sample in settled.items() if sample.is_correct] == [4]
    assert all(sample.token_ids == (n,) for n, sample in settled.items())


@pytest.mark.parametrize(
    ("name", "text", "tokens", "value"),
    [
        ("length", "so \\boxed{4}", 100, 0.8),  # 1 - 100 / 500
        ("overlong", "so \\boxed{4}", 400, 0.0),  # up to 80 % nothing
        ("overlong", "so \\boxed{4}", 450, -0.5),  # (0.9 - 0.8) / 0.2
        ("overlong", "so \\boxed{4}", 500, -1.0),
        # 40 words give 21 20-grams of one kind: 20 of 21 are repeated.
        ("repetition", "a " * 40, 40, -20 / 21),
        ("repetition", "so \\boxed{4}", 3, 0.0),
        # 2 of 6 letters are Cyrillic; the question has none, so Latin is right.
        ("language", "four да", 4, 4 / 6),
    ],
)
def test_further_rewards_by_name(verifier: Verifier, name: str, text: str, tokens: int, value: float) -> None:
    sample = rewarded(verifier, text, token_ids=(7,) * tokens, weights={"correct": 1.0, name: 0.5})
    assert sample.rewards[name] == pytest.approx(value)
    assert sample.reward == pytest.approx(sample.is_correct + 0.5 * value)
