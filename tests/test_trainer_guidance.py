"""Guidance: which groups are queried, what is ranked, replaced and logged. Real store, real verifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, token_logprobs
from run_examples import prompt_of, sample_of, teacher, trace

from precompute.config import VerifyConfig
from precompute.verify.verifier import MATH_VERSIONS, Verifier
from store.errors import ConfigError
from store.reader import TraceStore
from store.records import Problem
from store.writer import StoreWriter
from trainer.config import DEFAULT_REWARDS, Config, GuidanceConfig, RolloutConfig, TrainConfig
from trainer.method.groups import Group, Rewarder
from trainer.method.guidance import (
    Guide,
    Scorer,
    comprehension_scores,
    guidance_size,
    mean_probability_scores,
)
from trainer.method.teacher_traces import Candidate
from trainer.run.setup import trace_reader
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter

MakeGuide = Callable[..., Guide]
PROBLEMS = [Problem(question=f"{n}+1", answer=str(n + 1)) for n in range(3)]
TEXTS = {
    "ada": "one by one we get \\boxed{%s}",
    "bob": "so \\boxed{%s}",
    "eve": "as everyone knows who has ever counted on fingers, it is \\boxed{%s}",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceStore]:
    """Three teachers solved problem 0, bob alone problem 1, nobody problem 2."""
    path = tmp_path_factory.mktemp("guidance") / "traces"
    with StoreWriter.open(path, verifiers=MATH_VERSIONS) as writer:
        writer.write_problems(PROBLEMS)
        for name in TEXTS:
            writer.register_teacher(teacher(name))
        for name, text in TEXTS.items():
            writer.append([trace(PROBLEMS[0], name, text % PROBLEMS[0].answer)])
        writer.append([trace(PROBLEMS[1], "bob", TEXTS["bob"] % PROBLEMS[1].answer)])
    with TraceStore(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def rewarder() -> Iterator[Rewarder]:
    with Verifier(VerifyConfig(workers=1)) as verifier:
        yield Rewarder(verifier, max_length=500, weights=DEFAULT_REWARDS)


def group(problem: Problem, correct: tuple[bool, ...] = (False,) * 4) -> Group:
    samples = tuple(sample_of(0.9 * is_correct, has_format=False) for is_correct in correct)
    prompt_ids = tuple(tiny_tokenizer()(f"<user>{problem.question}<assistant>")["input_ids"])
    return Group(prompt=prompt_of(problem, prompt_ids), samples=samples)


@pytest.fixture
def guide_of(store: TraceStore, rewarder: Rewarder) -> MakeGuide:
    """Makes a Guide over the store by keys of `guidance`."""

    def make(*, max_length: int = 200, max_tokens: int = 120, **changes: Any) -> Guide:
        config = Config(
            guidance=GuidanceConfig(**changes),
            rollout=RolloutConfig(max_completion_length=max_length),
            train=TrainConfig(max_tokens_per_microbatch=max_tokens),
        )
        policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
        return Guide(config, trace_reader(config, store, policy, TrainReporter()), policy, rewarder)

    return make


def test_only_groups_in_which_all_failed_are_queried(guide_of: MakeGuide) -> None:
    groups = [group(PROBLEMS[0], (True, False, False, False)), group(PROBLEMS[1]), group(PROBLEMS[2])]
    guided, rows = guide_of().guide(groups, step=7)
    assert {row.problem_id for row in rows} == {PROBLEMS[1].problem_id, PROBLEMS[2].problem_id}
    assert guided[0] is groups[0]
    assert [member.teacher for member in guided[1].members if member.is_teacher] == ["bob"]
    assert {row.step for row in rows} == {7}


def test_a_problem_without_a_candidate_has_one_row_with_nulls(guide_of: MakeGuide) -> None:
    guided, rows = guide_of().guide([group(PROBLEMS[2])], step=1)
    assert not guided[0].guidance
    assert [(row.trace_id, row.teacher, row.score, row.rank, row.selected) for row in rows] == [
        (None, None, None, None, False)
    ]


@torch.no_grad()
def test_scores_are_mean_log_probabilities_of_the_gold_answer_after_reading(guide_of: MakeGuide) -> None:
    guide = guide_of()
    _, rows = guide.guide([group(PROBLEMS[0])], step=1)
    asked = group(PROBLEMS[0])
    for row in rows:
        assert row.teacher is not None
        reasoning = TEXTS[row.teacher].split("%s")[0]
        encode = guide.policy.tokenizer
        reasoning_ids = encode(reasoning, add_special_tokens=False)["input_ids"]
        (answer_id,) = encode(PROBLEMS[0].answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*asked.prompt.ids, *reasoning_ids, answer_id]])
        expected = float(token_logprobs(guide.policy.model(ids).logits, ids)[0, -1])
        assert row.score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("written", ["1.0", "$1$", "\\boxed{1}", "01"])
def test_scores_do_not_depend_on_how_a_gold_number_is_written(guide_of: MakeGuide, written: str) -> None:
    guide, plain = guide_of(), group(PROBLEMS[0])
    assert guide.traces is not None
    found = guide.traces.query([plain.prompt])[plain.problem_id]
    scores = []
    for answer in (PROBLEMS[0].answer, written):
        prompt = replace(plain.prompt, problem=replace(plain.prompt.problem, answer=answer))
        traces = [replace(trace, problem_id=prompt.problem.problem_id) for trace in found]
        candidates = guide.traces.candidates(prompt, traces)
        asked = replace(plain, prompt=prompt)
        scores.append(Scorer(guide, [asked], {asked.problem_id: candidates})(candidates))
    assert scores[0] == scores[1]


def test_the_best_scores_are_placed_and_ranked(guide_of: MakeGuide) -> None:
    guided, rows = guide_of().guide([group(PROBLEMS[0])], step=1)
    scores = [row.score for row in rows if row.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert [row.rank for row in rows] == [1, 2, 3]
    assert [row.selected for row in rows] == [True, True, False]  # k0 = 2
    placed = {member.trace_id for member in guided[0].members if member.is_teacher}
    assert placed == {row.trace_id for row in rows if row.selected}
    assert all(math.isfinite(score) for score in scores)


def test_exact_ties_go_to_the_shorter_trace(guide_of: MakeGuide) -> None:
    guide = guide_of(k=1)
    guide.policy.model.lm_head.weight.data.zero_()  # every token equally likely: every score ln(1/V)
    guide.policy.model.model.embed_tokens.weight.data.zero_()
    _, rows = guide.guide([group(PROBLEMS[0])], step=1)
    assert len({row.score for row in rows}) == 1
    assert [row.teacher for row in rows] == ["bob", "ada", "eve"]


def test_nothing_is_scored_where_every_candidate_is_placed_or_none(guide_of: MakeGuide) -> None:
    guide, passes = guide_of(k=3), []
    guide.policy.model.model.register_forward_hook(lambda *_: passes.append(1))
    # G = 4 lets all three traces in, the shortest first.
    guided, rows = guide.guide([group(PROBLEMS[0]), group(PROBLEMS[1])], step=1)
    assert [(row.teacher, row.score, row.rank, row.selected) for row in rows] == [
        ("bob", None, 1, True),
        ("ada", None, 2, True),
        ("eve", None, 3, True),
        ("bob", None, 1, True),
    ]
    assert [len(each.guidance) for each in guided] == [3, 1]
    guide.config = Config(guidance=GuidanceConfig(k=3, trigger="always"))
    _, rows = guide.guide([group(PROBLEMS[0], (True,) * 4)], step=1)
    assert {row.selected for row in rows} == {False}
    assert not passes
    # With two failed samples one of the three stays out: now it matters which.
    _, rows = guide.guide([group(PROBLEMS[0], (True, True, False, False))], step=1)
    assert passes
    assert all(row.score is not None for row in rows)
    assert [row.selected for row in rows] == [True, True, False]


def test_shortest_takes_the_shortest_and_scores_nothing(guide_of: MakeGuide) -> None:
    _, rows = guide_of(select="shortest", k=1).guide([group(PROBLEMS[0])], step=1)
    assert [(row.teacher, row.selected, row.score) for row in rows] == [
        ("bob", True, None),
        ("ada", False, None),
        ("eve", False, None),
    ]


def test_random_selection_differs_by_step_and_repeats_itself(guide_of: MakeGuide) -> None:
    guide = guide_of(select="random", k=1)
    first = [guide.guide([group(PROBLEMS[0])], step=step)[1][0].teacher for step in range(1, 13)]
    again = [guide.guide([group(PROBLEMS[0])], step=step)[1][0].teacher for step in range(1, 13)]
    assert first == again
    assert len(set(first)) == 3


def test_a_trace_that_does_not_fit_is_left_out_and_never_cut(guide_of: MakeGuide) -> None:
    # bob: 3 + 8 + 1 + EOS = "so \boxed{1}" has 12 characters and an EOS: 13 tokens.
    _, rows = guide_of(max_length=13).guide([group(PROBLEMS[0])], step=1)
    assert [(row.teacher, row.n_tokens) for row in rows] == [("bob", 13)]
    _, rows = guide_of(max_length=12).guide([group(PROBLEMS[0])], step=1)
    assert [row.trace_id for row in rows] == [None]


def test_a_trace_in_another_form_is_mapped_to_the_students(guide_of: MakeGuide) -> None:
    demanding_tags = group(PROBLEMS[1])
    prompt = replace(demanding_tags.prompt, answer_form="answer_tags")
    guided, _ = guide_of().guide([replace(demanding_tags, prompt=prompt)], step=1)
    (placed,) = guided[0].guidance.values()
    assert placed.text == "so <answer>2</answer>"
    assert placed.is_correct
    assert placed.has_format


def test_shaped_ratio_trains_on_the_teachers_own_tokens(guide_of: MakeGuide) -> None:
    guided, _ = guide_of(loss="shaped_ratio").guide([group(PROBLEMS[1])], step=1)
    (placed,) = guided[0].guidance.values()
    assert placed.logprobs == tuple(-0.5 for _ in placed.token_ids)
    assert len(placed.token_ids) == 13


def test_a_non_finite_score_stops_and_names_the_culprit(guide_of: MakeGuide) -> None:
    guide = guide_of()
    guide.policy.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=PROBLEMS[0].problem_id):
        guide.guide([group(PROBLEMS[0])], step=1)


def test_places_and_scores_do_not_depend_on_the_token_budget(guide_of: MakeGuide) -> None:
    wide, narrow = guide_of(), guide_of(max_tokens=1)
    a = wide.guide([group(p) for p in PROBLEMS], step=3)
    b = narrow.guide([group(p) for p in PROBLEMS], step=3)
    assert [g.guidance.keys() for g in a[0]] == [g.guidance.keys() for g in b[0]]
    for left, right in zip(a[1], b[1], strict=True):
        assert (left.trace_id, left.rank) == (right.trace_id, right.rank)
        assert left.score == pytest.approx(right.score, rel=1e-5) if left.score else right.score is None


def longest(group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random) -> list[Candidate]:
    """A user's selector that scores nothing and leaves the shortest candidate out."""
    return sorted(candidates, key=lambda c: -len(c.token_ids))[:-1]


