"""A teacher's trace as the student must write it: answer form and thinking, mapped explicitly. Pure."""

from __future__ import annotations

from precompute.config import AnswerForm
from precompute.verify.final_answer import FinalAnswer, closing, find_answer, to_form
from store.errors import StoreError
from store.records import Trace


def in_students_form(trace: Trace, form: AnswerForm, *, opens_think: bool) -> tuple[str, str]:
    """(z_c, text): the trace as the student must write it, by answer form and by thinking.

    z_c is the text up to and including the opening of its final answer. A student whose prompt ends inside
    `<think>` closes it first; a thought that the teacher's prompt opened is opened in the text.
    """
    solution = _as_judged(trace)
    reasoning, rest = to_form(trace.text, solution, form)
    reasoning = _as_thought(reasoning, trace.text, opens_think=opens_think)
    return reasoning, f"{reasoning}{_innermost(str(solution.answer))}{closing(form)}{rest}"


def _as_judged(trace: Trace) -> FinalAnswer:
    """The answer that the judge read when the trace was verified: the one at `answer_start`."""
    forms: tuple[AnswerForm | None, ...] = (None, "boxed", "answer_tags")
    for form in forms:
        for thinking in (False, True):
            solution = find_answer(trace.text, form=form, opens_think=thinking)
            if solution.answer_start is not None and solution.answer_start == trace.answer_start:
                return solution
    raise StoreError(f"trace {trace.trace_id} of {trace.teacher} has no answer at {trace.answer_start}")


def _innermost(answer: str) -> str:
    """`\\boxed{4}` inside answer tags is the answer 4."""
    inner = find_answer(answer, form="boxed")
    whole = inner.answer is not None and inner.opening_start == 0 and inner.closing_end == len(answer)
    return str(inner.answer) if whole else answer


def _as_thought(reasoning: str, text: str, *, opens_think: bool) -> str:
    if opens_think:
        return reasoning.removeprefix("<think>") if "</think>" in text else f"</think>\n\n{reasoning}"
    unopened = "</think>" in text and "<think>" not in text.split("</think>")[0]
    return f"<think>\n{reasoning}" if unopened else reasoning
