"""Compares a gold answer and an answer as mathematics, with math-verify's grammar and comparison.

The one file that imports math_verify (and with it sympy). It runs in the workers only (worker.py), because
reading or comparing what a model wrote may take forever. It departs from math-verify's own `parse` and
`verify` in four ways, so that a match means equality:

- The whole text is parsed and nothing is searched in it: no number is picked out of a sentence, and no part
  of `10^10^10^10` can match.
- Digits separated by a space are thousands, a mixed number or an error, and `2(3)` is a product;
  math-verify reads `4 2` as 6 and `2(3)` as 5.
- A letter is a unit only after a space and a number: `2t` is not 2.
- Numbers agree in six decimals *and* six significant digits; math-verify's absolute rounding takes
  10^{-20} for 10^{-22}.

And so that it is quick: readings are cached, the quick mode of the grammar comes first, and a difference that
shows in numbers needs no `simplify`.
"""

from __future__ import annotations

import cmath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import mpmath  # type: ignore[import-untyped]
import sympy  # type: ignore[import-untyped]
from antlr4.atn.PredictionMode import PredictionMode  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify.grader import should_treat_as_complex, verify
from math_verify.parser import get_last_eq
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

from precompute.verify.base import Outcome

SHOWN_CHARS = 1_000
KEPT_READINGS = 512
CLEARLY = 1e-5
"""Relative difference above which two values are not roundings of one another; math-verify's own limit is
1e-6, absolute."""
HOLDS = 1e-9
"""Relative difference up to which two sides are equal."""
POINTS = (
    (1.1357, 0.7321, 2.2389, 1.6431, 0.4142, 3.3166),
    (17.3205, 12.1655, 31.6228, 23.4307, 9.5394, 41.8330),
)
"""Points at which formulas are compared: positive, without special values."""
DECIMALS = 6
"""math-verify's own default for comparing decimals; here it holds for significant digits, too."""

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
)
_NO_UNITS = replace(_NORMALIZATION, units=False)
_LAST_LETTER = re.compile(r"(?<=[\d}\s])[a-z]$")
_OPERATOR = re.compile(r"(?:\\cdot|\\times|[-+*/=])\s*$")
_COMMAND = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_SYMBOLS = str.maketrans(
    {"−": "-", "×": "\\times ", "÷": "\\div ", "·": "\\cdot ", "∞": "\\infty ", "√": "\\sqrt ", "∈": "\\in "}
    | {"°": "^\\circ ", "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "∪": "\\cup ", "∩": "\\cap "}
    | {"²": "^2", "³": "^3", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
    | dict.fromkeys("€£¥₹", "")
)
_UPRIGHT = re.compile(r"\\(?:mathrm|operatorname)\s*\{\s*([ei])\s*\}")
_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_LEAD_IN = re.compile(r"^(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*[:=])\s*:?", re.IGNORECASE)
_SPACE = r"(?:\\[,;:! ]|~|\s|\{,\})"
_NUMBER_BEGINS = r"(?<![\w.,^\\])(?<!frac )(?<!binom )"
_THOUSANDS = re.compile(rf"{_NUMBER_BEGINS}\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)")
_MIXED_NUMBER = re.compile(rf"{_NUMBER_BEGINS}(\d+){_SPACE}+(\d+)\s*/\s*(\d+)(?![\d.])")
_FACTOR = r"\(\s*-?[\d.]+\s*\)|\\[dt]?binom"
_PRODUCT = re.compile(rf"((?<![\w.\\])\d[\d.]*(?=\s*(?:{_FACTOR}))|\)(?=\s*(?:{_FACTOR}|\\[dtc]?frac)))")
_NO_NUMBER = re.compile(rf"{_NUMBER_BEGINS}\d[\d.]*{_SPACE}+\d|\.\d+\.\d")
_EXPONENT = re.compile(r"(?<=\d)[eE]([-+]?\d+)(?![\d.])")
_BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.])")
_DOUBLE_POWER = re.compile(r"\^\s*(?:-?\w+|\{[^{}]*\})\s*\^")

_UNCLEAR = (
    # Of 28 % math-verify makes 28; the others have no value, or one that takes long.
    *(sympy.UnevaluatedExpr, sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product),
    *(sympy.Limit, sympy.MatrixExpr, sympy.Determinant, sympy.Trace),
)


def compare(gold: str, answer: str) -> Outcome:
    """Returns `match`, `mismatch` or `gold_unparseable`."""
    gold_math, answer_math = read_math(gold), read_math(answer)
    if gold_math is None:
        return Outcome("gold_unparseable", "the gold answer cannot be parsed")
    if answer_math is None:
        return Outcome("mismatch", "the answer cannot be parsed", _shown(gold_math))
    reason = "match" if agree(gold_math, answer_math) else "mismatch"
    return Outcome(reason, "", _shown(gold_math), _shown(answer_math))


