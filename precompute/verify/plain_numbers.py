"""Integers, decimals and fractions that are written plainly: no worker is needed for them."""

from __future__ import annotations

import re
from fractions import Fraction

from precompute.verify.base import Outcome
from precompute.verify.math_text import unwrap

_OPERATION = re.compile(r"\d[-+*/^]|\\(?:d?frac|sqrt|binom)|!")
_SIGNS = {"\\left": "", "\\right": "", "\\times": "*", "\\cdot": "*", "\\div": "/", "×": "*"}
_SIGNS |= {"·": "*", "÷": "/", "−": "-", "$": "", "\\,": ""}

CLEARLY = Fraction(1, 100_000)
"""Relative difference above which two decimals are not roundings of one another."""

_NUMBER = re.compile(r"-?[0-9]{1,300}(?:\.[0-9]{1,300}|/[0-9]{1,300})?")
_FRACTION = re.compile(r"(-?)\\[dtc]?frac\{([0-9]{1,300})\}\{([0-9]{1,300})\}")
_DECIMAL = re.compile(r"([-+]?)0*([0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3})+|[0-9]*)(?:\.([0-9]*?)0*)?")


def plain_gold(gold: str) -> str:
    """Returns a gold answer as it appears inside a box: `$44$`, `\\boxed{44}`, `044` and `44.0` are `44`,
    `1,234` is `1234`. Comprehension scores must not depend on how a data set writes a number."""
    bare = unwrap(gold) or gold.strip()
    match = _DECIMAL.fullmatch(bare)
    if match is None or not re.search("[0-9]", bare):
        return bare
    sign, whole, decimals = match.groups()
    number = (re.sub("[^0-9]", "", whole) or "0") + (f".{decimals}" if decimals else "")
    return f"-{number}" if sign == "-" and number != "0" else number


def compare_numbers(gold: str, answer: str) -> Outcome | None:
    """Returns what `math.compare` returns for two plain numbers; None where only that can decide."""
    left, right = plain_number(gold), plain_number(answer)
    if left is None or right is None:
        return None
    if left == right:
        return Outcome("match", "", str(left), str(right))
    is_rounded = "." in gold or "." in answer
    if is_rounded and abs(left - right) <= CLEARLY * max(Fraction(1), abs(left), abs(right)):
        return None
    return Outcome("mismatch", "", str(left), str(right))


def is_own_expression(question: str, gold: str, answer: str) -> bool:
    """Returns True for an answer that is an expression of the question, where the gold answer is a number:
    the problem asks to compute it."""
    if plain_number(gold.strip("$ ")) is None or plain_number(answer) is not None:
        return False
    expression = _squeezed(answer.rpartition("=")[2])
    return bool(_OPERATION.search(expression)) and expression in _squeezed(question)


def _squeezed(text: str) -> str:
    """Returns an expression without spaces and with one sign for each operation."""
    for written, sign in _SIGNS.items():
        text = text.replace(written, sign)
    return "".join(text.split())


def plain_number(text: str) -> Fraction | None:
    """Returns the value of `-7`, `1.75`, `7/4` or `\\frac{7}{4}`; None for any other text."""
    if match := _FRACTION.fullmatch(text):
        text = f"{match[1]}{match[2]}/{match[3]}"
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None
