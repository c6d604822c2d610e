"""A teacher's trace as the student must write it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_examples import PROBLEMS, teacher, trace

from store.errors import StoreError
from store.records import Trace
from trainer.method.student_form import in_students_form


def trace_of(text: str, answer: str) -> Trace:
    made = trace(PROBLEMS[1], "ada", text if "{" in text else f"{text}{{", teacher("ada"))
    return replace(made, text=text, answer_start=text.rindex(answer))


@pytest.mark.parametrize(
    ("text", "form", "reasoning", "expected"),
    [
        ("so \\boxed{2}.", "boxed", "so \\boxed{", "so \\boxed{2}."),
        ("so <answer>2</answer>", "boxed", "so \\boxed{", "so \\boxed{2}"),
        ("so \\boxed{2}.", "answer_tags", "so <answer>", "so <answer>2</answer>."),
        # A box inside tags is the answer, not an answer in a box in a box.
        ("so <answer>\\boxed{2}</answer>", "boxed", "so \\boxed{", "so \\boxed{2}"),
    ],
)
def test_the_answers_form_is_mapped(text: str, form: str, reasoning: str, expected: str) -> None:
    answer = "\\boxed{2}" if "<answer>\\boxed" in text else "2"
    found = in_students_form(trace_of(text, answer), form, opens_think=False)  # type: ignore[arg-type]
    assert found == (reasoning, expected)


def test_the_answer_is_the_one_that_the_judge_read() -> None:
    # Judged as boxed; a broken tag behind it would hide it from a search in either form.
    assert in_students_form(trace_of("\\boxed{2}. <answer>", "2"), "boxed", opens_think=False) == (
        "\\boxed{",
        "\\boxed{2}. <answer>",
    )


@pytest.mark.parametrize(
    ("text", "opens_think", "expected"),
    [
        ("so \\boxed{2}", True, "</think>\n\nso \\boxed{2}"),
        ("<think>hm</think>so \\boxed{2}", True, "hm</think>so \\boxed{2}"),
        ("hm</think>so \\boxed{2}", True, "hm</think>so \\boxed{2}"),
        ("hm</think>so \\boxed{2}", False, "<think>\nhm</think>so \\boxed{2}"),
        ("<think>hm</think>so \\boxed{2}", False, "<think>hm</think>so \\boxed{2}"),
    ],
)
def test_thinking_is_mapped_to_what_the_students_prompt_opened(
    text: str, opens_think: bool, expected: str
) -> None:
    assert in_students_form(trace_of(text, "2"), "boxed", opens_think=opens_think)[1] == expected


def test_a_trace_whose_answer_is_not_where_it_says_is_named() -> None:
    made = replace(trace_of("so \\boxed{2}", "2"), answer_start=0)
    with pytest.raises(StoreError, match=made.trace_id):
        in_students_form(made, "boxed", opens_think=False)
