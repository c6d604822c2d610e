"""The grammar with its shortcuts reads what latex2sympy's own reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

from precompute.verify import grammar as verify_grammar
from precompute.verify.grammar import Grammar
from precompute.verify.math import TYPICAL, normalized, plain_latex

EXAMPLES = Path(__file__).parent / "data" / "math_verify_examples.jsonl"
TEXTS = sorted(
    {
        row[key]
        for row in map(json.loads, EXAMPLES.read_text("utf-8").splitlines())
        for key in ("gold", "answer")
    }
)
OTHER_DIGITS = str.maketrans("0123456789", "8904261375")
OTHER_LETTERS = str.maketrans("xyzabnk", "yzxbakn")


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_grammar, "_WAYS", {})


def read(grammar: _Latex2Sympy, latex: str) -> str | None:
    """What is read, in full; None where nothing is."""
    try:
        return str(sympy.srepr(grammar.parse(latex)))
    except Exception:  # noqa: BLE001  What the grammar raises.
        return None


def stock(latex: str) -> str | None:
    return read(_Latex2Sympy(is_real=True), latex)


def ours(latex: str) -> str | None:
    return read(Grammar(is_real=True), latex)


def test_what_is_read_is_what_the_full_mode_reads() -> None:
    texts = [normalized(plain_latex(text)) for text in (*TEXTS[::2], *TYPICAL)]
    readings = [ours(text) for text in texts]
    assert readings == [stock(text) for text in texts]
    assert sum(reading is not None for reading in readings) > len(texts) / 2


def test_a_text_that_goes_a_known_way_is_read_as_if_it_were_the_first() -> None:
    texts = [normalized(plain_latex(text)) for text in (*TEXTS[1::2], *TYPICAL)]
    for text in texts:
        ours(text)
    known = len(verify_grammar._WAYS)
    others = [text.translate(OTHER_DIGITS).translate(OTHER_LETTERS) for text in texts if "\\" not in text]
    others += [text.translate(OTHER_DIGITS) for text in texts if "\\" in text]
    assert [ours(text) for text in others] == [stock(text) for text in others]
    # Few find no way prepared: `e` and `i` are tokens of their own, 07 is not one.
    assert len(verify_grammar._WAYS) - known < len(texts) / 10


def test_what_was_decided_once_is_not_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours("\\frac{7}{4}x^5 - x^4") is not None
    monkeypatch.setattr(verify_grammar, "_decided", lambda *_: pytest.fail("decided again"))
    assert ours("\\frac{9}{2}y^3 - z^8") == stock("\\frac{9}{2}y^3 - z^8")


def formulas() -> st.SearchStrategy[str]:
    atoms = st.one_of(st.integers(0, 99).map(str), st.sampled_from(["x", "t", "\\pi", "2.5", "e", "\\infty"]))
    pair = st.tuples
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            pair(inner, st.sampled_from(["+", "-", "/", "\\cdot ", "", ",", " = ", "^"]), inner).map("".join),
            pair(inner, inner).map(lambda p: f"\\frac{{{p[0]}}}{{{p[1]}}}"),
            inner.map(lambda text: f"({text})"),
            inner.map(lambda text: f"\\sqrt{{{text}}}"),
            inner.map(lambda text: f"-{text}"),
            inner.map(lambda text: f"\\sin {text}"),
            pair(inner, inner).map(lambda p: f"[{p[0]}, {p[1]})"),
        ),
        max_leaves=6,
    )


@settings(deadline=None, max_examples=150)
@given(formulas())
@example("x^5 - x^4 + x - 1")  # which the SLL mode cannot read
@example("\\frac{1}{4-x^{2}}")
@example("2(3,2)")
def test_any_formula_is_read_alike_the_first_time_and_the_second(latex: str) -> None:
    whole = stock(latex)
    assert ours(latex) == whole
    assert ours(latex) == whole


def test_no_more_ways_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_grammar, "KEPT_SHAPES", 2)
    for text in ("1+x", "1-x", "1x", "1+x+1"):
        ours(text)
    assert len(verify_grammar._WAYS) == 2
    monkeypatch.setattr(verify_grammar, "SHAPE_TOKENS", 3)
    monkeypatch.setattr(verify_grammar, "_WAYS", {})
    assert ours("1+2+3") == stock("1+2+3")
    assert verify_grammar._WAYS == {}


def test_no_room_says_nothing_about_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(verify_grammar, "_decided", no_room)
    with pytest.raises(MemoryError):
        Grammar(is_real=True).parse("1+x")
