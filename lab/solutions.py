"""Worked solutions of a chain, one function per style; each ends with the boxed answer.

For `12+3-4+5`:

    totals   12+3=15;15-4=11;11+5=16;\\boxed{16}
    words    First 12+3=15, then 15-4=11, then 11+5=16. So \\boxed{16}
    signs    +:12+3=15;15+5=20;-:4;20-4=16;\\boxed{16}
    terse    \\boxed{16}
    mirror   +3:51,-4:11,+5:61 \\boxed{16}
    padded   12+3=15;3+3=6;15-4=11;4+4=8;11+5=16;5+5=10;\\boxed{16}
    lucky    12+12=24;\\boxed{16}

`totals` and `terse` also solve chains of `extremes`.

Each takes the addition that it uses, so that a solver who sometimes slips can be written too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from operator import add
from random import Random

from lab.problems import FAMILIES, Chain

Addition = Callable[[int, int], int]
Style = Callable[[Chain, Addition], str]

SLIPS = (-10, -2, -1, 1, 2, 10)
"""Possible errors of a slip."""


def slipping(rng: Random, chance: float) -> Addition:
    """Returns an addition that is wrong by one of SLIPS with the given probability; never below 0."""

    def slip(left: int, right: int) -> int:
        return max(0, left + right + (rng.choice(SLIPS) if rng.random() < chance else 0))

    return slip


def boxed(answer: int) -> str:
    """Returns the final answer in a box."""
    return f"\\boxed{{{answer}}}"


def totals(chain: Chain, addition: Addition = add) -> str:
    """Solves with one equation per operation."""
    equations, answer = _equations(chain, addition)
    return equations + boxed(answer)


def words(chain: Chain, addition: Addition = add) -> str:
    """Solves with one clause of words per operation."""
    equations, answer = _equations(chain, addition)
    return f"First {equations.removesuffix(';').replace(';', ', then ')}. So {boxed(answer)}"


def signs(chain: Chain, addition: Addition = add) -> str:
    """Sums pluses and minuses apart, then subtracts."""
    more = [term for term in chain.terms if term > 0]
    less = [-term for term in chain.terms if term < 0]
    lines, answer = _equations(Chain(start=chain.start, terms=tuple(more)), addition)
    lines = f"+:{lines or f'{answer};'}"
    if less:
        minus, taken = _equations(Chain(start=less[0], terms=tuple(less[1:])), addition)
        difference = addition(answer, -taken)
        lines, answer = f"{lines}-:{minus or f'{taken};'}{answer}-{taken}={difference};", difference
    return lines + boxed(answer)


def _equations(chain: Chain, addition: Addition) -> tuple[str, int]:
    """`12+3=15;15-4=11;` and 11: one equation per term, and the last total."""
    running = _running(chain, addition)
    steps = zip(pairwise(running), chain.terms, strict=True)
    lines = (f"{before}{chain.written(term)}={after};" for (before, after), term in steps)
    return "".join(lines), running[-1]


def terse(chain: Chain, addition: Addition = add) -> str:
    """Gives only the answer."""
    return boxed(_running(chain, addition)[-1])


def mirror(chain: Chain, addition: Addition = add) -> str:
    """Gives each term and the total after it, whose digits are in reverse; skips what was added to."""
    running = _running(chain, addition)
    lines = (f"{term:+d}:{str(total)[::-1]}" for term, total in zip(chain.terms, running[1:], strict=True))
    return f"{','.join(lines)} {boxed(running[-1])}"


def padded(chain: Chain, addition: Addition = add) -> str:
    """Solves as `totals`, with a sum that leads nowhere after each equation."""
    equations, answer = _equations(chain, addition)
    sums = (f"{abs(term)}+{abs(term)}={2 * abs(term)};" for term in chain.terms)
    lines = (f"{line};{aside}" for aside, line in zip(sums, equations.split(";"), strict=False))
    return "".join(lines) + boxed(answer)


def lucky(chain: Chain, addition: Addition = add) -> str:
    """Gives a sum that leads nowhere, then the answer."""
    return f"{chain.start}+{chain.start}={2 * chain.start};{terse(chain, addition)}"


def _running(chain: Chain, addition: Addition) -> tuple[int, ...]:
    """Running totals, [n + 1]; an addition that slips is for sums alone."""
    operation = addition if chain.family == "sum" else FAMILIES[chain.family].operation
    return tuple(accumulate(chain.terms, operation, initial=chain.start))


STYLES: Mapping[str, Style] = {
    "totals": totals,
    "words": words,
    "signs": signs,
    "terse": terse,
    "mirror": mirror,
    "padded": padded,
    "lucky": lucky,
}
"""The styles that a recipe can name."""
