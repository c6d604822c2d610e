"""latex2sympy's grammar, read quickly. It runs in the workers alone, for verify_math.py.

Its ANTLR parser decides, token by token, which way to go through the grammar, and to decide is nearly all of
its time. What it decides hangs on the types of the tokens alone: the grammar has no predicates but those of
precedence, which its own way through the grammar settles. So

- of texts with the same types of tokens (`\\frac{7}{4}` and `\\frac{9}{2}`) the first is decided and the
  others go the same way;
- a new one is decided in ANTLR's SLL mode first, "which will either return the same parse tree that would be
  returned with LL, or report a syntax error" (its documentation at PredictionMode.SLL).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]
from antlr4.atn.PredictionMode import PredictionMode  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

from precompute.verify.closure import QuickSimulator

KEPT_SHAPES = 4_096
"""Sequences of token types of which a worker remembers the way through the grammar."""
SHAPE_TOKENS = 256
"""A longer text is decided anew each time."""

Shape = tuple[int, ...]
Way = tuple[int, ...]
"""The alternatives that were taken, one a decision."""


class Grammar(_Latex2Sympy):  # type: ignore[misc]
    """latex2sympy's reader of one text, as math-verify sets it up."""

    def create_parser(self, latex_str: str) -> Any:
        """What its `parse` asks for the tree. Raises what the grammar raises: Exception itself, too."""
        return _Tree(self._tree(latex_str))

    def parse_number(self, text: str) -> Any:
        """Whole numbers without the detour through Python's `eval` that sympy.Number takes."""
        return sympy.Integer(text) if text.isascii() and text.isdigit() else super().parse_number(text)

    def _tree(self, latex: str) -> Any:
        parser = self._parser(latex)
        shape = _shape(parser)
        if shape in _WAYS:
            return _followed(parser, _WAYS[shape])
        way: list[int] = []
        try:
            tree = _decided(parser, PredictionMode.SLL, way)
        except MemoryError:
            # Says nothing about the text.
            raise
        except Exception:  # noqa: BLE001  The grammar raises Exception itself.
            way = []
            tree = _decided(self._parser(latex), PredictionMode.LL, way)
        _remember(shape, tuple(way))
        return tree

    def _parser(self, latex: str) -> Any:
        parser = super().create_parser(latex)
        parser._interp = QuickSimulator(parser, parser.atn, parser.decisionsToDFA, parser.sharedContextCache)
        return parser


class _Tree:
    """Stands where `parse` expects a parser that has not begun."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def math(self) -> Any:
        return self._tree


_WAYS: dict[Shape, Way] = {}


def _shape(parser: Any) -> Shape:
    tokens = parser.getTokenStream()
    tokens.fill()
    return tuple(token.type for token in tokens.tokens)


def _decided(parser: Any, mode: PredictionMode, way: list[int]) -> Any:
    """The tree; what was decided is added to `way`."""
    decide = parser._interp.adaptivePredict
    parser._interp.predictionMode = mode

    def noted(*where: Any) -> int:
        way.append(decide(*where))
        return way[-1]

    parser._interp.adaptivePredict = noted
    return parser.math()


def _followed(parser: Any, way: Way) -> Any:
    """The tree of a text that goes a known way."""
    steps: Iterator[int] = iter(way)
    parser._interp.adaptivePredict = lambda *_: next(steps)
    return parser.math()


def _remember(shape: Shape, way: Way) -> None:
    if len(shape) > SHAPE_TOKENS:
        return
    if len(_WAYS) >= KEPT_SHAPES:
        del _WAYS[next(iter(_WAYS))]
    _WAYS[shape] = way
