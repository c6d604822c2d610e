"""The plan of `--dry-run`: how a teacher's answers are read and rewritten for the student."""

from __future__ import annotations

import pytest

from precompute.run.plan import TeacherPlan
from precompute.run.tables import form_line
from precompute.verify.final_answer import OPENING
from store.records import AnswerForm


def planned(form: AnswerForm) -> TeacherPlan:
    counts = dict.fromkeys(("samples_stored", "usable_stored", "samples_left", "most_tokens"), 0)
    return TeacherPlan(
        name="ada",
        engine="transformers",
        sample_budget=1,
        longest_prompt=9,
        first_prompt="",
        opens_think=False,
        answer_form=form,
        **counts,
    )


@pytest.mark.parametrize(
    ("form", "student", "gold", "line"),
    [
        ("boxed", "hashes", "7", "the student reads ... \\boxed{7}  as  ... \\n#### 7"),
        ("hashes", "boxed", "7", "the student reads ...\\n#### 7  as  ...\\n\\boxed{7}"),
        ("letter", "answer_tags", "B", "the student reads ... (B)  as  ... <answer>B</answer>"),
        # An answer that the form cannot hold is shown by another.
        ("boxed", "boxed", "a { b", "the student reads ... \\boxed{A}  as  ... \\boxed{A}"),
        ("letter", "boxed", "42", "the student reads ... (A)  as  ... \\boxed{A}"),
    ],
)
def test_an_ending_is_shown_as_the_student_reads_it(
    form: AnswerForm, student: AnswerForm, gold: str, line: str
) -> None:
    teacher = planned(form)
    assert form_line(teacher, student, gold).splitlines()[1] == line


@pytest.mark.parametrize("form", OPENING)
@pytest.mark.parametrize("student", OPENING)
def test_every_pair_of_forms_has_a_line(form: AnswerForm, student: AnswerForm) -> None:
    teacher = planned(form)
    assert len(form_line(teacher, student, "x\ny").splitlines()) == 2