def worst(group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random) -> list[Candidate]:
    """A user's selector by score, lowest first."""
    scores = scorer(candidates)
    return [c for _, c in sorted(zip(scores, candidates, strict=True), key=lambda pair: pair[0])]


def test_a_selector_of_the_users_own_may_leave_candidates_out(guide_of: MakeGuide) -> None:
    _, rows = guide_of(select="test_trainer_guidance:longest").guide([group(PROBLEMS[0])], step=1)
    assert [(row.teacher, row.rank, row.selected, row.score) for row in rows] == [
        ("eve", 1, True, None),
        ("ada", 2, True, None),
        ("bob", None, False, None),
    ]


def test_a_selector_of_the_users_own_gets_scores_in_one_pass_over_the_step(guide_of: MakeGuide) -> None:
    best, passes = guide_of(k=1), []
    groups = [group(PROBLEMS[0]), group(PROBLEMS[1])]
    by_score = {row.teacher: row.score for row in best.guide(groups, step=1)[1][:3]}
    guide = guide_of(k=1, max_tokens=10_000, select="test_trainer_guidance:worst")
    guide.policy.model.model.register_forward_hook(lambda *_: passes.append(1))
    _, rows = guide.guide(groups, step=1)
    assert [row.teacher for row in rows[:3]] == sorted(by_score, key=by_score.get)  # type: ignore[arg-type]
    assert [row.selected for row in rows] == [True, False, False, True]
    # Group 0 has to choose: one pass. Group 1 uses its only candidate, which `worst` scores nevertheless.
    assert len(passes) == 2
    assert rows[3].score is not None


