"""Tables of `ampo inspect` and `ampo eval`: rows and records in, rich tables out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from store.terminal.tables import clipped, plain_table
from trainer.reports.inspection import Rows, curve

if TYPE_CHECKING:
    from trainer.evaluation import Evaluation

CURVES = (
    "sft/loss", "reward", "accuracy", "groups/all_fail", "groups/all_solved", "groups/mixed",
    "store/queries", "store/hit_rate", "comprehension/selected_mean", "comprehension/rejected_mean",
    "entropy", "completions/mean_length", "completions/clipped_ratio", "grad_norm",
    "tokens_per_second/sampled", "tokens_per_second/trained", "memory/peak_mib", "seconds/step",
    "share/sample", "share/verify", "share/query", "share/score", "share/update", "share/sync",
)  # fmt: skip
"""Metrics that `ampo inspect run` shows; a share is that of a step's time."""
BLOCKS = "▁▂▃▄▅▆▇█"


def by_query(rows: Rows) -> list[list[dict[str, Any]]]:
    """Groups the rows of a queries file, or of several, by (step, problem)."""
    return [list(group) for _, group in groupby(rows, key=lambda row: (row["step"], row["problem_id"]))]


def queries_table(queries: Sequence[Rows], questions: Mapping[str, str]) -> Table:
    """Returns one block of rows per query: its candidates, best first, and which of them were used."""
    table = plain_table(
        "store queries of the trainer; exp(s): comprehension score",
        text=["step", "problem", "teacher"],
        numbers=["rank", "exp(s)", "tokens", "used"],
    )
    for rows in queries:
        problem_id = rows[0]["problem_id"]
        head = [str(rows[0]["step"]), escape(clipped(f"{problem_id} {questions.get(problem_id, '')}", 120))]
        for row in rows:
            table.add_row(*head, *_candidate_cells(row))
            head = ["", ""]
        table.add_section()
    return table


def _candidate_cells(row: Mapping[str, Any]) -> list[str]:
    if row["trace_id"] is None:
        return ["[red]no trace[/]", "-", "-", "-", ""]
    score = "-" if row["score"] is None else f"{math.exp(row['score']):.4f}"
    used = "[green]used[/]" if row["selected"] else ""
    return [escape(row["teacher"]), str(row["rank"]), score, str(row["n_tokens"]), used]


def summary_line(queries: Sequence[Rows]) -> str:
    """Returns hit rate and each teacher's share of the traces used in one line."""
    if not queries:
        return "no queries"
    used = Counter(row["teacher"] for rows in queries for row in rows if row["selected"])
    shares = ", ".join(f"{name} {count / used.total():.0%}" for name, count in sorted(used.items()))
    hits = sum(rows[0]["trace_id"] is not None for rows in queries)
    return (
        f"{len(queries)} queries for {len({rows[0]['problem_id'] for rows in queries})} problems; "
        f"hit rate {hits / len(queries):.1%}; {used.total()} traces used: {shares or 'none'}"
    )


def curves_table(runs: Mapping[str, Rows]) -> Table:
    """Returns the mean of each metric over the last tenth of steps, one column a run; of a single run also
    the first, smallest and largest value, and the curve as text."""
    table = plain_table("mean of the last tenth of steps")
    table.add_column("", no_wrap=True)
    for name in (*runs, *(("first", "min", "max") if len(runs) == 1 else ())):
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_row("step", *(str(max((row["step"] for row in rows), default=0)) for rows in runs.values()))
    for metric in CURVES:
        found = [curve(rows, metric)[1] for rows in runs.values()]
        if any(found):
            ends = [fmean(values[-max(len(values) // 10, 1) :]) if values else None for values in found]
            cells = [*map(_number, ends)]
            if len(runs) == 1:
                values = found[0]
                cells += [*map(_number, (values[0], min(values), max(values))), sparkline(values, width=14)]
            table.add_row(metric, *cells)
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns a non-empty curve as at most `width` characters, each the mean of its share of the values."""
    means = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    span = (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[round((mean - min(means)) / span * (len(BLOCKS) - 1))] for mean in means)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3f}"


def evaluations_table(runs: Mapping[str, Rows]) -> Table:
    """Returns the held-out evaluations of one or several runs, a row a set; --json has those of single
    sources."""
    keys = {key for rows in runs.values() for row in rows for key in row}
    passes = sorted((key[5:] for key in keys if key.startswith("eval/pass@")), key=lambda key: int(key[5:]))
    ends = (key for key in keys if key.startswith("eval/") and key.endswith("mean_length"))
    sets = sorted(key.removesuffix("mean_length") for key in ends)
    named = sets != ["eval/"]
    found = (
        [escape(name), *([escape(each[5:-1] or "-")] if named else []), row["step"]]
        + [_number(row.get(each + key)) for key in (*passes, "mean_length", "cut_share")]
        for name, rows in runs.items()
        for row in rows
        for each in sets
        if f"{each}mean_length" in row
    )
    numbers = ["step", *passes, "tokens", "cut"]
    return plain_table(
        "held-out evaluation", text=["run", "set"] if named else ["run"], numbers=numbers, rows=found
    )


def evaluation_table(model: str, evaluation: Evaluation) -> Table:
    """Returns one evaluation by `ampo eval`: a row per source, and one for all problems."""
    passes = [f"pass@{k}" for k in evaluation.overall.pass_at if k > 1]
    table = plain_table(
        model, text=["source"], numbers=["problems", f"avg@{evaluation.n}", *passes, "tokens", "cut"]
    )
    table.caption = "[ ]: 95% interval, bootstrap over problems; avg@n is pass@1"
    for source, score in (*evaluation.sources.items(), ("all", evaluation.overall)):
        if evaluation.sources and score is evaluation.overall:
            table.add_section()
            means = (f"{value:.3f}" for value in evaluation.mean_of_sources.values())
            table.add_row("mean", "", *means, "", "")
        values = (escape(found.text(between="\n")) for found in score.pass_at.values())
        shares = (f"{score.mean_length:.0f}", f"{score.cut_share:.0%}")
        table.add_row(escape(source) or "-", f"{score.problems:,}", *values, *shares)
    return table
