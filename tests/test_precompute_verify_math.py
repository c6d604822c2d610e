"""What gold and answer say: the quick ways give what the whole grammar gives."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from math_verify.grader import verify
from math_verify.parser import parse_latex_cached

from precompute.verify import math as verify_math
from precompute.verify import math_reading
from precompute.verify.base import Outcome
from precompute.verify.math import agree, apart, compare
from precompute.verify.math_reading import parse, read_math
from precompute.verify.plain_numbers import compare_numbers

numbers = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.from_regex(r"-?[0-9]{1,7}\.[0-9]{1,7}", fullmatch=True).filter(str.isascii),
    st.from_regex(r"-?\\[dtc]?frac\{[0-9]{1,12}\}\{[1-9][0-9]{0,11}\}", fullmatch=True).filter(str.isascii),
    st.sampled_from(
        ["7/4", "1.75", "7.0", "7", "007", "-0", "0", "0.5", "1/3", "0.333333", "1e5", "x", "1/0"]
    ),
)


@settings(deadline=None, max_examples=100)
@given(numbers, numbers)
@example("7/4", "1.75")
@example("-0", "0.0")
@example("1.000001", "1.000002")
def test_plain_numbers_compare_without_the_grammar_as_with_it(gold: str, answer: str) -> None:
    for left, right in ((gold, answer), (gold, gold)):
        quick = compare_numbers(left, right)
        assert quick is None or quick.reason == compare(left, right).reason


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("\\frac{7}{4}", "1.75", "match"),
        ("-\\dfrac{1}{2}", "-0.5", "match"),
        ("007", "7", "match"),
        ("1.5", "1.6", "mismatch"),
        ("1/3", "33/100", "mismatch"),
        # Only the rules of rounding decide these, and what is no plain number is left to the grammar.
        ("1/3", "0.333333", None),
        ("2", "1,000", None),
        ("2", "\\frac{1}{0}", None),
        ("2", "1e5", None),
        ("2", "\u0663", None),
    ],
)
def test_plain_numbers_need_no_worker(gold: str, answer: str, reason: str | None) -> None:
    outcome = compare_numbers(gold, answer)
    assert (outcome and outcome.reason) == reason


def formulas() -> st.SearchStrategy[str]:
    atoms = st.one_of(st.integers(-9, 9).map(str), st.sampled_from(["x", "y", "\\pi", "0.5", "\\sqrt{2}"]))
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-"), inner).map(lambda p: f"({p[0]}){p[1]}({p[2]})"),
            st.tuples(inner, inner).map(lambda p: f"\\frac{{{p[0]}}}{{{p[1]}}}"),
            inner.map(lambda text: f"({text})^{{2}}"),
        ),
        max_leaves=4,
    )


@settings(deadline=None, max_examples=40)
@given(formulas())
@example("x^5 - x^4 + x - 1")  # which SLL alone cannot read
@example("\\frac{1}{4-x^{2}}")
def test_a_formula_is_read_as_math_verify_reads_it(latex: str) -> None:
    assert sympy.srepr(parse(latex)) == sympy.srepr(parse_latex_cached(latex))


@settings(deadline=None, max_examples=60)
@given(formulas(), formulas())
def test_what_is_apart_is_no_match_for_math_verify_either(gold: str, answer: str) -> None:
    left, right = read_math(gold), read_math(answer)
    if left is None or right is None:
        return
    if apart(left, right):
        assert not verify(left, right, timeout_seconds=None)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2", "3"),
        ("x^2+1", "x^2+2"),
        ("\\sqrt{2}", "1.41"),
        ("f(n) = 2n+1", "f(n) = 2n+3"),
        ("x = 5", "x = 6"),
        ("a+b", "a-b"),
        ("x = 5", "y = 5"),
        ("x = 5", "6"),
        ("5", "x = 6"),
        ("MR = SRMC", "MR = SRMC + 1"),
        ("x + y = 3", "x + 2y = 3"),
        ("y = 2x+1", "2y = 2x+1"),
        ("N(n) = \\lfloor \\frac{2n}{3} \\rfloor", "N(n) = \\lfloor \\frac{2n}{6} \\rfloor"),
        ("\\{1, 2, 3\\}", "\\{1, 2, 4\\}"),
        ("(1, 2, 3)", "(1, 3, 2)"),
    ],
)
def test_clear_differences_need_no_simplify(gold: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_math, "verify", lambda *_, **__: pytest.fail("math-verify was asked"))
    assert not agree(read_math(gold), read_math(answer))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("a+2b-a", "2b"),  # b must have one value on both sides, whatever other letters there are
        ("28\\%", "28"),
        ("\\text{abc}", "abc"),
        ("x=5", "5"),
        ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"),
        ("1/3", "0.333333"),
        ("10^{20}", "10^{20}"),
        ("\\frac{0}{5}", "0"),
        ("f(x)", "f(x)"),
        ("e^{2 i t}", "e^{2it}"),
        ("\\{1, 2, x\\}", "\\{x, 2, 1\\}"),
        ("(1, \\frac{1}{2}, 3)", "(1, 0.5, 3)"),
        ("y = 2x", "y = x + x"),
        ("x^2 + y = 3", "y = 3 - x^2"),
        ("x + y = 3", "y + x - 3 = 0"),
    ],
)
def test_what_may_be_equal_is_never_apart(gold: str, answer: str) -> None:
    assert not apart(read_math(gold), read_math(answer))
    assert agree(read_math(gold), read_math(answer))


def test_small_sides_hold_only_where_they_are_equal() -> None:
    # The line through x = 0 and 1 meets zero at 25, where 10^-9 * 625 and 10^-9 * 25 are near, not equal.
    assert not apart(read_math("10^{-9}x^2 = 10^{-9} \\cdot 25"), read_math("x^2 = 25"))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2t", "2*t"),
        ("x^{2}t", "t*x**2"),
        ("\\frac{1}{m} t", "1*t/m"),
        ("2 \\cdot c", "2*c"),
        ("x = m", "Eq(x, m)"),
        ("5 m", "5"),
        ("5 cm", "5"),
        ("5cm", "5"),
        ("12\\pi m", "12*pi"),
        ("x = 5 m", "Eq(x, 5)"),
        ("15\\text{ cm}^2", "15"),
    ],
)
def test_a_letter_is_a_unit_only_after_a_space_and_a_number(text: str, meant: str) -> None:
    assert str(read_math(text)) == meant


def test_what_was_read_is_said() -> None:
    assert compare("\\frac{7}{4}", "1.75") == Outcome("match", "", "7/4", "1.75000000000000")
    assert compare("5", "{" * 9) == Outcome("mismatch", "the answer cannot be parsed", "5")
    assert compare("1/0", "1/0") == Outcome("gold_unparseable", "the gold answer cannot be parsed")


def test_what_was_read_is_cut_and_what_cannot_be_written_is_named() -> None:
    assert compare("1", "x+" * 900 + "x").parsed_answer == "x + " * 250
    # Python writes no integer of more than 4,300 digits.
    assert compare("5", "10^{5000}").parsed_answer in ("10**5000", "<Integer>")


def test_no_room_says_nothing_about_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(latex: str) -> Any:
        raise MemoryError

    monkeypatch.setattr(math_reading, "parse", no_room)
    with pytest.raises(MemoryError):
        read_math("x + 17 y")
