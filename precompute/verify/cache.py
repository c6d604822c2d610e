"""What the judge remembers: the outcomes of pairs that it has judged before, up to a budget of memory."""

from __future__ import annotations

from collections import OrderedDict

from precompute.verify.process import Outcome, Pair

ENTRY_CHARS = 1_000
"""What an entry costs beside its texts, in characters' worth of memory."""


class OutcomeCache:
    """The outcomes asked for last, in at most `budget` characters. The caller holds a lock.

    An outcome that says something about the moment and not about the pair (`timeout`, `error`) is not kept.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._known: OrderedDict[Pair, Outcome] = OrderedDict()
        self.used = 0
        """Characters."""

    def __len__(self) -> int:
        return len(self._known)

    def get(self, pair: Pair) -> Outcome | None:
        """The outcome of a pair that is remembered."""
        outcome = self._known.get(pair)
        if outcome is not None:
            self._known.move_to_end(pair)
        return outcome

    def put(self, pair: Pair, outcome: Outcome) -> None:
        """Remembers an outcome, and forgets those for which nobody has asked the longest."""
        if outcome.reason in ("timeout", "error") or pair in self._known:
            return
        self._known[pair] = outcome
        self.used += _cost(pair, outcome)
        while self.used > self._budget:
            self.used -= _cost(*self._known.popitem(last=False))


def _cost(pair: Pair, outcome: Outcome) -> int:
    return ENTRY_CHARS + sum(len(text) for text in (*pair, *outcome) if text is not None)
