"""The quick closure: what ANTLR learns with it is to the last configuration what it learns with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from antlr4.atn.PredictionMode import PredictionMode
from antlr4.dfa.DFA import DFA
from antlr4.PredictionContext import PredictionContextCache
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

from precompute.verify.grammar import Grammar
from precompute.verify.math import TYPICAL, normalized, plain_latex

EXAMPLES = Path(__file__).parent / "data" / "math_verify_examples.jsonl"
TEXTS = [json.loads(line)["answer"] for line in EXAMPLES.read_text("utf-8").splitlines()]


def stock(latex: str) -> Any:
    return _Latex2Sympy(is_real=True).create_parser(latex)


def quick(latex: str) -> Any:
    return Grammar(is_real=True)._parser(latex)


def learnt(parsers: Any, mode: PredictionMode, monkeypatch: pytest.MonkeyPatch) -> list[DFA]:
    """The automata after reading TEXTS, from nothing."""
    automata = [DFA(start, number) for number, start in enumerate(PSParser.atn.decisionToState)]
    monkeypatch.setattr(PSParser, "decisionsToDFA", automata)
    monkeypatch.setattr(PSParser, "sharedContextCache", PredictionContextCache())
    for text in (*TYPICAL, *TEXTS[::4]):
        parser = parsers(normalized(plain_latex(text)))
        parser._interp.predictionMode = mode
        try:
            parser.math()
        except Exception:  # noqa: BLE001  What the grammar raises.
            continue
    return automata


def described(automata: list[DFA]) -> list[Any]:
    states = [
        (automaton.decision, state)
        for automaton in automata
        for state in sorted(automaton.states, key=lambda state: state.stateNumber)
    ]
    return [
        (
            decision,
            [(str(c), c.reachesIntoOuterContext, c.precedenceFilterSuppressed) for c in state.configs],
            (state.isAcceptState, state.prediction, state.requiresFullContext),
            [edge and edge.stateNumber for edge in state.edges or []],
        )
        for decision, state in states
    ]


@pytest.mark.parametrize("mode", [PredictionMode.SLL, PredictionMode.LL])
def test_the_same_is_learnt_with_the_quick_closure(
    mode: PredictionMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = described(learnt(stock, mode, monkeypatch))
    assert described(learnt(quick, mode, monkeypatch)) == whole
    assert len(whole) > 300
