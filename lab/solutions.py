"""Worked solutions of a chain, one function a style; each ends with the boxed answer.

For `12+3-4+5`:

    totals   12+3=15;15-4=11;11+5=16;\\boxed{16}
    words    12 plus 3 is 15, 15 minus 4 is 11, 11 plus 5 is 16. \\boxed{16}
    signs    +12+3+5=15,20;-4=4;20-4=16;\\boxed{16}
    terse    \\boxed{16}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

from lab.problems import Chain

Style = Callable[[Chain], str]


def boxed(answer: int) -> str:
    """The form in which a final answer is given."""
    return f"\\boxed{{{answer}}}"


def totals(chain: Chain) -> str:
    """One equation an operation."""
    steps = zip(chain.totals, chain.terms, chain.totals[1:], strict=False)
    return "".join(f"{before}{term:+d}={after};" for before, term, after in steps) + boxed(chain.answer)


def words(chain: Chain) -> str:
    """One clause an operation."""
    steps = zip(chain.totals, chain.terms, chain.totals[1:], strict=False)
    clauses = (
        f"{before} {'plus' if term > 0 else 'minus'} {abs(term)} is {after}" for before, term, after in steps
    )
    return ", ".join(clauses) + ". " + boxed(chain.answer)


def signs(chain: Chain) -> str:
    """What is added and what is taken away, each summed up apart, then the difference."""
    added = (chain.start, *(term for term in chain.terms if term > 0))
    taken = tuple(-term for term in chain.terms if term < 0)
    lines = _sum_up("+", added)
    if taken:
        lines += _sum_up("-", taken) + f"{sum(added)}-{sum(taken)}={chain.answer};"
    return lines + boxed(chain.answer)


def _sum_up(sign: str, numbers: tuple[int, ...]) -> str:
    """`+12+3+5=15,20;`: the numbers, then their partial sums from the second on."""
    partial = list(accumulate(numbers))[1:] or list(numbers)
    return "".join(f"{sign}{number}" for number in numbers) + "=" + ",".join(map(str, partial)) + ";"


def terse(chain: Chain) -> str:
    """The answer alone."""
    return boxed(chain.answer)


STYLES: Mapping[str, Style] = {"totals": totals, "words": words, "signs": signs, "terse": terse}
"""Every way of solving that a recipe can name."""