def _shown(math_object: Any) -> str:
    """Returns sympy's text of an object, cut to SHOWN_CHARS; the type of one that it cannot write, e.g. of an
    integer of more than 4,300 digits."""
    try:
        return str(math_object)[:SHOWN_CHARS]
    except (ValueError, RecursionError):
        return f"<{type(math_object).__name__}>"


@lru_cache(maxsize=KEPT_READINGS)
def read_math(text: str) -> Any | None:
    """Returns the whole of `text` as a sympy object; None when it is not one, or not a definite one."""
    latex = plain_latex(text)
    if not latex or _NO_NUMBER.search(latex) or _DOUBLE_POWER.search(latex):
        return None
    try:
        math_object = parse(normalized(latex))
        if not isinstance(math_object, sympy.Basic | sympy.MatrixBase):
            return None
        undefined = math_object.has(sympy.nan, sympy.zoo)
    except MemoryError:
        # It does not depend on the text alone: another worker may have room for it.
        raise
    except Exception:  # noqa: BLE001  The grammar raises bare Exception, sympy anything at all.
        return None
    return None if undefined else math_object


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
        super().__init__(is_real=not should_treat_as_complex(latex))
        self._mode = mode

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self._mode
        return parser


def parse(latex: str) -> Any:
    """Returns math-verify's reading of the whole text, or else of what follows the last equals sign.

    SLL, tried first, "will either return the same parse tree that would be returned with LL, or report a
    syntax error" (ANTLR's documentation), in half the time. Raises ValueError where nothing can be read.
    """
    for text in dict.fromkeys((latex, get_last_eq(latex))):
        for mode in (PredictionMode.SLL, PredictionMode.LL):
            try:
                return _Reader(text, mode).parse(text)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001  The grammar raises bare Exception, sympy anything at all.
                continue
    raise ValueError("no mathematics that the grammar knows")


def plain_latex(text: str) -> str:
    """Returns `text` without its wrapping ($, \\(, \\boxed, "The answer is"), numbers written in one way."""
    text = _unwrap(text.translate(_SYMBOLS)).replace("\\left(", "(").replace("\\right)", ")")
    # math-verify takes these for units and drops them: 2i is 2 to it, and 1 - 1/e is 1 + 1/e.
    text = _UPRIGHT.sub(r"\1 ", text)
    text = _THOUSANDS.sub(lambda match: re.sub(_SPACE, "", match[0]), text)
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    text = _PRODUCT.sub(r"\1 \\times ", text)
    text = _EXPONENT.sub(r" \\times 10^{\1}", text)
    return _BARE_POINT.sub("", text).strip()


