"""Finds the final answer of a response. Pure, linear in the text, and without any mathematics.

    reasoning ... \\boxed{  42  }  rest          <answer>  42  </answer>
                  |       |    |
      opening_start       |    answer_end
                          answer_start           z_c = text[:answer_start]

The rules, in order:

- What a model thinks is no answer: text between `<think>` and `</think>`, text after a `<think>` that is
  never closed, and text before a `</think>` that nothing opened (the prompt did).
- The last opening decides. If it is never closed, or holds nothing, there is no answer: an earlier one is
  never taken instead.
- Inside an answer block or a box that is closed, further boxes belong to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from precompute.config import AnswerForm

OPENING: dict[AnswerForm, str] = {"boxed": "\\boxed{", "answer_tags": "<answer>"}
CLOSING: dict[AnswerForm, str] = {"boxed": "}", "answer_tags": "</answer>"}

# Every repetition is possessive, so nothing backtracks; runs are one token, so a megabyte of braces is cheap.
# Every alternative begins with a character, not with a group, so that `re` skips to the next such character:
# five times as fast on prose.
_OUTSIDE_BOXES = re.compile(r"\\(?:boxed|fbox)\s*+\{|</?answer>|</?think>")
_INSIDE_BOX = re.compile(rf"{_OUTSIDE_BOXES.pattern}|\\[\\{{}}](?:\\[\\{{}}])*+|\{{[{{}}]*+|\}}[{{}}]*+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalAnswer:
    """Where the final answer of a response stands, and whether it is the only one."""

    answer: str | None
    """The content, exactly `text[answer_start:answer_end]`; None when there is no final answer."""
    opening_start: int | None
    """Character offset of the opening, e.g. of the backslash of `\\boxed{`."""
    answer_start: int | None
    """Character offset at which the content begins: z_c is `text[:answer_start]`, the opening included."""
    answer_end: int | None
    """Character offset just past the content."""
    closing_end: int | None
    """Character offset just past the closing."""
    form: AnswerForm | None
    """The form of the answer that decides."""
    count: int
    """Complete final answers in the forms that were looked for, thinking left out."""
    broken: int
    """Openings that are never closed or hold nothing."""


@dataclass(slots=True)
class _Span:
    """An opening and, once it is found, its closing."""

    form: AnswerForm
    opening_start: int
    answer_start: int
    answer_end: int = -1
    closing_end: int = -1

    @property
    def closed(self) -> bool:
        return self.closing_end >= 0


def find_answer(text: str, *, form: AnswerForm | None = None, opens_think: bool = False) -> FinalAnswer:
    """The final answer of `text` in `form` (None: in either).

    `opens_think` says that the prompt ended inside a `<think>` block, so that the text begins as thought.
    """
    spans = _outermost(_Scan(form, opens_think).spans(text))
    good = [span for span in spans if span.closed and _holds_something(text, span)]
    if not good or good[-1] is not spans[-1]:
        return _no_answer(count=len(good), broken=len(spans) - len(good))
    last = good[-1]
    return FinalAnswer(
        answer=text[last.answer_start : last.answer_end],
        opening_start=last.opening_start,
        answer_start=last.answer_start,
        answer_end=last.answer_end,
        closing_end=last.closing_end,
        form=last.form,
        count=len(good),
        broken=len(spans) - len(good),
    )


def has_format(text: str, *, form: AnswerForm, opens_think: bool = False) -> bool:
    """True when the text holds exactly one complete final answer in `form` and no broken one (DESIGN 2)."""
    solution = find_answer(text, form=form, opens_think=opens_think)
    return solution.answer is not None and solution.count == 1 and solution.broken == 0


def opening(form: AnswerForm) -> str:
    """What stands before an answer: `\\boxed{` or `<answer>`."""
    return OPENING[form]


def closing(form: AnswerForm) -> str:
    """What stands after an answer: `}` or `</answer>`."""
    return CLOSING[form]


def reasoning(text: str, solution: FinalAnswer) -> str:
    """The text up to, but without, the opening of its final answer. ValueError when it has none."""
    if solution.opening_start is None:
        raise ValueError("a text without a final answer has no reasoning before it")
    return text[: solution.opening_start]


def to_form(text: str, solution: FinalAnswer, form: AnswerForm) -> tuple[str, str]:
    """(z_c, rest): the text up to and including an opening in `form`, and what follows the answer.

    `z_c + answer + closing(form) + rest` is the same solution written in the student's form (DESIGN 2).
    ValueError when the text has no final answer.
    """
    return reasoning(text, solution) + opening(form), text[solution.closing_end :]


def _no_answer(*, count: int, broken: int) -> FinalAnswer:
    return FinalAnswer(
        answer=None,
        opening_start=None,
        answer_start=None,
        answer_end=None,
        closing_end=None,
        form=None,
        count=count,
        broken=broken,
    )


def _holds_something(text: str, span: _Span) -> bool:
    return bool(text[span.answer_start : span.answer_end].strip())


def _outermost(spans: list[_Span]) -> list[_Span]:
    """The spans that no closed span contains, in order of their openings."""
    kept: list[_Span] = []
    covered_until = 0
    for span in spans:
        if span.opening_start >= covered_until:
            kept.append(span)
            covered_until = max(covered_until, span.closing_end)
    return kept


class _Scan:
    """One pass over a text. A brace matters only inside a box, so braces outside are never looked at."""

    def __init__(self, form: AnswerForm | None, opens_think: bool) -> None:
        self._wants_boxes = form != "answer_tags"
        self._wants_tags = form != "boxed"
        self._thinking = opens_think
        self._spans: list[_Span] = []
        self._open_braces: list[_Span | None] = []
        """Unclosed braces, innermost last: a box, or None for a plain brace inside one."""
        self._open_block: _Span | None = None

    def spans(self, text: str) -> list[_Span]:
        """Every opening outside thought, in order of place."""
        place = 0
        while match := self._pattern().search(text, place):
            place = match.end()
            self._take(match)
        return self._spans

    def _pattern(self) -> re.Pattern[str]:
        return _INSIDE_BOX if self._open_braces and not self._thinking else _OUTSIDE_BOXES

    def _take(self, match: re.Match[str]) -> None:
        found = match[0]
        if found in ("<think>", "</think>"):
            self._think(found)
        elif self._thinking:
            return
        elif found[0] == "<":
            self._tag(match)
        elif found[0] in "{}":
            self._braces(found, match.start())
        elif found[1] in "bf" and self._wants_boxes:
            span = _Span("boxed", match.start(), match.end())
            self._spans.append(span)
            self._open_braces.append(span)

    def _think(self, tag: str) -> None:
        if tag == "</think>" and not self._thinking:
            # Nothing in the text opened this thought, so the prompt did, and all of it so far was thought.
            self._spans.clear()
            self._open_braces.clear()
            self._open_block = None
        self._thinking = tag == "<think>"

    def _tag(self, match: re.Match[str]) -> None:
        if not self._wants_tags:
            return
        if match[0] == "<answer>":
            self._open_block = _Span("answer_tags", match.start(), match.end())
            self._spans.append(self._open_block)
        elif self._open_block is not None:
            self._open_block.answer_end, self._open_block.closing_end = match.span()
            self._open_block = None

    def _braces(self, run: str, start: int) -> None:
        for place, brace in enumerate(run, start):
            if brace == "{":
                self._open_braces.append(None)
            elif span := self._open_braces.pop():
                span.answer_end, span.closing_end = place, place + 1
            if not self._open_braces:
                return
