"""Tables of `ampo inspect` and `ampo eval`: records in, rich tables out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group as RenderGroup
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from store.terminal.tables import plain_table
from trainer.evaluation import COVERAGE, Estimate, Evaluation, Score
from trainer.reports.inspection import Query, QuerySummary, curve, evaluation_rows
from trainer.reports.plots import sparkline
from trainer.timing import PHASES

Rows = Sequence[dict[str, Any]]

CURVES = (
    "sft/loss",
    "reward",
    "accuracy",
    "groups/all_fail",
    "groups/all_solved",
    "groups/mixed",
    "store/queries",
    "store/hit_rate",
    "comprehension/selected_mean",
    "comprehension/rejected_mean",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "grad_norm",
    "tokens_per_second/sampled",
    "tokens_per_second/trained",
    "memory/peak_mib",
    "seconds/step",
)


def queries_table(queries: Sequence[Query], problem_texts: Mapping[str, str]) -> Table:
    """Returns one block of rows per query: its candidates, best first, and which of them were used."""
    table = plain_table("store queries of the trainer; exp(s): comprehension score")
    table.add_column("step", justify="right")
    table.add_column("problem", overflow="fold", min_width=20)
    table.add_column("teacher", overflow="fold")
    for name in ("rank", "exp(s)", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("used")
    for query in queries:
        text = problem_texts.get(query.problem_id)
        shown = query.problem_id if text is None else f"{query.problem_id}  {_clip(text)}"
        heads = [(str(query.step), escape(shown))] + [("", "")] * max(len(query.candidates) - 1, 0)
        for (step, problem), row in zip(heads, query.candidates or ({},), strict=True):
            table.add_row(step, problem, *_candidate_cells(row))
        table.add_section()
    return table


def _candidate_cells(row: Mapping[str, Any]) -> list[str]:
    if not row:
        return ["[red]no trace[/]", "-", "-", "-", ""]
    score = "-" if row["score"] is None else f"{math.exp(row['score']):.4f}"
    used = "[green]used[/]" if row["selected"] else ""
    return [escape(row["teacher"]), str(row["rank"]), score, str(row["n_tokens"]), used]


def summary_line(summary: QuerySummary, *, filtered: bool = False) -> str:
    """Returns hit rate and each teacher's share in one line; `filtered`: options excluded some queries."""
    if not summary.queries:
        return "no query fits --step, --problem and --teacher" if filtered else "the store was not queried"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.share.items()) or "none"
    return (
        f"{summary.queries} queries for {summary.problems} problems; "
        f"hit rate {summary.hit_rate:.1%}; {summary.used} traces used: {shares}; "
        f"median latency {summary.median_latency_ms:.1f} ms per step"
    )


def curves_table(name: str, rows: Rows) -> Table:
    """Returns the run's curves: first, last, smallest and largest value, and the shape as text."""
    table = plain_table(f"run {name}")
    table.add_column("metric", no_wrap=True)
    for column in ("first", "last", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("curve")
    for metric in CURVES:
        _, values = curve(rows, metric)
        if values:
            shown = (values[0], values[-1], min(values), max(values))
            table.add_row(metric, *map(_number, shown), sparkline(values, width=14))
    return table


def comparison_table(runs: Mapping[str, Rows]) -> Table:
    """Returns several runs side by side: the mean of each metric over the last tenth of steps."""
    table = plain_table("runs side by side (mean of the last tenth of steps)")
    table.add_column("", no_wrap=True)
    for name in runs:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_row("step", *(str(max((row["step"] for row in rows), default=0)) for rows in runs.values()))
    for metric in CURVES:
        ends = [mean_of_last_tenth(curve(rows, metric)[1]) for rows in runs.values()]
        if any(end is not None for end in ends):
            table.add_row(metric, *map(_number, ends))
    return table


def mean_of_last_tenth(values: Sequence[float]) -> float | None:
    """Returns the mean over at least one value; None when `values` is empty."""
    last = values[-max(len(values) // 10, 1) :]
    return sum(last) / len(last) if last else None


def _number(value: float | None) -> str:
    whole = value is not None and (isinstance(value, int) or abs(value) >= 100)
    return "-" if value is None else f"{value:,.0f}" if whole else f"{value:.3f}"


def time_line(rows: Rows) -> str:
    """Returns each phase's share of the steps' time in one line; empty when no step was timed."""
    steps = curve(rows, "seconds/step")[1]
    if not steps:
        return ""
    spent = {phase: sum(curve(rows, f"seconds/{phase}")[1]) / sum(steps) for phase in PHASES}
    shares = [f"{phase} {share:.0%}" for phase, share in spent.items() if share >= 0.005]
    rest = f"the rest {1 - sum(spent.values()):.0%}"
    return f"a step takes {sum(steps) / len(steps):.1f} s: {', '.join([*shares, rest])}"


def evaluations_table(runs: Mapping[str, Rows]) -> Table:
    """Returns the held-out evaluations of one or several runs; --json has those of single sources."""
    found = {name: evaluation_rows(rows) for name, rows in runs.items()}
    keys = {key for rows in found.values() for row in rows for key in row}
    passes = sorted((key for key in keys if key.startswith("eval/pass@")), key=lambda key: int(key[10:]))
    table = plain_table("held-out evaluation")
    table.add_column("run", overflow="fold")
    for name in ("step", *(key.removeprefix("eval/") for key in passes), "tokens", "cut"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, rows in found.items():
        for row in rows:
            values = (_number(row.get(key)) for key in (*passes, "eval/mean_length", "eval/cut_share"))
            table.add_row(escape(name), str(row["step"]), *values)
        table.add_section()
    return table


def evaluation_table(model: str, evaluation: Evaluation) -> RenderGroup:
    """Returns one evaluation by `ampo eval`: a row per source, and one for all problems."""
    overall, sources = evaluation.overall, evaluation.sources
    table = plain_table(model)
    table.add_column("source", overflow="fold", min_width=8)
    passes = [f"pass@{k}" for k in overall.pass_at if k > 1]
    for name in ("problems", "n", "avg@n", *passes, "tokens", "cut"):
        table.add_column(name, justify="right")
    for source, score in sources.items():
        table.add_row(escape(source) or "-", *_score_cells(score))
    if sources:
        table.add_section()
        means = (f"{value:.3f}" for value in evaluation.mean_of_sources.values())
        table.add_row("mean", "", "", *means, "", "")
    table.add_row("all", *_score_cells(overall), style="bold")
    explained = f"[ ]: {COVERAGE:.0%} interval, bootstrap over problems; avg@n is pass@1"
    return RenderGroup(table, Text(explained, style="dim"))


def _score_cells(score: Score) -> list[str]:
    fewest, most = score.samples
    return [
        f"{score.problems:,}",
        str(most) if fewest == most else f"{fewest}-{most}",
        *(escape(estimate_text(found, between="\n")) for found in score.pass_at.values()),
        f"{score.mean_length:.0f}",
        f"{score.cut_share:.0%}",
    ]


def estimate_text(found: Estimate, *, between: str = " ") -> str:
    """Returns `0.433 [.36 .51]`, without brackets where the interval is undefined."""
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    low, high = (f"{end:.2f}".removeprefix("0") for end in (found.low, found.high))
    return f"{found.value:.3f}{between}[{low} {high}]"


def _clip(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:99] + "…"
