"""The final answer of a response is found as the rules of final_answer.py say."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.verify.final_answer import CLOSING, OPENING, find_answer, has_format, to_form
from store.records import AnswerForm

FORMS: tuple[AnswerForm, ...] = ("boxed", "answer_tags")
PIECES = [
    "\\boxed{",
    "\\fbox {",
    "{",
    "}",
    "\\{",
    "\\}",
    "\\\\",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
]
texts = st.lists(st.sampled_from([*PIECES, "4", " ", "x", "\n", "\0", "\ud800"]), max_size=25).map("".join)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("so \\fbox{42}", "42"),
        ("so \\boxed {42}", "42"),
        ("so \\boxed{\\frac{7}{4}}", "\\frac{7}{4}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\}}", "\\}"),
        ("\\boxed{a \\\\}", "a \\\\"),
        ("x = 5 \\\\\\boxed{5}", "5"),
        ("<answer> 42 </answer>", " 42 "),
        ("<answer>\\boxed{42}</answer>", "\\boxed{42}"),
        ("\\boxed{x = \\boxed{5}}", "x = \\boxed{5}"),
        ("a stray { brace, then \\boxed{5}", "5"),
        ("a stray } brace, then \\boxed{5}", "5"),
        ("I put it into \\boxed, as asked: \\boxed{5}", "5"),
    ],
)
def test_the_content_of_the_answer_is_found(text: str, answer: str) -> None:
    assert find_answer(text).answer == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the answer is 42",
        "\\boxed 42",
        "\\boxed{42",
        "\\boxed{}",
        "\\boxed{ \n}",
        "\\boxed{\\}",
        "<answer>42",
        "<answer></answer>",
        "42</answer>",
    ],
)
def test_a_broken_or_empty_answer_is_none(text: str) -> None:
    found = find_answer(text)
    assert (found.answer, found.answer_start, found.form) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("\\boxed{1} or \\boxed{2", None),
        ("\\boxed{1} or \\boxed{}", None),
        ("\\boxed{1} or <answer>2</answer>", "2"),
        ("<answer>1</answer> or \\boxed{2}", "2"),
        ("<answer>1</answer> or <answer>2", None),
        ("<answer> <answer>2</answer>", "2"),
        ("I will write \\boxed{ and so: \\boxed{2}", "2"),
    ],
)
def test_the_last_opening_decides_and_nothing_falls_back(text: str, answer: str | None) -> None:
    assert find_answer(text).answer == answer


@pytest.mark.parametrize(
    ("text", "form", "answer", "count"),
    [
        ("7 * 6 = 42\n#### 42", "hashes", "42", 1),
        ("#### 41\nno:\n  #### 42 \nbye", "hashes", "42", 2),
        ("so\n**Final Answer:** 42", "answer_line", "42", 1),
        ("so\nThe answer is: $42$\n", "answer_line", "$42$", 1),
        ("(A) is wrong, so (B)", "letter", "B", 2),
        ("<think>#### 41</think>\n#### 42", "hashes", "42", 1),
        ("#### 41</think>\n#### 42", "hashes", "42", 1),
        # Without a demand a line counts where there is no box.
        ("so\n#### 42", None, "42", 1),
        ("so \\boxed{42}\n#### 41", None, "42", 1),
        # The last mark decides, and an empty one is broken.
        ("#### 42\n####", "hashes", None, 1),
        ("four ##### 42", "hashes", None, 0),
        ("option A", "letter", None, 0),
    ],
)
def test_lines_and_letters_hold_answers(
    text: str, form: AnswerForm | None, answer: str | None, count: int
) -> None:
    found = find_answer(text, form=form)
    assert (found.answer, found.count) == (answer, count)
    if answer is not None:
        assert text[found.answer_start : found.answer_end] == answer


def test_a_demanded_form_does_not_see_the_other() -> None:
    text = "\\boxed{1} and <answer>2</answer>"
    assert find_answer(text, form="boxed").answer == "1"
    assert find_answer(text, form="answer_tags").answer == "2"
    assert find_answer("<answer>\\boxed{3}</answer>", form="boxed").answer == "3"


@pytest.mark.parametrize(
    ("text", "opens_think", "answer"),
    [
        ("<think>\\boxed{1}</think>", False, None),
        ("<think>\\boxed{1}</think>\\boxed{2}", False, "2"),
        ("<think>is it \\boxed{1}?", False, None),
        ("\\boxed{1}</think> well", False, None),
        ("\\boxed{1}</think>\\boxed{2}", False, "2"),
        ("\\boxed{1}", True, None),
        ("\\boxed{1}</think>\\boxed{2}", True, "2"),
        ("\\boxed{1}<think>\\boxed{2}</think>", False, "1"),
        ("<think>a box \\boxed{ left open</think>\\boxed{2}", False, "2"),
    ],
)
def test_thought_is_no_answer(text: str, opens_think: bool, answer: str | None) -> None:
    assert find_answer(text, opens_think=opens_think).answer == answer


def test_places_are_those_of_the_picture() -> None:
    # so \boxed{42}.   s=0, the backslash=3, 4=10, }=12, .=13
    found = find_answer("so \\boxed{42}.")
    assert (found.opening_start, found.answer_start) == (3, 10)
    assert (found.answer_end, found.closing_end) == (12, 13)
    assert (found.form, found.count, found.broken) == ("boxed", 1, 0)


@pytest.mark.parametrize(
    ("text", "form", "holds"),
    [
        ("so \\boxed{42}", "boxed", True),
        ("so \\boxed{42}", "answer_tags", False),
        ("<answer>42</answer>", "answer_tags", True),
        ("<think>\\boxed{1}</think>\\boxed{2}", "boxed", True),
        ("\\boxed{\\boxed{2}}", "boxed", True),
        ("\\boxed{1} \\boxed{2}", "boxed", False),
        ("\\boxed{ \\boxed{2}", "boxed", False),
        ("\\boxed{} \\boxed{2}", "boxed", False),
        ("\\boxed{2} \\boxed{", "boxed", False),
        ("", "boxed", False),
    ],
)
def test_the_format_holds_with_exactly_one_answer(text: str, form: AnswerForm, holds: bool) -> None:
    assert has_format(text, form=form) is holds


def test_a_trace_is_mapped_to_the_form_of_the_student() -> None:
    text = "7 halves: <answer>3.5</answer> Done."
    found = find_answer(text)
    assert to_form(text, found, "boxed") == ("7 halves: \\boxed{", " Done.")
    assert to_form(text, found, "answer_tags") == ("7 halves: <answer>", " Done.")
    with pytest.raises(ValueError, match="no final answer"):
        to_form("no answer", find_answer("no answer"), "boxed")


@given(texts, st.sampled_from([None, *FORMS]), st.booleans())
def test_an_answer_is_the_text_between_its_offsets(text: str, form: AnswerForm | None, think: bool) -> None:
    found = find_answer(text, form=form, opens_think=think)
    if found.answer is None:
        assert found.answer_start is None
        return
    assert found.answer == text[found.answer_start : found.answer_end]
    assert found.answer.strip()
    assert found.count >= 1
    assert found.form in ((form,) if form else FORMS)
    inside = find_answer(text[: found.closing_end], form=found.form, opens_think=think)
    assert inside.answer == found.answer or form is None


@given(texts.filter(lambda text: "think>" not in text), st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_a_mapped_trace_holds_the_same_answer(text: str, form: AnswerForm, student: AnswerForm) -> None:
    text += OPENING[form] + "42" + CLOSING[form]
    found = find_answer(text, form=form)
    if found.answer != "42":
        return
    before, after = to_form(text, found, student)
    assert before.endswith(OPENING[student])
    assert (before + "42" + CLOSING[student] + after).count("42") == 1


@pytest.mark.parametrize(
    "text",
    [
        "{" * 2**20,
        "\\boxed{" + "{" * 2**20,
        "\\boxed{" + "}" * 2**20,
        "\\boxed{" + "{" * 2**19 + "}" * 2**19 + "}",
        "\\boxed{" + "{}" * 2**19 + "}",
        "\\boxed{" * 2**16,
        "\\boxed{" * 2**16 + "}" * 2**16,
        "<answer>" * 2**16,
        "\\boxed" + " " * 2**20,
        "\\boxed " * 2**16,
        "\\" * 2**20,
    ],
    ids=lambda text: f"{text[:9]!r}..{text[-3:]!r}",
)
def test_a_hostile_megabyte_takes_well_under_a_second(text: str) -> None:
    before = time.process_time()
    find_answer(text)
    # Measured 0.02 to 0.25 s; anything quadratic would take hours.
    assert time.process_time() - before < 0.9
