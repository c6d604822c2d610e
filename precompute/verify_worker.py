"""The judge's own process: parses mathematics, compares it, and may be killed at any moment.

`precompute.verify` starts this file by its path and speaks lines of JSON with it over the pipes:

    -> {"gold": "\\\\frac{7}{4}", "answer": "1.75", "timeout": 5.0}      answer null: only parse the gold
    <- {"reason": "taken", "detail": ""}                                at once, or it died while idle
    <- {"reason": "match", "detail": ""}

The one file that imports math_verify (and with it sympy). It imports nothing of ours, so that it runs
whatever the parent's directory is. How it departs from `math_verify.parse`, so that a match means equality:

- The whole text is parsed, nothing is searched in it: no number is picked out of a sentence, and of
  `10^10^10^10` no part can match. Python's `eval` (sympy's `parse_expr`) is never reached.
- Digits that a space parts are thousands, a mixed number or an error, and `2(3)` is a product;
  math-verify reads `4 2` as 6 and `2(3)` as 5.
- Numbers agree in six decimals *and* six significant digits; math-verify's absolute rounding takes
  10^{-20} for 10^{-22}.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import queue
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import mpmath  # type: ignore[import-untyped]
import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify.grader import verify
from math_verify.parser import parse_latex_cached

DECIMALS = 6
"""math-verify's own default for comparing decimals; here it holds for significant digits, too."""

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
)
_SYMBOLS = str.maketrans(
    {"−": "-", "×": "\\times ", "÷": "\\div ", "·": "\\cdot ", "∞": "\\infty ", "√": "\\sqrt ", "∈": "\\in "}
    | {"°": "^\\circ ", "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "∪": "\\cup ", "∩": "\\cap "}
    | {"²": "^2", "³": "^3", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
    | dict.fromkeys("€£¥₹", "")
)
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


def judge(gold: str, answer: str | None) -> tuple[str, str]:
    """(reason, detail) for one pair; `parsed` for a gold alone that can be parsed."""
    gold_math = read_math(gold)
    if gold_math is None:
        return "gold_unparseable", "the gold answer cannot be parsed"
    if answer is None:
        return "parsed", ""
    answer_math = read_math(answer)
    if answer_math is None:
        return "mismatch", "the answer cannot be parsed"
    return ("match", "") if agree(gold_math, answer_math) else ("mismatch", "")


def read_math(text: str) -> Any | None:
    """The sympy object that the whole of `text` says; None when it says none, or no definite one."""
    latex = plain_latex(text)
    if not latex or _NO_NUMBER.search(latex) or _DOUBLE_POWER.search(latex):
        return None
    try:
        math_object = parse_latex_cached(normalize_latex(latex, _NORMALIZATION))
        if not isinstance(math_object, sympy.Basic | sympy.MatrixBase):
            return None
        undefined = math_object.has(sympy.nan, sympy.zoo)
    except Exception:  # noqa: BLE001  The grammar raises bare Exception, sympy anything at all.
        return None
    return None if undefined else math_object


def plain_latex(text: str) -> str:
    """`text` without its wrapping ($, \\(, \\boxed, "The answer is"), numbers written in one way."""
    text = _unwrap(text.translate(_SYMBOLS)).replace("\\left(", "(").replace("\\right)", ")")
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
    """math-verify's verdict, held to six significant digits and to equations that say something."""
    if not verify(gold, answer, timeout_seconds=None):
        return False
    smallest = min((*_magnitudes(gold), *_magnitudes(answer)), default=mpmath.mpf(1))
    extra = max(0, -1 - int(mpmath.floor(mpmath.log10(smallest))))
    if extra and not verify(
        gold, answer, float_rounding=DECIMALS + extra, numeric_precision=15 + extra, timeout_seconds=None
    ):
        return False
    return not _is_vacuous(gold, answer)


def _magnitudes(math_object: Any) -> Iterator[Any]:
    """The absolute values of the numbers in it, zero and infinity left out."""
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
    """Two different equations without a solution: math-verify finds all of their no solutions equal."""
    if not (isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq)):
        return False
    if not all(isinstance(side, sympy.Expr) for side in (*gold.args, *answer.args)):
        return False
    if verify(gold.lhs - gold.rhs, answer.lhs - answer.rhs, timeout_seconds=None):
        return False
    return not sympy.solve(gold, gold.free_symbols)


def main(memory_mb: int) -> None:
    """Serves requests until the parent's end of the pipe closes."""
    replies = _claim_stdout()
    _die_with_parent()
    _limit(resource.RLIMIT_AS, memory_mb * 2**20)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    _reply(replies, "ready", "")
    while True:
        request = requests.get()
        _reply(replies, "taken", "")
        # Where the parent's death sends no signal, this still ends a computation nobody waits for.
        _limit(resource.RLIMIT_CPU, math.ceil(sum(os.times()[:2]) + request["timeout"]) + 5)
        try:
            reason, detail = judge(request["gold"], request["answer"])
        except Exception as error:  # noqa: BLE001  sympy raises anything; the verdict names it.
            reason, detail = "error", f"{type(error).__name__} while comparing"
        _reply(replies, reason, detail)


def _claim_stdout() -> BinaryIO:
    """The pipe to the parent; whatever a library prints goes nowhere instead."""
    replies = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    return replies


def _reply(replies: BinaryIO, reason: str, detail: str) -> None:
    replies.write(json.dumps({"reason": reason, "detail": detail}).encode() + b"\n")
    replies.flush()


def _read_requests(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _limit(what: int, amount: int) -> None:
    # macOS refuses some limits; the deadline still holds there.
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (amount, resource.getrlimit(what)[1]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
