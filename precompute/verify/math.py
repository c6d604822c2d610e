"""Compares a gold answer and an answer as mathematics, with math-verify's grammar and comparison.

It runs in the workers only (worker.py), because reading or comparing what a model wrote may take forever. It
departs from math-verify's own `parse` and `verify`, so that a match means equality:

- The whole text is parsed and nothing is searched in it: no number is picked out of a sentence, and no part
  of `10^10^10^10` can match.
- Digits separated by a space are thousands, a mixed number or an error, and `2(3)` is a product;
  math-verify reads `4 2` as 6 and `2(3)` as 5. More rules of the text are in math_text.py.
- Bases, times, ratios, equations and joined ranges have rules of their own (math_reading.py).
- A letter is a unit only after a space and a number: `2t` is not 2.
- Numbers agree in six decimals *and* six significant digits; math-verify's absolute rounding takes
  10^{-20} for 10^{-22}.

And so that it is quick: readings are cached, the quick mode of the grammar comes first, and a difference that
shows in numbers needs no `simplify`.
"""

from __future__ import annotations

import cmath
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mpmath  # type: ignore[import-untyped]
import sympy  # type: ignore[import-untyped]
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

from precompute.verify.base import Outcome
from precompute.verify.math_reading import CLOCK, read_math, value_of, verify
from precompute.verify.math_text import option_of

SHOWN_CHARS = 1_000
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

_UNCLEAR = (
    # Of 28 % math-verify makes 28; the others have no value, or one that takes long.
    *(sympy.UnevaluatedExpr, sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product),
    *(sympy.Limit, sympy.MatrixExpr, sympy.Determinant, sympy.Trace),
)


def compare(gold: str, answer: str) -> Outcome:
    """Returns `match`, `mismatch` or `gold_unparseable`.

    Of a choice such as `(A)\\ 12` either half is enough, and none may be wrong.
    """
    (gold_letter, gold_text), (answer_letter, answer_text) = option_of(gold), option_of(answer)
    if gold_letter and answer_letter:
        if gold_letter != answer_letter or gold_text == answer_text or not (gold_text and answer_text):
            reason = "match" if gold_letter == answer_letter else "mismatch"
            return Outcome(reason, "", gold_letter, answer_letter)
    elif gold_text and answer_text:
        gold, answer = gold_text, answer_text
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


def agree(gold: Any, answer: Any) -> bool:
    """Returns math-verify's verdict, limited to six significant digits and to equations with a solution."""
    if gold is answer:
        return True
    if isinstance(gold, CLOCK) and isinstance(answer, CLOCK):
        half_days = 2 if gold.args[1] and answer.args[1] else 1
        return bool((gold.args[0] - answer.args[0]) % (half_days * 12 * 3600) == 0)
    gold, answer = _with_common_symbols(gold, answer)
    if not all(each.has(sympy.Eq) and each.free_symbols for each in (gold, answer)):
        # x = 5 and 5 are one; x + 3 = 5 and 5 are not.
        gold, answer = value_of(gold), value_of(answer)
    if gold is None or answer is None or apart(gold, answer):
        return False
    if not verify(gold, answer):
        return _equal_where_real(gold, answer)
    smallest = min((*_magnitudes(gold), *_magnitudes(answer)), default=mpmath.mpf(1))
    extra = max(0, -1 - int(mpmath.floor(mpmath.log10(smallest))))
    if extra and not verify(gold, answer, float_rounding=DECIMALS + extra, numeric_precision=15 + extra):
        return False
    return not _is_vacuous(gold, answer)


def _equal_where_real(gold: Any, answer: Any) -> bool:
    """Returns True for formulas with roots that are equal for positive letters, and for other signs both
    real and equal, or neither real: \\sqrt{1/n} and 1/\\sqrt{n}, not \\sqrt{n^2} and n."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    formulas = [gold, answer]
    if not 0 < len(symbols) <= len(POINTS[0]) or not all(isinstance(each, sympy.Expr) for each in formulas):
        return False
    if all(power.exp.is_integer for each in formulas for power in each.atoms(sympy.Pow)):
        return False
    positive = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in symbols}
    if sympy.simplify((gold - answer).xreplace(positive)) != 0:
        return False
    for signs in itertools.islice(itertools.product((1, -1), repeat=len(symbols)), 1, None):
        at = map(sympy.Float, map(operator.mul, signs, POINTS[0]))
        point = dict(zip((symbol.name for symbol in symbols), at, strict=False))
        try:
            left, right = (_value(each, point) for each in formulas)
        except (TypeError, ValueError, ArithmeticError):
            return False
        are_real = [abs(value.imag) <= HOLDS * abs(value) for value in (left, right)]
        if are_real[0] is not are_real[1] or (all(are_real) and _differ(left, right)):
            return False
    return True


def _with_common_symbols(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Returns both with one symbol a name, and i for the letter i: the grammar takes the letters of `2 i t`
    for complex, those of `2it` for real, and math-verify finds them different."""
    symbols = gold.free_symbols | answer.free_symbols
    names = {symbol.name for symbol in symbols}
    if len(symbols) == len(names) and "i" not in names:
        return gold, answer
    common = {symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name) for symbol in symbols}
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
        gold, answer = value_of(gold), value_of(answer)
        return gold is None or answer is None or apart(gold, answer)
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
    if verify(gold.lhs - gold.rhs, answer.lhs - answer.rhs):
        return False
    return not sympy.solve(gold, gold.free_symbols)
