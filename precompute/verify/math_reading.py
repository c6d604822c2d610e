"""Reads an answer as a sympy object, with math-verify's grammar and with our own rules around it.

The one file that imports math_verify. Rules that the grammar does not have:

- A numeral with its base is a thing of its own: `101_2` is neither `101_3` nor `101`.
- `10:30` is a time, `2:3:4` a ratio; neither is a quotient.
- Ranges that are joined by "or" or "and" are one set.
- An equation gives a value only where its other side is a name, or where it is a true chain of numbers.
"""

from __future__ import annotations

import cmath
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from antlr4.atn.PredictionMode import PredictionMode  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import grader
from math_verify.parser import get_last_eq
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]
from sympy.logic.boolalg import Boolean  # type: ignore[import-untyped]

from precompute.verify.math_text import NAMED, numeral, plain_latex

KEPT_READINGS = 512
ROUNDED = 1e-6
"""Relative difference up to which the sides of a chain of numbers are equal."""

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
)
_NO_UNITS = replace(_NORMALIZATION, units=False)
_LAST_LETTER = re.compile(r"(?<=[\d}\s])[a-z]$")
_OPERATOR = re.compile(r"(?:\\cdot|\\times|[-+*/=])\s*$")
_COMMAND = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_CALCULATION = re.compile(r"[-+*/\d]|\\(?:times|cdot|div)(?![a-z])")
_CLOCK = re.compile(
    NAMED + r"([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?:\s|~|\\[ ,])*(?:\\(?:text|mathrm)\s*\{\s*)?"
    r"(?:([ap])\.?\s*m\.?)?\s*\}?",
    re.IGNORECASE,
)
_TERM = r"(?:[^:=<>,;\\{}]|\\(?:[dt]?frac|sqrt|pi)(?![a-z])|\{[^{}]*+\})++"
_RATIO = re.compile(rf"{NAMED}(?=.*\d)({_TERM}(?::{_TERM})+)")
_SET_BUILDER = re.compile(
    r"\\\{\s*[a-z](?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|\\vert|[|:])(.*?)\\\}", re.DOTALL
)
_JOINT = re.compile(
    r"(?:\\(?:text|mbox|mathrm)\s*\{[\s~,]*|\\|(?<![A-Za-z\\]))(or|lor|vee|and|land|wedge)(?![A-Za-z])[\s~,]*\}?"
)
_RANGE = re.compile(r"[<>\[\]]|\\(?:[lg]eq?|[lg]t|neq?|in|infty)(?![a-z])")

_MARK = sympy.Symbol("ratio")
CLOCK, _NUMERAL = sympy.Function("clock"), sympy.Function("base")


@lru_cache(maxsize=KEPT_READINGS)
def read_math(text: str) -> Any | None:
    """Returns the whole of `text` as a sympy object; None when it is not one, or not a definite one."""
    latex = plain_latex(text)
    if not latex:
        return None
    try:
        math_object = _read(latex)
        if not isinstance(math_object, sympy.Basic | sympy.MatrixBase):
            return None
        undefined = math_object.has(sympy.nan, sympy.zoo)
    except MemoryError:
        # It does not depend on the text alone: another worker may have room for it.
        raise
    except Exception:  # noqa: BLE001  The grammar raises bare Exception, sympy anything at all.
        return None
    return None if undefined else math_object


def _read(latex: str) -> Any:
    """Returns a numeral with its base, a time, a ratio, a range, or else what the grammar reads."""
    if found := numeral(latex):
        return sympy.Integer(found[0]) if found[1] == 10 else _NUMERAL(*found)
    if time := _CLOCK.fullmatch(latex):
        return _time(time)
    if ratio := _RATIO.fullmatch(latex):
        first, *others = (_read(term.strip()) for term in ratio[1].split(":"))
        return sympy.Tuple(_MARK, *(other / first for other in others))
    if latex.endswith("}\\%"):
        return _read(latex[:-2]) * sympy.UnevaluatedExpr(sympy.Rational(1, 100))
    if builder := _SET_BUILDER.fullmatch(latex):
        return _as_set(_read(builder[1].strip()))
    parts = [part.strip(" ,~") for part in _JOINT.split(latex)]
    if any(map(_RANGE.search, parts)) and all("=" in part or _RANGE.search(part) for part in parts[::2]):
        joints = {"or" if word in ("or", "lor", "vee") else "and" for word in parts[1::2]}
        ranges = [_read(part) for part in parts[::2]] if len(joints) == 1 else []
        if ranges and len(set.union(*(each.free_symbols for each in ranges))) <= 1:
            join = sympy.Union if joints == {"or"} else sympy.Intersection
            return join(*map(_as_set, ranges))
    return parse(normalized(latex))


