"""Verifiers of answers that need no algebra: a number, an option, a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from precompute.verify.base import Outcome
from precompute.verify.plain_numbers import plain_number

TOLERANCE = Fraction(1, 1_000_000)
"""Relative difference up to which two numbers are equal."""

_WRAPPING = re.compile(
    r"^(?:\$+|\\\(|\\\[|\*+|\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{)(.*?)(?:\$+|\\\)|\\\]|\*+|\})$"
)
_CURRENCY = re.compile(r"^(-?)\s*(?:\\?\$|[€£¥₹])\s*")
_UNIT = re.compile(r"(?:\s*\\?%|\s*(?:\\(?:text|mathrm)\s*\{)?\s*[^\W\d_][\w /.^-]*\}?\.?)$")
_SCALE = re.compile(r"\b(?:hundred|thousand|million|billion|trillion|dozen|[km]|bn|mn)s?\b", re.IGNORECASE)
_GROUPS = re.compile(r"(?<=\d)(?:,|\\,|\{,\}|\s)(?=\d{3}(?!\d))")
_POWER = re.compile(r"^(.*\d)[eE]([-+]?\d{1,3})$")
_OPTION = re.compile(r"^\s*\(?([A-Z])[).:]\s*(\S.*?)\s*$", re.MULTILINE)
_LETTER = re.compile(
    r"^(?:(?:the\s+)?(?:answer|option|choice)\s*(?:is|:)?\s*)?\(?([A-Za-z])(?:[).:]+\s*(.*)|)$"
)


def plain_text(text: str) -> str:
    """Returns a text in NFKC with single spaces, without `$`, `\\text{}` and the like around it."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    while (match := _WRAPPING.match(text)) and match[1].strip():
        text = match[1].strip()
    return text


def verify_exact(
    answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
) -> Outcome | None:
    """Compares two texts as they are written: case and order matter, the kind of space does not."""
    texts = plain_text(gold), plain_text(answer)
    return Outcome("match" if texts[0] == texts[1] else "mismatch", "", *texts) if texts[0] else None


def written_number(text: str) -> Fraction | None:
    """Returns the value of a number that is written out, `1,234.5`, `$7`, `12 apples` or `7/4`; None for
    anything that would have to be computed, and for words such as million."""
    text = plain_text(text).replace("−", "-").rstrip(".")
    text = _CURRENCY.sub(r"\1", text)
    if _SCALE.search(text):
        return None
    power = _POWER.match(text)
    text = power[1] if power else _UNIT.sub("", text)
    text = re.sub(r"^(-?)\.", r"\g<1>0.", _GROUPS.sub("", text).lstrip("+").rstrip("."))
    value = plain_number(text)
    return value * Fraction(10) ** int(power[2]) if value is not None and power else value


def verify_numeric(
    answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
) -> Outcome | None:
    """Compares two written numbers; `29+7+2+6` is no answer, whatever its sum."""
    wanted, given = written_number(gold), written_number(answer)
    if wanted is None:
        return None
    if given is None:
        return Outcome("mismatch", "the answer is not a number that is written out", str(wanted))
    equal = abs(wanted - given) <= TOLERANCE * max(abs(wanted), abs(given))
    return Outcome("match" if equal else "mismatch", "", str(wanted), str(given))


def options_of(question: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns letter -> text of the options: those of `metadata["options"]`, or the lettered lines of the
    question."""
    listed = metadata.get("options") or metadata.get("choices")
    if isinstance(listed, Mapping):
        listed = listed.get("text")
    if isinstance(listed, list):
        return {chr(ord("A") + index): plain_text(str(text)) for index, text in enumerate(listed)}
    return {letter: plain_text(text) for letter, text in _OPTION.findall(question)}


def chosen_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter that a text chooses: by an option's text, or `B`, `(B)`, `B. its text`."""
    text = plain_text(text)
    by_text = [letter for letter, option in options.items() if option.casefold() == text.casefold()]
    if by_text:
        return by_text[0]
    match = _LETTER.match(text)
    if match is None:
        return None
    letter, rest = match[1].upper(), plain_text(match[2] or "")
    fits = not rest or not options or options.get(letter, "").casefold() == rest.casefold()
    return letter if fits and (not options or letter in options) else None


def verify_choice(
    answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
) -> Outcome | None:
    """Compares the options that two texts choose, by letter or by the option's text."""
    options = options_of(question, metadata)
    wanted, given = chosen_letter(gold, options), chosen_letter(answer, options)
    if wanted is None:
        return None
    detail = "" if given else "the answer names no option"
    return Outcome("match" if wanted == given else "mismatch", detail, wanted, given)


def verify_reasoning_gym(
    answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
) -> float | None:
    """Returns the score that reasoning-gym's own task gives, named by `metadata["source_dataset"]`."""
    from reasoning_gym import get_score_answer_fn  # type: ignore[import-untyped]

    if "source_dataset" not in metadata:
        return None
    entry = {"question": question, "answer": gold, "metadata": dict(metadata)}
    return float(get_score_answer_fn(metadata["source_dataset"])(answer, entry))
