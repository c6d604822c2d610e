"""Filters: reasons to keep a verified trace from the student, e.g. its length, repetition or script.

Pure functions of a stored trace, linear in its text. The reason is stored with the trace (`filtered`), so
that filtered traces can be counted and inspected.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection

from precompute.config import FiltersConfig
from precompute.verify.final_answer import find_answer
from store.records import AnswerForm

_PIECE = re.compile(r"\w+|[^\w\s]")


def why_filtered(
    filters: FiltersConfig, *, text: str, n_tokens: int, form: AnswerForm, opens_think: bool
) -> str | None:
    """Returns `key: reason` for the first filter that rejects the trace; None if it is usable.

    Args:
        n_tokens: in the teacher's tokens; 0 if they were never counted.
        form: as for `find_answer`, like `opens_think`.
    """
    least, most, n = filters.min_tokens, filters.max_tokens, filters.repetition_ngram
    if least is not None and 0 < n_tokens < least:
        return f"min_tokens: {n_tokens} tokens, fewer than {least}"
    if most is not None and n_tokens > most:
        return f"max_tokens: {n_tokens} tokens, more than {most}"
    limit = filters.max_repetition
    if limit is not None and (share := repetition(text, n)) > limit:
        return f"max_repetition: {share:.3f} of its {n}-grams are repeated, more than {limit:g}"
    limit = filters.max_other_letters
    if filters.scripts and (share := other_letters(text, filters.scripts)) > limit:
        scripts = " or ".join(filters.scripts)
        return f"scripts: {share:.3f} of its letters are not {scripts}, more than {limit:g}"
    if filters.format:
        found = find_answer(text, form=form, opens_think=opens_think)
        if found.answer is None or found.count != 1 or found.broken:
            return f"format: {found.count} final answers and {found.broken} broken ones in the form {form}"
    return None


def repetition(text: str, n: int) -> float:
    """Returns the share of n-grams, in words and single symbols, that occur earlier in the text.

    0 without any; near 1 for a text that repeats n pieces over and over.
    """
    pieces = _PIECE.findall(text)
    total = len(pieces) - n + 1
    if total < 1:
        return 0.0
    return 1 - len({tuple(pieces[start : start + n]) for start in range(total)}) / total


def other_letters(text: str, scripts: Collection[str]) -> float:
    """Returns the share of letters of other scripts, in [0, 1]; digits and symbols are not letters.

    A letter's script is the first word of its Unicode name after normalisation (NFKC): a mathematical bold a
    is Latin. Scripts are not languages: French is "latin" as English is.
    """
    letters = {letter: count for letter, count in Counter(text).items() if letter.isalpha()}
    others = sum(count for letter, count in letters.items() if script_of(letter) not in scripts)
    return others / sum(letters.values()) if letters else 0.0


def script_of(letter: str) -> str:
    """Returns `latin`, `greek`, `cjk`, ... (the config accepts those of precompute.config.Script)."""
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "")
    return name.split(" ", 1)[0].lower()
