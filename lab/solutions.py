"""Worked solutions of a chain, one function a style; each ends with the boxed answer.

For `12+3-4+5`:

    totals   12+3=15;15-4=11;11+5=16;\\boxed{16}
    words    12 plus 3 is 15, 15 minus 4 is 11, 11 plus 5 is 16. \\boxed{16}
    signs    +12+3+5=15,20;-4=4;20-4=16;\\boxed{16}
    terse    \\boxed{16}

Each takes the addition that it works with, so that a solver who slips now and then can be written too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from operator import add
from random import Random

from lab.problems import Chain

Addition = Callable[[int, int], int]
Style = Callable[[Chain, Addition], str]

SLIPS = (-10, -2, -1, 1, 2, 10)
"""How far off a slip is."""


def slipping(rng: Random, chance: float) -> Addition:
    """An addition that is off by one of SLIPS with the given chance, and right otherwise; never below 0."""

    def slip(left: int, right: int) -> int:
        return max(0, left + right + (rng.choice(SLIPS) if rng.random() < chance else 0))

    return slip


def boxed(answer: int) -> str:
    """The form in which a final answer is given."""
    return f"\\boxed{{{answer}}}"


def totals(chain: Chain, addition: Addition = add) -> str:
    """One equation an operation."""
    running = tuple(accumulate(chain.terms, addition, initial=chain.start))
    steps = zip(pairwise(running), chain.terms, strict=True)
    return "".join(f"{before}{term:+d}={after};" for (before, after), term in steps) + boxed(running[-1])


def words(chain: Chain, addition: Addition = add) -> str:
    """One clause an operation."""
    running = tuple(accumulate(chain.terms, addition, initial=chain.start))
    clauses = (
        f"{before} {'plus' if term > 0 else 'minus'} {abs(term)} is {after}"
        for (before, after), term in zip(pairwise(running), chain.terms, strict=True)
    )
    return ", ".join(clauses) + ". " + boxed(running[-1])


def signs(chain: Chain, addition: Addition = add) -> str:
    """What is added and what is taken away, each summed up apart, then the difference."""
    added = (chain.start, *(term for term in chain.terms if term > 0))
    taken = tuple(-term for term in chain.terms if term < 0)
    lines, answer = _sum_up("+", added, addition)
    if taken:
        minus, less = _sum_up("-", taken, addition)
        difference = addition(answer, -less)
        lines, answer = f"{lines}{minus}{answer}-{less}={difference};", difference
    return lines + boxed(answer)


def _sum_up(sign: str, numbers: tuple[int, ...], addition: Addition) -> tuple[str, int]:
    """`+12+3+5=15,20;` and 20: the numbers, then their partial sums from the second on."""
    partial = list(accumulate(numbers, addition))
    left = "".join(f"{sign}{number}" for number in numbers)
    return f"{left}={','.join(map(str, partial[1:] or partial))};", partial[-1]


def terse(chain: Chain, addition: Addition = add) -> str:
    """The answer alone."""
    return boxed(tuple(accumulate(chain.terms, addition, initial=chain.start))[-1])


STYLES: Mapping[str, Style] = {"totals": totals, "words": words, "signs": signs, "terse": terse}
"""Every way of solving that a recipe can name."""
