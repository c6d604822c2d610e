"""Which traces are kept from the student however right they are: too long, repetitive, in another script, ...

Pure functions of what the store holds of a trace, linear in its text. What they say is stored with the trace
(`filtered`), so that what was held back can be counted and looked at.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection

from precompute.config import AnswerForm, FiltersConfig
from precompute.verify.final_answer import find_answer

_PIECE = re.compile(r"\w+|[^\w\s]")


def why_filtered(
    filters: FiltersConfig, *, text: str, n_tokens: int, form: AnswerForm, opens_think: bool
) -> str | None:
    """`key: reason` for the first filter that holds the trace back, where key is the config's; None when it
    may be used. `n_tokens` are the teacher's, 0 where nobody counted them; `form` and `opens_think` are
    those of `find_answer`."""
    return (
        _too_short(filters.min_tokens, n_tokens)
        or _too_long(filters.max_tokens, n_tokens)
        or _repetitive(filters.max_repetition, filters.repetition_ngram, text)
        or _foreign(filters.scripts, filters.max_other_letters, text)
        or _ill_formed(filters.format, text, form, opens_think)
    )


def repetition(text: str, n: int) -> float:
    """The share of n-grams, in words and single symbols, that stood in the text before: 0 where none did.

    A text that says one thing of n pieces over and over comes near 1.
    """
    pieces = _PIECE.findall(text)
    total = len(pieces) - n + 1
    if total < 1:
        return 0.0
    return 1 - len({tuple(pieces[start : start + n]) for start in range(total)}) / total


def other_letters(text: str, scripts: Collection[str]) -> float:
    """The share of letters that belong to none of the scripts, in [0, 1]; digits and symbols are no letters.

    A letter's script is the first word of its Unicode name once it is normalised (NFKC), so that a
    mathematical bold a is Latin. Scripts, not languages: French passes for "latin" as English does.
    """
    letters = {letter: count for letter, count in Counter(text).items() if letter.isalpha()}
    others = sum(count for letter, count in letters.items() if script_of(letter) not in scripts)
    return others / sum(letters.values()) if letters else 0.0


def script_of(letter: str) -> str:
    """`latin`, `greek`, `cjk`, ... (precompute.config.Script has those that can be asked for)."""
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "")
    return name.split(" ", 1)[0].lower()


def _too_short(least: int | None, n_tokens: int) -> str | None:
    if least is None or n_tokens >= least or not n_tokens:
        return None
    return f"min_tokens: {n_tokens} tokens, fewer than {least}"


def _too_long(most: int | None, n_tokens: int) -> str | None:
    if most is None or n_tokens <= most:
        return None
    return f"max_tokens: {n_tokens} tokens, more than {most}"


def _repetitive(most: float | None, n: int, text: str) -> str | None:
    share = 0.0 if most is None else repetition(text, n)
    if most is None or share <= most:
        return None
    return f"max_repetition: {share:.3f} of its {n}-grams stood there before, more than {most:g}"


def _foreign(scripts: tuple[str, ...], most: float, text: str) -> str | None:
    share = other_letters(text, scripts) if scripts else 0.0
    if not scripts or share <= most:
        return None
    return f"scripts: {share:.3f} of its letters are not {' or '.join(scripts)}, more than {most:g}"


def _ill_formed(wanted: bool, text: str, form: AnswerForm, opens_think: bool) -> str | None:
    if not wanted:
        return None
    solution = find_answer(text, form=form, opens_think=opens_think)
    if solution.answer is not None and solution.count == 1 and not solution.broken:
        return None
    return f"format: {solution.count} final answers and {solution.broken} broken ones in the form {form}"