def _unwrap(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = _LEAD_IN.sub("", text.strip(), count=1).strip()
        if text[-1:] in (".", ",", ";", ":") and text[-2:-1] not in (".", "\\"):
            text = text[:-1]
        for left, right in _WRAPPINGS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner
        text = _unbox(text)
    return text


def _unbox(text: str) -> str:
    match = re.match(r"\\(?:boxed|fbox)\s*\{", text)
    if match is None or not text.endswith("}"):
        return text
    inner, depth = text[match.end() : -1], 0
    for brace in re.findall(r"(?<!\\)[{}]", inner):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return text
    return inner


def agree(gold: Any, answer: Any) -> bool:
    """Returns math-verify's verdict, limited to six significant digits and to equations with a solution."""
    if gold is answer:
        return True
    gold, answer = _with_common_symbols(gold, answer)
    if apart(gold, answer) or not verify(gold, answer, timeout_seconds=None):
        return False
    smallest = min((*_magnitudes(gold), *_magnitudes(answer)), default=mpmath.mpf(1))
    extra = max(0, -1 - int(mpmath.floor(mpmath.log10(smallest))))
    if extra and not verify(
        gold, answer, float_rounding=DECIMALS + extra, numeric_precision=15 + extra, timeout_seconds=None
    ):
        return False
    return not _is_vacuous(gold, answer)


def _with_common_symbols(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Returns both with one symbol a name: the grammar takes the letters of `2 i t` for complex, those of
    `2it` for real, and math-verify finds them different."""
    symbols = gold.free_symbols | answer.free_symbols
    if len(symbols) == len({symbol.name for symbol in symbols}):
        return gold, answer
    common = {symbol: sympy.Symbol(symbol.name) for symbol in symbols}
    return gold.xreplace(common), answer.xreplace(common)


def apart(gold: Any, answer: Any) -> bool:
    """Returns True for numbers or formulas whose values clearly differ at a point, equations of which one
    does not hold where the other does, and collections of such. math-verify would find no equality either,
    after a long `simplify` or `solve`."""
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, sympy.FiniteSet):
        return any(all(apart(one, other) for other in answer.args) for one in gold.args)
    if isinstance(gold, sympy.Tuple) and isinstance(answer, sympy.Tuple):
        return any(map(apart, gold.args, answer.args))
    if isinstance(gold, sympy.Rational) and isinstance(answer, sympy.Rational):
        return bool(gold != answer)
    if isinstance(gold, sympy.Eq) is not isinstance(answer, sympy.Eq):
        # x = 5 and 5 are one to math-verify.
        return apart(*(side.rhs if isinstance(side, sympy.Eq) else side for side in (gold, answer)))
    # A letter may stand for a product of letters, and of 28 % math-verify makes 28.
    if not (_is_clear(gold) and _is_clear(answer)) or gold.is_Symbol or answer.is_Symbol:
        return False
    gold, answer = _without_calls(gold), _without_calls(answer)
    return any(_apart_at(gold, answer, point) for point in POINTS)


def _is_clear(formula: Any) -> bool:
    sides = formula.args if isinstance(formula, sympy.Eq) else (formula,)
    return all(isinstance(side, sympy.Expr) for side in sides) and not formula.has(*_UNCLEAR)


def _without_calls(formula: Any) -> Any:
    """Replaces each f(x) by a symbol of its own: nothing more is known of it."""
    calls = formula.atoms(AppliedUndef)
    return formula.xreplace({call: sympy.Symbol(str(call)) for call in calls}) if calls else formula


def _apart_at(gold: Any, answer: Any, coordinates: Sequence[float]) -> bool:
    names = sorted({symbol.name for symbol in gold.free_symbols | answer.free_symbols})
    point = dict(zip(names, map(sympy.Float, coordinates), strict=False))
    try:
        if isinstance(gold, sympy.Eq):
            return _fails(answer, gold, point) or _fails(gold, answer, point)
        return _differ(_value(gold, point), _value(answer, point))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return False


def _fails(equation: Any, other: Any, point: Mapping[str, Any]) -> bool:
    """Returns True where an equation fails at a point of `other`: one moved along a coordinate until `other`
    holds, which a straight line finds where `other` is linear in it."""
    for symbol in sorted(other.free_symbols, key=str):
        zero, one = (
            _value(other.lhs - other.rhs, {**point, symbol.name: sympy.Integer(value)}) for value in (0, 1)
        )
        if zero == one:
            continue
        moved = {**point, symbol.name: sympy.sympify(zero / (zero - one))}
        left, right = _value(other.lhs, moved), _value(other.rhs, moved)
        if abs(left - right) <= HOLDS * max(abs(left), abs(right)):
            return _differ(_value(equation.lhs, moved), _value(equation.rhs, moved))
    return False


def _differ(left: complex, right: complex) -> bool:
    return abs(left - right) > CLEARLY * max(1.0, abs(left), abs(right))


def _value(formula: Any, point: Mapping[str, Any]) -> complex:
    """Returns the value at a point given by the symbols' names; KeyError, TypeError or ValueError where it
    has none."""
    value = complex(formula.evalf(15, subs={symbol: point[symbol.name] for symbol in formula.free_symbols}))
    if not cmath.isfinite(value):
        raise ValueError("no finite value at that point")
    return value


def _magnitudes(math_object: Any) -> Iterator[Any]:
    """Yields the absolute values of the numbers in an object, except zero and infinity."""
    if isinstance(math_object, sympy.MatrixBase):
        for entry in math_object.flat():
            yield from _magnitudes(entry)
    elif getattr(math_object, "is_number", False):
        size = sympy.Abs(math_object.doit().evalf()).evalf()
        if size.is_Float and size.is_finite and size > 0:
            yield size._to_mpmath(53)
    else:
        for part in getattr(math_object, "args", ()):
            yield from _magnitudes(part)


def _is_vacuous(gold: Any, answer: Any) -> bool:
    """Returns True for two different equations without a solution, which math-verify takes for equal."""
    if not (isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq)):
        return False
    if not all(isinstance(side, sympy.Expr) for side in (*gold.args, *answer.args)):
        return False
    if verify(gold.lhs - gold.rhs, answer.lhs - answer.rhs, timeout_seconds=None):
        return False
    return not sympy.solve(gold, gold.free_symbols)
