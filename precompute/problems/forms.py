"""The forms of problem rows: one function a form, from a row to the problem that it states (docs/data.md).

To add a form, write a ProblemForm and enter it in PROBLEM_FORMS; or name your own function in the config,
`[problems] form = "forms.py:my_form"`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from precompute.config_file import short
from precompute.problems.data_files import Row
from precompute.problems.data_rows import Turn, cell_of, gold_of, has_cell, listed_turns, turns_of
from precompute.verify.final_answer import find_answer
from store.records import Problem

TEMPLATE = "problems.template"
"""The column of a question that `problems.template` made."""
RESPONSE_COLUMNS = ("conversations", "messages")
"""Columns whose turns hold the response behind the prompt."""
SOLUTION_COLUMNS = ("solution", "Solution")

_GSM8K_GOLD = re.compile(r"####[ \t]*(\S[^\n]*?)\s*$")


class Columns(NamedTuple):
    """Columns of a file, named from the outside in, e.g. `reward_model.ground_truth`; empty: not found."""

    question: str
    answer: str


ProblemForm = Callable[[Row, Columns], Problem | None]
"""Returns the problem that a row states; None when the row has another form, ValueError when it is wrong."""


def choices(row: Row, columns: Columns) -> Problem | None:
    """Reads a question with options: they are shown as lettered lines, and the answer is a letter."""
    cell = row.get("options") or row.get("choices")
    labels = cell.get("label") if isinstance(cell, Mapping) else None
    options = cell.get("text") if isinstance(cell, Mapping) else cell
    if not isinstance(options, list) or not options or not all(isinstance(each, str) for each in options):
        return None
    letters = [chr(ord("A") + index) for index in range(len(options))]
    texts = [re.sub(rf"^\(?{a}[).:]\s*", "", text) for a, text in zip(letters, options, strict=True)]
    gold = _chosen(row, cell_of(row, columns.answer), letters, texts, labels or letters)
    problem = _problem(row, columns, gold)
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    if isinstance(cell_of(row, columns.question), str) and columns.question != TEMPLATE:
        problem = {**problem, "question": f"{problem['question']}\n\n{lines}"}
    return Problem(**problem, verifier="choice", metadata={"options": texts})


def _chosen(row: Row, answer: Any, letters: list[str], texts: list[str], labels: Sequence[str]) -> str:
    """Returns the letter of the answer: a 0-based index, a label, or an option's text."""
    index = row.get("answer_index")
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = answer if 0 <= answer < len(letters) else None
    else:
        text = gold_of(answer, "answer").strip()
        known = labels if text in labels else texts
        found = known.index(text) if text in known else None
    if found is None:
        raise ValueError(f"the answer fits none of the options: {short(answer)}")
    if isinstance(index, int) and index != found:
        raise ValueError(f"answer and answer_index disagree: {short(answer)} and {index}")
    return letters[found]


def turns(row: Row, columns: Columns) -> Problem | None:
    """Reads ORZ's rows: the gold answer is in the last turn, which is the assistant's."""
    cell = row.get("conversations")
    last = cell[-1] if isinstance(cell, list) and cell else None
    truth = last.get("ground_truth") if isinstance(last, Mapping) else None
    if not isinstance(cell, list) or not isinstance(truth, Mapping):
        return None
    gold = gold_of(truth.get("value"), "ground_truth")
    return Problem(**_problem({**row, "conversations": cell[:-1]}, columns, gold))


def gsm8k(row: Row, columns: Columns) -> Problem | None:
    """Reads GSM8K's rows: the gold answer stands behind the last `####` of a solution."""
    found = _GSM8K_GOLD.search(_answer_text(row, columns))
    return Problem(**_problem(row, columns, found[1])) if found else None


def solution(row: Row, columns: Columns) -> Problem | None:
    """Reads rows with a solution in place of an answer: the gold answer is the last one in `\\boxed{}`; of
    TRL's rows (`prompt`, `solution`) without one it is the whole."""
    if columns.answer not in SOLUTION_COLUMNS:
        return None
    text = _answer_text(row, columns)
    gold = find_answer(text, form="boxed").answer
    if gold is None and columns.question != "prompt":
        raise ValueError(f"the solution has no \\boxed{{}} answer: {short(text)}")
    return Problem(**_problem(row, columns, text if gold is None else gold))


def plain(row: Row, columns: Columns) -> Problem | None:
    """Reads a row whose question is a text."""
    cell = cell_of(row, columns.question)
    if not isinstance(cell, str) or listed_turns(cell) is not None:
        return None
    return chat(row, columns)


def chat(row: Row, columns: Columns) -> Problem | None:
    """Reads a row whose question is a list of messages, or one as JSON text."""
    if columns.answer == columns.question:
        raise ValueError(f"the row has no gold answer beside {columns.question!r}; add a column `answer`")
    return Problem(**_problem(row, columns, gold_of(cell_of(row, columns.answer), columns.answer)))


PROBLEM_FORMS: Mapping[str, ProblemForm] = {
    "choices": choices,
    "turns": turns,
    "gsm8k": gsm8k,
    "solution": solution,
    "plain": plain,
    "chat": chat,
}
"""By the name that `problems.form` takes; without one, the first that fits."""


def _answer_text(row: Row, columns: Columns) -> str:
    if columns.answer == columns.question or not has_cell(row, columns.answer):
        return ""
    return gold_of(cell_of(row, columns.answer), columns.answer)


def _problem(row: Row, columns: Columns, gold: str) -> dict[str, Any]:
    """Returns question, answer, and the turns of a prompt that has more than a system and a user turn."""
    answer = _filled(gold, columns.answer or "ground_truth")
    cell, column = cell_of(row, columns.question), columns.question
    if isinstance(cell, str) and listed_turns(cell) is None:
        return {"question": _filled(cell, column), "answer": answer}
    given = turns_of(cell, column)
    if column in RESPONSE_COLUMNS:
        given = given[: 1 + max((i for i, turn in enumerate(given) if turn.role == "user"), default=-1)]
    system, prompt = _split_system(given)
    if not any(turn.role == "user" for turn in prompt):
        raise ValueError(f"{column} has no message of the role 'user': {short(cell)}")
    if prompt[-1].role != "user":
        raise ValueError(
            f"{column} ends with a turn of the role {prompt[-1].role!r}, not 'user': {short(cell)}"
        )
    many = tuple((turn.role or "user", turn.text) for turn in prompt) if len(prompt) > 1 else ()
    question = _filled(prompt[-1].text, f"{column}: user")
    return {"question": question, "answer": answer, "system_prompt": system, "turns": many}


def _split_system(given: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
    """Returns the text of a leading system turn, and the turns behind it."""
    if given and given[0].role == "system":
        return given[0].text or None, given[1:]
    return None, given


def _filled(text: str, column: str) -> str:
    if not text.strip():
        raise ValueError(f"{column} holds no text: {text!r}")
    return text
