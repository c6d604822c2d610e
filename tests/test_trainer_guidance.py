"""Guidance: who is asked, what is ranked, what is placed, what is logged. Real store, real verifier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import run_examples
import torch
from conftest import tiny_model, tiny_tokenizer

from precompute.verify.verifier import VERIFIER_NAME, VERIFIER_VERSION, Verifier
from store.errors import StoreError
from store.reader import TraceStore
from store.records import Problem, TeacherRecord, Trace
from store.writer import StoreWriter
from trainer.config import GuidanceConfig
from trainer.method.groups import Group, Sample
from trainer.method.guidance import Guide
from trainer.method.objective import token_logprobs
from trainer.method.rewards import Judge
from trainer.method.teacher_traces import Recent, check_tokenizers
from trainer.student.policy import Policy

PROBLEMS = [Problem(question=f"{n}+1", answer=str(n + 1)) for n in range(3)]
TEXTS = {
    "ada": "one by one we get \\boxed{%s}",
    "bob": "so \\boxed{%s}",
    "eve": "as everyone knows who has ever counted on fingers, it is \\boxed{%s}",
}


def teacher(name: str, fingerprint: str = "same") -> TeacherRecord:
    return replace(run_examples.teacher(name), tokenizer_fingerprint=fingerprint)


def trace(problem: Problem, name: str, text: str, **changes: Any) -> Trace:
    ids = (*tiny_tokenizer()(text, add_special_tokens=False)["input_ids"], 1)
    fields: dict[str, Any] = {
        "problem_id": problem.problem_id,
        "teacher": name,
        "sample_index": 0,
        "text": text,
        "answer": problem.answer,
        "answer_start": text.index("{") + 1,
        "n_tokens": len(ids),
        "token_ids": ids,
        "logprobs": tuple(-0.5 for _ in ids),
        "finish_reason": "stop",
        "verdict": "match",
        "is_correct": True,
        "seed": 0,
        "generation_fingerprint": teacher(name).generation_fingerprint,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Trace(**{**fields, **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceStore]:
    """Three teachers solved problem 0, bob alone problem 1, nobody problem 2."""
    path = tmp_path_factory.mktemp("guidance") / "traces"
    with StoreWriter.open(path, verifier=VERIFIER_NAME, verifier_version=VERIFIER_VERSION) as writer:
        writer.write_problems(PROBLEMS)
        for name in TEXTS:
            writer.register_teacher(teacher(name))
        for name, text in TEXTS.items():
            writer.append([trace(PROBLEMS[0], name, text % PROBLEMS[0].answer)])
        writer.append([trace(PROBLEMS[1], "bob", TEXTS["bob"] % PROBLEMS[1].answer)])
    with TraceStore(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Verifier(workers=1) as verifier:
        yield Judge(verifier, answer_form="boxed", format_weight=0.1)


def group(problem: Problem, correct: tuple[bool, ...] = (False,) * 4) -> Group:
    samples = tuple(
        Sample(
            token_ids=(9, 1),
            text="x",
            finish_reason="stop",
            is_correct=is_correct,
            has_format=False,
            reward=0.9 * is_correct,
        )
        for is_correct in correct
    )
    prompt_ids = tuple(tiny_tokenizer()(f"<user>{problem.question}<assistant>")["input_ids"])
    return Group(problem=problem, prompt_ids=prompt_ids, samples=samples)


def guide_of(store: Any, judge: Judge, *, max_length: int = 200, **config: Any) -> Guide:
    return Guide(
        GuidanceConfig(**config),
        store,
        Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32),
        judge,
        max_completion_length=max_length,
        max_tokens_per_microbatch=120,
        seed=0,
    )


def test_only_groups_in_which_all_failed_are_asked(store: TraceStore, judge: Judge) -> None:
    groups = [group(PROBLEMS[0], (True, False, False, False)), group(PROBLEMS[1]), group(PROBLEMS[2])]
    guided, rows = guide_of(store, judge).guide(groups, step=7)
    assert {row.problem_id for row in rows} == {PROBLEMS[1].problem_id, PROBLEMS[2].problem_id}
    assert guided[0] is groups[0]
    assert [member.teacher for member in guided[1].members if member.is_teacher] == ["bob"]
    assert {row.step for row in rows} == {7}


def test_a_problem_without_a_candidate_has_one_row_with_nulls(store: TraceStore, judge: Judge) -> None:
    guided, rows = guide_of(store, judge).guide([group(PROBLEMS[2])], step=1)
    assert not guided[0].guidance
    assert [(row.trace_id, row.teacher, row.score, row.rank, row.selected) for row in rows] == [
        (None, None, None, None, False)
    ]


def test_never_asks_nothing_and_needs_no_store(judge: Judge) -> None:
    groups = [group(PROBLEMS[0])]
    assert guide_of(None, judge, trigger="never").guide(groups, step=1) == (groups, [])


def test_always_places_a_trace_into_a_mixed_group_but_never_over_a_right_answer(
    store: TraceStore, judge: Judge
) -> None:
    mixed = group(PROBLEMS[0], (True, True, True, False))
    guided, rows = guide_of(store, judge, trigger="always").guide([mixed], step=1)
    assert list(guided[0].guidance) == [3]
    assert sum(row.selected for row in rows) == 1


def test_a_trace_earns_what_the_rule_gives_it(store: TraceStore, judge: Judge) -> None:
    guided, _ = guide_of(store, judge).guide([group(PROBLEMS[1])], step=1)
    (placed,) = guided[0].guidance.values()
    assert placed.is_correct
    assert placed.has_format
    assert placed.reward == pytest.approx(1.0)  # 0.9 * 1 + 0.1 * 1
    assert placed.token_ids[-1] == 1  # ends with the student's EOS


@torch.no_grad()
def test_scores_are_mean_log_probabilities_of_the_gold_answer_after_reading(
    store: TraceStore, judge: Judge
) -> None:
    guide = guide_of(store, judge)
    _, rows = guide.guide([group(PROBLEMS[0])], step=1)
    asked = group(PROBLEMS[0])
    for row in rows:
        assert row.teacher is not None
        reasoning = TEXTS[row.teacher].split("%s")[0]
        encode = guide.policy.tokenizer
        reasoning_ids = encode(reasoning, add_special_tokens=False)["input_ids"]
        (answer_id,) = encode(PROBLEMS[0].answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*asked.prompt_ids, *reasoning_ids, answer_id]])
        expected = float(token_logprobs(guide.policy.model(ids).logits, ids)[0, -1])
        assert row.score == pytest.approx(expected, rel=1e-4)


def test_the_best_scores_are_placed_and_ranked(store: TraceStore, judge: Judge) -> None:
    guided, rows = guide_of(store, judge).guide([group(PROBLEMS[0])], step=1)
    scores = [row.score for row in rows if row.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert [row.rank for row in rows] == [1, 2, 3]
    assert [row.selected for row in rows] == [True, True, False]  # k0 = 2
    placed = {member.trace_id for member in guided[0].members if member.is_teacher}
    assert placed == {row.trace_id for row in rows if row.selected}
    assert all(math.isfinite(score) for score in scores)


def test_exact_ties_go_to_the_shorter_trace(store: TraceStore, judge: Judge) -> None:
    guide = guide_of(store, judge, k=1)
    guide.policy.model.lm_head.weight.data.zero_()  # every token equally likely: every score ln(1/V)
    guide.policy.model.model.embed_tokens.weight.data.zero_()
    _, rows = guide.guide([group(PROBLEMS[0])], step=1)
    assert len({row.score for row in rows}) == 1
    assert [row.teacher for row in rows] == ["bob", "ada", "eve"]


def test_nothing_is_scored_where_every_candidate_is_placed_or_none(store: TraceStore, judge: Judge) -> None:
    guide, passes = guide_of(store, judge, k=3), []
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
    guide.config = GuidanceConfig(k=3, trigger="always")
    _, rows = guide.guide([group(PROBLEMS[0], (True,) * 4)], step=1)
    assert {row.selected for row in rows} == {False}
    assert not passes
    # With two failed samples one of the three stays out: now it matters which.
    _, rows = guide.guide([group(PROBLEMS[0], (True, True, False, False))], step=1)
    assert passes
    assert all(row.score is not None for row in rows)
    assert [row.selected for row in rows] == [True, True, False]


def test_shortest_takes_the_shortest_and_scores_nothing(store: TraceStore, judge: Judge) -> None:
    _, rows = guide_of(store, judge, select="shortest", k=1).guide([group(PROBLEMS[0])], step=1)
    assert [(row.teacher, row.selected, row.score) for row in rows] == [
        ("bob", True, None),
        ("ada", False, None),
        ("eve", False, None),
    ]


def test_random_selection_differs_by_step_and_repeats_itself(store: TraceStore, judge: Judge) -> None:
    guide = guide_of(store, judge, select="random", k=1)
    first = [guide.guide([group(PROBLEMS[0])], step=step)[1][0].teacher for step in range(12)]
    again = [guide.guide([group(PROBLEMS[0])], step=step)[1][0].teacher for step in range(12)]
    assert first == again
    assert len(set(first)) == 3


def test_a_trace_that_does_not_fit_is_left_out_and_never_cut(store: TraceStore, judge: Judge) -> None:
    # bob: 3 + 8 + 1 + EOS = "so \boxed{1}" has 12 characters and an EOS: 13 tokens.
    _, rows = guide_of(store, judge, max_length=13).guide([group(PROBLEMS[0])], step=1)
    assert [(row.teacher, row.n_tokens) for row in rows] == [("bob", 13)]
    _, rows = guide_of(store, judge, max_length=12).guide([group(PROBLEMS[0])], step=1)
    assert [row.trace_id for row in rows] == [None]


def test_only_the_teachers_that_the_config_names_are_asked(store: TraceStore, judge: Judge) -> None:
    _, rows = guide_of(store, judge, teachers=("eve",)).guide([group(PROBLEMS[0])], step=1)
    assert [row.teacher for row in rows] == ["eve"]


def test_traces_that_are_not_kept_change_nothing(store: TraceStore, judge: Judge) -> None:
    kept, forgetful = guide_of(store, judge), guide_of(store, judge)
    forgetful.traces._recent, forgetful._samples = Recent(capacity=0), Recent(capacity=0)
    for step in (1, 2):
        guided, rows = kept.guide([group(problem) for problem in PROBLEMS], step=step)
        same, same_rows = forgetful.guide([group(problem) for problem in PROBLEMS], step=step)
        assert guided == same
        assert [replace(r, latency_ms=0) for r in rows] == [replace(r, latency_ms=0) for r in same_rows]
    assert kept.traces._recent.tokens > forgetful.traces._recent.tokens == 0


def test_a_trace_in_another_form_is_mapped_to_the_students(store: TraceStore) -> None:
    with Verifier(workers=1) as verifier:
        tags = Judge(verifier, answer_form="answer_tags", format_weight=0.1)
        guided, _ = guide_of(store, tags).guide([group(PROBLEMS[1])], step=1)
    (placed,) = guided[0].guidance.values()
    assert placed.text == "so <answer>2</answer>"
    assert placed.is_correct
    assert placed.has_format


def test_the_teacher_ratio_trains_on_the_teachers_own_tokens(store: TraceStore, judge: Judge) -> None:
    guided, _ = guide_of(store, judge, ratio="teacher").guide([group(PROBLEMS[1])], step=1)
    (placed,) = guided[0].guidance.values()
    assert placed.logprobs == tuple(-0.5 for _ in placed.token_ids)
    assert len(placed.token_ids) == 13


def test_the_teacher_ratio_refuses_another_tokenizer_before_training() -> None:
    teachers = {"ada": teacher("ada"), "bob": teacher("bob", "other")}
    check_tokenizers(teachers, "same", ["ada"])
    with pytest.raises(StoreError, match="'bob'"):
        check_tokenizers(teachers, "same", [])


def test_a_score_that_is_not_a_number_stops_and_names_the_culprit(store: TraceStore, judge: Judge) -> None:
    guide = guide_of(store, judge)
    guide.policy.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=PROBLEMS[0].problem_id):
        guide.guide([group(PROBLEMS[0])], step=1)


def test_places_and_scores_do_not_depend_on_the_token_budget(store: TraceStore, judge: Judge) -> None:
    wide, narrow = guide_of(store, judge), guide_of(store, judge)
    narrow.max_tokens = 1
    a = wide.guide([group(p) for p in PROBLEMS], step=3)
    b = narrow.guide([group(p) for p in PROBLEMS], step=3)
    assert [g.guidance.keys() for g in a[0]] == [g.guidance.keys() for g in b[0]]
    for left, right in zip(a[1], b[1], strict=True):
        assert (left.trace_id, left.rank) == (right.trace_id, right.rank)
        assert left.score == pytest.approx(right.score, rel=1e-5) if left.score else right.score is None


def test_a_store_of_a_missing_path_says_so_whole(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=str(tmp_path / "none")):
        TraceStore(tmp_path / "none")
