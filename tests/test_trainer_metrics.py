"""A step's numbers, worked out by hand on small groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_examples import prompt_of, sample_of

from store.records import Problem
from trainer.method.groups import Group, Sample
from trainer.method.guidance import QueryRow
from trainer.telemetry.metrics import step_metrics

HARD, MIXED, LONELY = (Problem(question=f"{n}+{n}", answer=str(2 * n)) for n in range(3))
UPDATE = {
    "loss": -0.5,
    "grad_norm": 2.0,
    "entropy": 1.5,
    "mine": 0.25,
    "train_tokens": 30,
    "optimizer_steps": 2,
}


def sample(reward: float, length: int, *, cut: bool = False, trace_id: str | None = None) -> Sample:
    """w_f = 0.1: the reward tells what was correct and what had format."""
    has_format = reward in {0.1, 1.0}
    return sample_of(
        reward,
        token_ids=(7,) * length,
        finish_reason="length" if cut else "stop",
        has_format=has_format,
        rewards={"correct": float(reward >= 0.9), "format": float(has_format)},
        trace_id=trace_id,
        teacher="ada" if trace_id else None,
    )


def group(problem: Problem, *samples: Sample, guidance: dict[int, Sample] | None = None) -> Group:
    return Group(prompt=prompt_of(problem), samples=samples, guidance=guidance or {})


GUIDED = group(
    HARD,
    sample(0.0, 1),
    sample(0.0, 2),
    sample(0.0, 3),
    sample(0.0, 12, cut=True),
    guidance={1: sample(1.0, 50, trace_id="t1"), 3: sample(1.0, 70, trace_id="t2")},
)
"""All four failed with equal rewards; as it trains, its rewards are (0, 1, 0, 1)."""

GROUPS = [GUIDED, group(MIXED, sample(1.0, 5), sample(0.9, 5), sample(0.1, 5), sample(0.1, 9))]


def row(
    teacher: str | None, score: float | None, *, selected: bool = False, problem: Problem = HARD
) -> QueryRow:
    """A candidate, or a problem without one (`teacher` None)."""
    return QueryRow(
        step=3,
        problem_id=problem.problem_id,
        trace_id=teacher and f"{teacher}{score}",
        teacher=teacher,
        score=score,
        n_tokens=teacher and 9,  # type: ignore[arg-type]
        rank=teacher and 1,  # type: ignore[arg-type]
        selected=selected,
        latency_ms=12.5,
    )


ANSWERED = [
    row("ada", -0.2, selected=True),
    row("ada", -0.4, selected=True),
    row("bob", -0.9, selected=True),
    row("ada", -1.0),
    row("eve", -2.0),
]


def metrics(
    groups: Sequence[Group] = GROUPS, queries: Sequence[QueryRow] = (), update: Mapping[str, float] = UPDATE
) -> dict[str, Any]:
    return step_metrics(groups, queries, update)


def test_groups_are_counted_before_replacement() -> None:
    # GUIDED trains with two right answers in it, and still counts as all wrong.
    found = metrics()
    assert (found["groups/all_fail"], found["groups/mixed"], found["groups/all_solved"]) == (0.5, 0.5, 0.0)


def test_rewards_and_shares_are_the_students_own() -> None:
    found = metrics()
    # (0 + 0 + 0 + 0 + 1 + 0.9 + 0.1 + 0.1) / 8 = 2.1 / 8; with the two traces it would be 4.1 / 8.
    assert found["reward"] == pytest.approx(0.2625)
    # Correct, of eight: 1.0 and 0.9. Format: 1.0, 0.1 and 0.1.
    assert (found["accuracy"], found["format"]) == (0.25, 0.375)
    assert (found["rewards/correct"], found["rewards/format"]) == (0.25, 0.375)


def test_the_spread_of_rewards_is_the_mean_over_groups_of_the_sample_deviation() -> None:
    # GUIDED: 0. The other has mean 0.525: 0.475^2 + 0.375^2 + 2 * 0.425^2 = 0.7275; sqrt(0.7275 / 3).
    assert metrics()["reward_std"] == pytest.approx((0.7275 / 3) ** 0.5 / 2)
    # GUIDED counts as without spread, although guidance gave it one.
    assert metrics()["frac_reward_zero_std"] == 0.5


@given(
    reward=st.sampled_from([0.0, 0.1, 0.3, 0.7, 0.9, 1.0]),
    size=st.integers(2, 16),
)
def test_equal_rewards_have_no_spread_at_all(reward: float, size: int) -> None:
    # 0.1 is no binary fraction: a mean that differs from it in the last bit must not count as spread.
    found = metrics([group(HARD, *[sample(reward, 1) for _ in range(size)])])
    assert (found["reward_std"], found["frac_reward_zero_std"]) == (0.0, 1.0)


def test_lengths_are_of_what_the_student_wrote() -> None:
    found = metrics()
    # (1 + 2 + 3 + 12 + 5 + 5 + 5 + 9) / 8 = 42 / 8; the traces have 50 and 70 tokens.
    assert found["completions/mean_length"] == pytest.approx(5.25)
    assert found["completions/max_length"] == 12
    # The one that was cut was replaced by a trace: 1 of 8 all the same.
    assert found["completions/clipped_ratio"] == 0.125


def test_each_problem_that_was_queried_counts_once_however_many_candidates_came() -> None:
    # Two problems asked, in six rows; one had candidates.
    found = metrics(queries=[*ANSWERED, row(None, None, problem=LONELY)])
    assert (found["store/queries"], found["store/hit_rate"], found["store/no_trace"]) == (2, 0.5, 1)
    assert found["store/latency_ms"] == 12.5


def test_without_a_query_there_is_nothing_to_report() -> None:
    found = metrics(queries=[])
    assert (found["store/queries"], found["store/no_trace"]) == (0, 0)
    for name in ("hit_rate", "latency_ms"):
        assert found[f"store/{name}"] is None
    for name in ("selected_mean", "rejected_mean"):
        assert found[f"comprehension/{name}"] is None
    assert not [name for name in found if name.startswith("teacher/")]


def test_comprehension_of_what_was_placed_and_of_what_was_not() -> None:
    found = metrics(queries=ANSWERED)
    assert found["comprehension/selected_mean"] == pytest.approx(-0.5)  # (-0.2 - 0.4 - 0.9) / 3
    assert found["comprehension/rejected_mean"] == pytest.approx(-1.5)  # (-1.0 - 2.0) / 2


def test_what_was_placed_without_a_score_has_a_share_and_no_comprehension() -> None:
    found = metrics(queries=[row("bob", None, selected=True), row("ada", None)])
    assert (found["comprehension/selected_mean"], found["comprehension/rejected_mean"]) == (None, None)
    assert (found["teacher/bob/selected_share"], found["teacher/ada/selected_share"]) == (1.0, 0.0)


def test_shares_of_teachers_are_of_the_traces_used_in_this_step() -> None:
    found = metrics(queries=ANSWERED)
    shares = {name: value for name, value in found.items() if name.startswith("teacher/")}
    # Three were placed: two of ada's and one of bob's; eve offered one that was not.
    assert shares == {
        "teacher/ada/selected_share": pytest.approx(2 / 3),
        "teacher/bob/selected_share": pytest.approx(1 / 3),
        "teacher/eve/selected_share": 0.0,
    }
    # The next step's shares know nothing of this one's.
    assert metrics(queries=[row("bob", -1.0, selected=True)])["teacher/bob/selected_share"] == 1.0


def test_every_metric_of_the_update_is_in_the_line() -> None:
    found = metrics()
    renamed = {"entropy/trained" if name == "entropy" else name: value for name, value in UPDATE.items()}
    assert {name: found[name] for name in renamed} == renamed


def test_the_entropy_is_that_of_all_sampled_tokens_where_the_sampler_tells() -> None:
    # (0.5 + 1.5 + 4.0) / 3 over the tokens of a group without a gradient; the trace's tokens are no samples.
    failed = sample_of(0.0, logprobs=(-0.5, -1.5)), sample_of(0.0, logprobs=(-4.0,))
    silent = group(HARD, *failed, guidance={1: sample_of(1.0, logprobs=(-9.0,), trace_id="t1")})
    assert step_metrics([silent], [], {"entropy": 7.0})["entropy"] == pytest.approx(2.0)
    assert metrics()["entropy"] == 1.5  # samples without log-probs: of the tokens that trained


def test_a_step_without_an_optimizer_step_has_no_loss_rather_than_loss_0() -> None:
    found = metrics(update={"train_tokens": 0, "optimizer_steps": 0})
    assert [found[name] for name in ("loss", "grad_norm", "entropy")] == [None, None, None]
    assert (found["train_tokens"], found["optimizer_steps"]) == (0, 0)