def half(group: Group, config: GuidanceConfig, rng: Random) -> bool:
    """A user's trigger."""
    return group.n_correct <= len(group.samples) // 2


def test_a_trigger_of_the_users_own(guide_of: MakeGuide) -> None:
    guide = guide_of(trigger="test_trainer_guidance:half")
    groups = [
        group(PROBLEMS[0], (True, True, False, False)),
        group(PROBLEMS[1], (True, True, True, False)),
    ]
    assert {row.problem_id for row in guide.guide(groups, step=1)[1]} == {PROBLEMS[0].problem_id}


@pytest.mark.parametrize("key", ["trigger", "select"])
def test_an_unknown_name_is_refused_with_the_known_ones(guide_of: MakeGuide, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"guidance\.{key} = 'typo': give one of .*, or module:function"):
        guide_of(**{key: "typo"}).guide([group(PROBLEMS[0])], step=1)


@pytest.mark.parametrize(
    ("correct", "candidates", "k", "expected"),
    [
        ((False,) * 8, 4, 2, 2),  # k0
        ((False,) * 8, 1, 2, 1),  # no more than there are
        ((False,) * 3, 9, 5, 2),  # G - 1: a sample of the student's own stays
        ((True, True, True, False), 4, 2, 1),  # `always`: only failed samples are replaced
        ((True, True), 4, 2, 0),
    ],
)
def test_how_many_traces_enter_a_group(
    correct: tuple[bool, ...], candidates: int, k: int, expected: int
) -> None:
    assert guidance_size(group(PROBLEMS[0], correct), candidates, GuidanceConfig(k=k)) == expected


