"""Which teachers solve the same problems, pair by pair, and whether they err alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from store.reader import TraceStore
from store.reports.tables import plain_table
from store.terminal.table_forms import fitting


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two teachers over the problems that both have tried."""

    one: str
    other: str
    both: int
    """Problems that both solved: each has a verified trace."""
    only_one: int
    only_other: int
    neither: int
    both_wrong: int
    """Problems to which both gave a wrong answer, be it beside a right one."""
    same_wrong: int
    """Problems to which both gave one and the same wrong answer, letter by letter."""

    @property
    def tried(self) -> int:
        """Problems of which both have a trace."""
        return self.both + self.only_one + self.only_other + self.neither

    @property
    def agreement(self) -> float | None:
        """Share of the problems tried that both solved or neither did; None where none was tried."""
        return (self.both + self.neither) / self.tried if self.tried else None

    @property
    def jaccard(self) -> float | None:
        """Solved by both among solved by either; None where neither solved any."""
        either = self.both + self.only_one + self.only_other
        return self.both / either if either else None

    @property
    def same_wrong_share(self) -> float | None:
        """Of the problems to which both gave a wrong answer; None without any."""
        return self.same_wrong / self.both_wrong if self.both_wrong else None


_PAIRS = """
    WITH tried AS (
        SELECT problem_id, teacher, bool_or(is_correct) AS solved,
               list(DISTINCT trim(answer)) FILTER (verdict = 'mismatch' AND answer IS NOT NULL) AS wrong
        FROM idx.traces GROUP BY ALL)
    SELECT a.teacher AS one, b.teacher AS other,
           count(*) FILTER (a.solved AND b.solved) AS both,
           count(*) FILTER (a.solved AND NOT b.solved) AS only_one,
           count(*) FILTER (NOT a.solved AND b.solved) AS only_other,
           count(*) FILTER (NOT a.solved AND NOT b.solved) AS neither,
           count(*) FILTER (a.wrong IS NOT NULL AND b.wrong IS NOT NULL) AS both_wrong,
           count(*) FILTER (list_has_any(a.wrong, b.wrong)) AS same_wrong
    FROM tried AS a JOIN tried AS b ON a.problem_id = b.problem_id AND a.teacher < b.teacher
    GROUP BY ALL ORDER BY one, other
"""


def agreements(store: TraceStore) -> list[Agreement]:
    """Every pair of teachers that share a problem, by name."""
    return [Agreement(**row) for row in store.index.rows(_PAIRS)]


def agreement_rows(pairs: Sequence[Agreement]) -> list[dict[str, object]]:
    """For JSON and CSV: every count and every share."""
    names = [
        "one", "other", "tried", "both", "only_one", "only_other", "neither", "agreement", "jaccard",
        "both_wrong", "same_wrong", "same_wrong_share",
    ]  # fmt: skip
    return [{name: getattr(pair, name) for name in names} for pair in pairs]


def agreement_tables(pairs: Sequence[Agreement]) -> Group | Text:
    """A row a pair."""
    if not pairs:
        return Text("no two teachers have a trace of the same problem")
    table = plain_table("pairs of teachers, over the problems that both tried")
    for name in ("one", "other"):
        table.add_column(name, no_wrap=True)
    for name in ("tried", "both", "only\none", "only\nother", "neither", "agree", "jaccard", "same\nwrong"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        counts = (pair.tried, pair.both, pair.only_one, pair.only_other, pair.neither)
        shares = (pair.agreement, pair.jaccard, pair.same_wrong_share)
        table.add_row(pair.one, pair.other, *(f"{count:,}" for count in counts), *map(_share, shares))
    explained = (
        "agree: both or neither solved it; jaccard: solved by both among solved by either; "
        "same wrong: one wrong answer in common, among the problems to which both gave one"
    )
    return Group(fitting(table, ("jaccard", "tried", "only\none", "only\nother", "neither")), Text(explained))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
