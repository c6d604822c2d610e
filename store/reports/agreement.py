"""Agreement of teachers: the problems that two teachers both solve, and the wrong answers in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from store.reader import TraceStore
from store.terminal.tables import plain_table

_PAIRS = """
    WITH tried AS (
        SELECT problem_id, teacher, bool_or(is_correct) AS solved,
               list(DISTINCT trim(answer)) FILTER (verdict = 'mismatch' AND answer IS NOT NULL) AS wrong
        FROM idx.traces GROUP BY ALL),
    pairs AS (
        SELECT a.teacher AS one, b.teacher AS other,
               count(*) AS tried,
               count(*) FILTER (a.solved AND b.solved) AS "both",
               count(*) FILTER (a.solved AND NOT b.solved) AS only_one,
               count(*) FILTER (NOT a.solved AND b.solved) AS only_other,
               count(*) FILTER (NOT a.solved AND NOT b.solved) AS neither,
               count(*) FILTER (a.wrong IS NOT NULL AND b.wrong IS NOT NULL) AS both_wrong,
               count(*) FILTER (list_has_any(a.wrong, b.wrong)) AS same_wrong
        FROM tried AS a JOIN tried AS b ON a.problem_id = b.problem_id AND a.teacher < b.teacher
        GROUP BY ALL)
    SELECT one, other, tried, "both", only_one, only_other, neither,
           ("both" + neither) / tried AS agreement,
           "both" / nullif("both" + only_one + only_other, 0) AS jaccard,
           both_wrong, same_wrong,
           same_wrong / nullif(both_wrong, 0) AS same_wrong_share
    FROM pairs ORDER BY one, other
"""


def agreements(store: TraceStore) -> list[dict[str, Any]]:
    """Returns a row for every pair of teachers (`one`, `other`) with problems that both tried.

    Counts of problems: `tried` by both; solved by `both`, `only_one`, `only_other`, `neither`; `both_wrong`:
    both gave a wrong answer, maybe beside a right one; `same_wrong`: both gave one identical wrong answer.
    Shares in [0, 1]: `agreement`: both or neither solved it; `jaccard`: solved by both among solved by either
    (None: no problem solved); `same_wrong_share`: of `both_wrong` (None: no such problem).
    """
    return store.index.rows(_PAIRS)


def agreement_table(pairs: Sequence[Mapping[str, Any]]) -> Group | Text:
    """Returns a row a pair."""
    if not pairs:
        return Text("no two teachers have a trace of the same problem")
    counts = ("tried", "both", "only_one", "only_other", "neither")
    shares = ("agreement", "jaccard", "same_wrong_share")
    table = plain_table(
        "pairs of teachers, over the problems that both tried",
        text=["one", "other"],
        numbers=["tried", "both", "only\none", "only\nother", "neither", "agree", "jaccard", "same\nwrong"],
        rows=(
            [pair["one"], pair["other"], *(pair[name] for name in counts)]
            + ["-" if pair[name] is None else f"{pair[name]:.1%}" for name in shares]
            for pair in pairs
        ),
    )
    explained = (
        "agree: both or neither solved it; jaccard: solved by both among solved by either; "
        "same wrong: one wrong answer in common, among the problems to which both gave one"
    )
    return Group(table, Text(explained))