def test_failed_samples_alone_are_replaced_at_random_indices_that_a_seed_fixes(guide_of: MakeGuide) -> None:
    guide = guide_of(trigger="always", select="shortest", k=1)
    before = group(PROBLEMS[0], (False, True, False, False, True, False, False, False))
    indices = []
    for step in range(20):
        (after,), _ = guide.guide([before], step=step)
        assert after == guide.guide([before], step=step)[0][0]
        assert after.samples == before.samples
        indices += after.guidance
    assert set(indices) <= {0, 2, 3, 5, 6, 7}
    assert len(set(indices)) > 3


# Answers of 2 and 1 tokens; the 0.9s are on reasoning and padding and must not count.
LOGPROBS = torch.log(torch.tensor([[0.9, 0.5, 0.125], [0.9, 0.25, 0.9]]))
MASK = torch.tensor([[False, True, True], [False, True, False]])


def test_the_score_is_the_mean_log_probability_of_the_answer() -> None:
    # (ln 1/2 + ln 1/8) / 2 = ln 1/4; ln 1/4: so a tie between the two.
    found = comprehension_scores(LOGPROBS, MASK)
    assert found.tolist() == pytest.approx([math.log(0.25), math.log(0.25)])
    assert comprehension_scores(LOGPROBS, MASK.long()).equal(found)


def test_mean_prob_averages_probabilities_instead() -> None:
    # (1/2 + 1/8) / 2 = 0.3125; 0.25: no tie here.
    assert mean_probability_scores(LOGPROBS, MASK).exp().tolist() == pytest.approx([0.3125, 0.25])


def test_near_scores_are_not_rounded_together() -> None:
    # bfloat16 has 8 bits of mantissa: it would make these two equal.
    scores = comprehension_scores(torch.tensor([[-1.0001], [-1.0]]), torch.tensor([[True], [True]]))
    assert scores[0] < scores[1]