def _time(match: re.Match[str]) -> Any:
    """Returns clock(seconds since midnight, 1); (seconds since midnight or noon, 0) where nothing tells."""
    hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
    half = (match[4] or "").lower()
    hours = hours % 12 + 12 * (half == "p") if half else hours
    return CLOCK((hours * 60 + minutes) * 60 + seconds, int(bool(half) or not 1 <= hours <= 12))


def _as_set(math_object: Any) -> Any:
    """Returns the solutions of an inequality or of `x = value`, and a set as it is."""
    value = value_of(math_object)
    if isinstance(value, Boolean):
        return value.as_set()
    return value if isinstance(value, sympy.Set) else sympy.FiniteSet(value)


def value_of(math_object: Any) -> Any | None:
    """Returns the value in `x = 5`, `5 = x`, `x = 2 + 3 = 5` and in a true chain of numbers, also inside a
    set or a tuple; None for other equations, and what has no equation as it is."""
    if not math_object.has(sympy.Eq):
        return math_object
    if isinstance(math_object, sympy.FiniteSet | sympy.Tuple):
        values = [value_of(part) for part in getattr(math_object, "_unsorted_args", math_object.args)]
        found = None if None in values else type(math_object)(*values)
        return found if found and len(found.args) == len(values) else None
    links: Sequence[Any] = [math_object]
    if isinstance(math_object, sympy.And):
        links = getattr(math_object, "_unsorted_args", math_object.args)
    if not all(isinstance(link, sympy.Eq) for link in links):
        return math_object
    sides = [links[0].lhs, *(link.rhs for link in links)]
    if _is_name(sides[0]) or _is_name(sides[-2]):
        return sides[-1]
    if _is_name(sides[-1]):
        return sides[-2]
    if not all(getattr(side, "is_number", False) for side in sides):
        return None
    numbers = [complex(side.evalf()) for side in sides]
    is_true = all(cmath.isclose(number, numbers[-1], rel_tol=ROUNDED) for number in numbers)
    return sides[-1] if is_true else None


def _is_name(side: Any) -> bool:
    """Returns True for a quantity in letters: `x`, `AB`, `f(2)`, `|AB|`, `\\frac{NO}{BO}`, `(p, q)`, not for
    `x + y`, `2x` and `n(n + 1)`."""
    if isinstance(side, AppliedUndef):
        return all(symbol.name != side.func.__name__.lower() for symbol in side.free_symbols)
    if isinstance(side, sympy.Pow):
        return bool(side.exp == -1 and _is_name(side.base))
    if not side.args:
        return bool(side.is_Symbol or side is sympy.E)
    return not isinstance(side, sympy.Add) and all(map(_is_name, side.args))


def normalized(latex: str) -> str:
    """Removes units, as math-verify does, except a letter that reads as a variable."""
    return str(normalize_latex(latex, _NO_UNITS if _ends_in_a_variable(latex) else _NORMALIZATION))


def _ends_in_a_variable(latex: str) -> bool:
    """Returns True for `2t` and `\\frac{1}{m} t`; in `5 m` and `x = 5 m` the letter may mean metres.
    math-verify drops all of them and takes 2t for 2."""
    match = _LAST_LETTER.search(latex)
    if match is None:
        return False
    before = latex[: match.start()]
    rest = _COMMAND.sub("", before.rpartition("=")[2])
    return bool(_OPERATOR.search(before)) or not rest.endswith(" ") or any(map(str.isalpha, rest))


class _Reader(_Latex2Sympy):  # type: ignore[misc]
    """latex2sympy's reader in one of ANTLR's prediction modes."""

    def __init__(self, latex: str, mode: PredictionMode) -> None:
        super().__init__(is_real=not grader.should_treat_as_complex(latex))
        self._mode = mode

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self._mode
        return parser


def parse(latex: str) -> Any:
    """Returns math-verify's reading of the whole text, or else of what follows the last equals sign, where
    a name is before it or at the beginning.

    SLL, tried first, "will either return the same parse tree that would be returned with LL, or report a
    syntax error" (ANTLR's documentation), in half the time. Raises ValueError where nothing can be read.
    """
    links = latex.split("=")
    has_name = not all(map(_CALCULATION.search, (links[0], *links[-2:-1])))
    for text in dict.fromkeys((latex, get_last_eq(latex) if has_name else latex)):
        for mode in (PredictionMode.SLL, PredictionMode.LL):
            try:
                return _Reader(text, mode).parse(text)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001  The grammar raises bare Exception, sympy anything at all.
                continue
    raise ValueError("no mathematics that the grammar knows")


def verify(gold: Any, answer: Any, **digits: int) -> bool:
    """Returns math-verify's verdict; an inequality and the set of its solutions are one, in either order."""
    return bool(grader.verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True, **digits))
