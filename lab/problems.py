"""Problems of the lab: chains of operations, worked from the left, of two families.

    sum       12+3-4+5      ->  16   additions and subtractions of one digit
    extremes  34^27v81^45   ->  45   ^: the larger of both numbers, v: the smaller

The start and every running total have two digits, so that all chains of n operations are equally long.
Everything here is pure and seeded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from pathlib import Path
from random import Random

LOWEST_TOTAL, HIGHEST_TOTAL = 10, 99


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A start number and n signed single-digit terms."""

    start: int
    """10 to 99."""
    terms: tuple[int, ...]
    """Length n; each -9 to 9 and never 0, e.g. (3, -4, 5) for `12+3-4+5`. Of `extremes` two digits, negative
    for the smaller, e.g. (27, -81, 45) for `34^27v81^45`."""
    family: str = "sum"
    """A key of FAMILIES."""

    @property
    def question(self) -> str:
        """The user turn, e.g. `12+3-4+5`."""
        return str(self.start) + "".join(map(self.written, self.terms))

    def written(self, term: int) -> str:
        """Returns a term with its sign, e.g. `-4` or `v81`."""
        return FAMILIES[self.family].signs[term < 0] + str(abs(term))

    @property
    def totals(self) -> tuple[int, ...]:
        """Running totals, [n + 1]; the first is the start, the last the answer."""
        return tuple(accumulate(self.terms, FAMILIES[self.family].operation, initial=self.start))

    @property
    def answer(self) -> int:
        """The last running total."""
        return self.totals[-1]

    def cut(self, n: int) -> Chain:
        """Returns the chain of the first n operations."""
        return Chain(start=self.start, terms=self.terms[:n], family=self.family)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of problem."""

    signs: tuple[str, str]
    """Before a positive and a negative term."""
    operation: Callable[[int, int], int]
    """(total, term) -> next total."""
    terms: tuple[int, int]
    """Smallest and largest size of a term."""


FAMILIES = {
    "sum": Family(signs=("+", "-"), operation=add, terms=(1, 9)),
    "extremes": Family(
        signs=("^", "v"), operation=lambda a, b: max(a, b) if b > 0 else min(a, -b), terms=(10, 99)
    ),
}
"""Kinds of problems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSet:
    """One problem file."""

    name: str
    """File stem, e.g. `train`."""
    counts: Mapping[int, int]
    """Problems of each number of operations n."""
    family: str = "sum"
    is_measured: bool = True
    """False: the card has no accuracy on it."""


def draw_chain(rng: Random, n: int, family: str = "sum") -> Chain:
    """Returns a random chain of n operations whose totals stay within two digits."""
    start = total = rng.randint(LOWEST_TOTAL, HIGHEST_TOTAL)
    terms: list[int] = []
    while len(terms) < n:
        term = rng.choice((-1, 1)) * rng.randint(*FAMILIES[family].terms)
        after = FAMILIES[family].operation(total, term)
        if LOWEST_TOTAL <= after <= HIGHEST_TOTAL:
            terms.append(term)
            total = after
    return Chain(start=start, terms=tuple(terms), family=family)


def draw_unseen(rng: Random, n: int, seen: AbstractSet[str], family: str = "sum") -> Chain:
    """Returns a random chain whose question is not in `seen`."""
    while (chain := draw_chain(rng, n, family)).question in seen:
        pass
    return chain


def draw_sets(plans: Sequence[ProblemSet], *, seed: int) -> dict[str, list[Chain]]:
    """Returns the chains of every set, shuffled; no question occurs twice, in one set or in two."""
    rng = Random(f"problems {seed}")
    seen: set[str] = set()
    sets: dict[str, list[Chain]] = {}
    for plan in plans:
        chains = list(_draw_set(rng, plan, seen))
        rng.shuffle(chains)
        sets[plan.name] = chains
    return sets


def _draw_set(rng: Random, plan: ProblemSet, seen: set[str]) -> Iterator[Chain]:
    for n, count in plan.counts.items():
        for _ in range(count):
            chain = draw_unseen(rng, n, seen, plan.family)
            seen.add(chain.question)
            yield chain


def write_jsonl(path: Path, chains: Sequence[Chain]) -> None:
    """Writes one row per chain: `{"question": "12+3-4+5", "answer": "16", "source": "lab-n3"}`."""
    rows = (
        {"question": chain.question, "answer": str(chain.answer), "source": f"lab-n{len(chain.terms)}"}
        for chain in chains
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
