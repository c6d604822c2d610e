"""Finds the final answer of a response. Pure, linear in the text, and without any mathematics.

    reasoning ... \\boxed{  42  }  rest          <answer>  42  </answer>
                  |       |    |
      opening_start       |    answer_end
                          answer_start           z_c = text[:answer_start]

The rules, in order:

- Thinking is not an answer: text between `<think>` and `</think>`, text after a `<think>` that is
  never closed, and text before a `</think>` that nothing opened (the prompt did).
- The last opening decides. If it is never closed, or holds nothing, the text has no answer: an earlier one
  is never used instead.
- Inside an answer block or a box that is closed, further boxes belong to it.
- A line `#### x` or `Answer: x` holds the answer to its end; `(B)` is one where letters are demanded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from store.records import AnswerForm

OPENING: dict[AnswerForm, str] = {
    "boxed": "\\boxed{",
    "answer_tags": "<answer>",
    "hashes": "#### ",
    "answer_line": "Answer: ",
    "letter": "(",
}
CLOSING: dict[AnswerForm, str] = {
    "boxed": "}",
    "answer_tags": "</answer>",
    "hashes": "",
    "answer_line": "",
    "letter": ")",
}
MARKS: dict[AnswerForm, re.Pattern[str]] = {
    "hashes": re.compile(r"^[ \t]*+####[ \t]*+(?P<answer>[^\n]*)", re.MULTILINE),
    "answer_line": re.compile(
        r"^[ \t*_#]*+(?:the[ \t]++)?(?:final[ \t]++)?answer[ \t]*+(?:is[ \t]*+)?:[ \t*_]*+(?P<answer>[^\n]*)",
        re.MULTILINE | re.IGNORECASE,
    ),
    "letter": re.compile(r"\((?P<answer>[A-Z])\)"),
}
"""The forms that one expression finds: a line from its mark on, or a letter in parentheses."""
LINES: tuple[AnswerForm, ...] = ("hashes", "answer_line")
_THINK = re.compile(r"</?think>")

DEMANDS: dict[AnswerForm, re.Pattern[str]] = {
    "answer_tags": re.compile(r"<answer>"),
    "boxed": re.compile(r"\\boxed"),
    "hashes": re.compile(r"####"),
    "answer_line": re.compile(r"\bAnswer:[ \t]*\S"),
    "letter": re.compile(r"letter\b[^.\n]*\bparenthes[ei]s", re.IGNORECASE),
}
"""Form -> what a prompt that demands it says; the first one that fits."""


def answer_form_of(*turns: str) -> AnswerForm | None:
    """Returns the form that the first of some turns demands which demands one; None: no turn does."""
    found = (form for turn in turns for form, demand in DEMANDS.items() if demand.search(turn))
    return next(found, None)


# Every repetition is possessive, so nothing backtracks; a run is one token, so a megabyte of braces is cheap.
# Every alternative begins with a character, not with a group, so that `re` skips to the next such character:
# five times as fast on prose.
_OUTSIDE_BOXES = re.compile(r"\\(?:boxed|fbox)\s*+\{|</?answer>|</?think>")
_INSIDE_BOX = re.compile(rf"{_OUTSIDE_BOXES.pattern}|\\[\\{{}}](?:\\[\\{{}}])*+|\{{[{{}}]*+|\}}[{{}}]*+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalAnswer:
    """The final answer of a response; every field but the counts is None where it has none."""

    count: int
    """Complete final answers in the requested forms, outside thinking."""
    broken: int
    """Openings that are never closed or hold nothing."""
    answer: str | None = None
    """The content, exactly `text[answer_start:answer_end]`."""
    opening_start: int | None = None
    """Character offset of the opening, e.g. of the backslash of `\\boxed{`."""
    answer_start: int | None = None
    """Character offset at which the content begins: z_c is `text[:answer_start]`, the opening included."""
    answer_end: int | None = None
    """Character offset just past the content."""
    closing_end: int | None = None
    """Character offset just past the closing."""
    form: AnswerForm | None = None
    """The form of the answer that decides."""


@dataclass(slots=True)
class _Span:
    """An opening and, once it is found, its closing."""

    form: AnswerForm
    opening_start: int
    answer_start: int
    answer_end: int = -1
    closing_end: int = -1


def find_answer(text: str, *, form: AnswerForm | None = None, opens_think: bool = False) -> FinalAnswer:
    """Returns the final answer of `text` in `form`; None: in a box or tags, else on a line of its own.

    `opens_think`: the prompt ended inside a `<think>` block, so that the text begins as thinking.
    """
    if form in MARKS:
        return _marked(text, form, opens_think)
    found = _enclosed(text, form, opens_think)
    if form is None and found.count == found.broken == 0:
        on_lines = (_marked(text, each, opens_think) for each in LINES)
        return next((each for each in on_lines if each.answer is not None), found)
    return found


def _marked(text: str, form: AnswerForm, opens_think: bool) -> FinalAnswer:
    """Returns the last answer in one of the forms of MARKS."""
    spans = _outside_thinking(text, opens_think)
    marks = [mark for start, end in spans for mark in MARKS[form].finditer(text, start, end)]
    answers = [mark["answer"].rstrip(" \t\r*_") for mark in marks]
    good = sum(map(bool, answers))
    if not answers or not answers[-1]:
        return FinalAnswer(count=good, broken=len(marks) - good)
    last, start = marks[-1], marks[-1].start("answer")
    return FinalAnswer(
        answer=answers[-1],
        opening_start=last.start(),
        answer_start=start,
        answer_end=start + len(answers[-1]),
        closing_end=last.end(),
        form=form,
        count=good,
        broken=len(marks) - good,
    )


def _outside_thinking(text: str, thinking: bool) -> list[tuple[int, int]]:
    """Returns the spans of a text that are no thinking."""
    spans, start = [], 0
    for tag in _THINK.finditer(text):
        if tag[0] == "<think>" and not thinking:
            spans.append((start, tag.start()))
        elif tag[0] == "</think>" and not thinking:
            spans.clear()  # nothing in the text opened this block, so the prompt did
        thinking, start = tag[0] == "<think>", tag.end()
    return spans if thinking else [*spans, (start, len(text))]


def _enclosed(text: str, form: AnswerForm | None, opens_think: bool) -> FinalAnswer:
    """Returns the last answer in a box or in tags."""
    spans = _outermost(_Scan(form, opens_think).spans(text))
    good = [
        span for span in spans if span.closing_end >= 0 and text[span.answer_start : span.answer_end].strip()
    ]
    if not good or good[-1] is not spans[-1]:
        return FinalAnswer(count=len(good), broken=len(spans) - len(good))
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
    """Returns whether the text has exactly one complete final answer in `form` and no broken one."""
    found = find_answer(text, form=form, opens_think=opens_think)
    return found.answer is not None and found.count == 1 and found.broken == 0


def to_form(text: str, found: FinalAnswer, form: AnswerForm) -> tuple[str, str]:
    """Returns (z_c, rest): the text up to and including an opening in `form`, and the text after the answer.

    `z_c + answer + CLOSING[form] + rest` is the same solution written in the student's form (DESIGN 2).
    ValueError when the text has no final answer.
    """
    if found.opening_start is None:
        raise ValueError("the text has no final answer")
    before, rest = text[: found.opening_start], text[found.closing_end :]
    if form in LINES:  # a line of its own
        before += "" if before.endswith("\n") or not before else "\n"
        rest = rest if rest.startswith("\n") or not rest else f"\n{rest}"
    return before + OPENING[form], rest


def _outermost(spans: list[_Span]) -> list[_Span]:
    """Returns the spans that no closed span contains, in order of their openings."""
    kept: list[_Span] = []
    covered_until = 0
    for span in spans:
        if span.opening_start >= covered_until:
            kept.append(span)
            covered_until = max(covered_until, span.closing_end)
    return kept


class _Scan:
    """One pass over a text. A brace matters only inside a box, so braces outside are skipped."""

    def __init__(self, form: AnswerForm | None, opens_think: bool) -> None:
        self._wants_boxes = form != "answer_tags"
        self._wants_tags = form != "boxed"
        self._thinking = opens_think
        self._spans: list[_Span] = []
        self._open_braces: list[_Span | None] = []
        """Unclosed braces, innermost last: a box, or None for a plain brace inside one."""
        self._open_block: _Span | None = None

    def spans(self, text: str) -> list[_Span]:
        """Returns every opening outside thinking, in order."""
        index = 0
        while match := self._pattern().search(text, index):
            index = match.end()
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
            # Nothing in the text opened this block, so the prompt did, and all text so far was thinking.
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
        for index, brace in enumerate(run, start):
            if brace == "{":
                self._open_braces.append(None)
            elif span := self._open_braces.pop():
                span.answer_end, span.closing_end = index, index + 1
            if not self._open_braces:
                return
