"""What `ampo inspect` and `ampo eval` draw of runs: records in, rich tables out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Group as RenderGroup
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from store.reports.tables import plain_table
from store.terminal.table_forms import Fitting, fitting
from trainer.evaluation import COVERAGE, Estimate, Evaluation, Score
from trainer.reports.inspection import QuerySummary, Question, curve, evaluation_rows
from trainer.reports.plots import sparkline
from trainer.timing import PHASES

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
    "tokens_per_second/trained",
    "seconds/step",
)


def queries_table(questions: Sequence[Question], problem_texts: Mapping[str, str]) -> Fitting:
    """A block a question: its candidates, best first, and which of them were used."""
    table = plain_table("what the trainer asked the store")
    table.add_column("step", justify="right")
    table.add_column("problem", overflow="fold", min_width=20)
    table.add_column("teacher", no_wrap=True)
    for name in ("rank", "exp(s)", "s", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("used")
    for question in questions:
        text = problem_texts.get(question.problem_id)
        shown = question.problem_id if text is None else f"{question.problem_id}  {_clip(text)}"
        heads = [(str(question.step), escape(shown))] + [("", "")] * max(len(question.candidates) - 1, 0)
        for (step, problem), row in zip(heads, question.candidates or ({},), strict=True):
            table.add_row(step, problem, *_candidate_cells(row))
        table.add_section()
    return fitting(table, ("rank", "tokens", "s"))


def _candidate_cells(row: Mapping[str, Any]) -> list[str]:
    if not row:
        return ["[red]no trace[/]", "-", "-", "-", "-", ""]
    score = row["score"]
    return [
        row["teacher"],
        str(row["rank"]),
        "-" if score is None else f"{math.exp(score):.4f}",
        "-" if score is None else f"{score:.4f}",
        str(row["n_tokens"]),
        "[green]used[/]" if row["selected"] else "",
    ]


def summary_line(summary: QuerySummary, *, filtered: bool = False) -> str:
    """Hit rate and share of each teacher in one line; `filtered`: of some of the questions alone."""
    if not summary.questions:
        return "no question fits --step, --problem and --teacher" if filtered else "the store was not asked"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.share.items()) or "none"
    return (
        f"asked {summary.questions} times for {summary.problems} problems; "
        f"hit rate {summary.hit_rate:.1%}; {summary.used} traces used: {shares}; "
        f"median latency {summary.median_latency_ms:.1f} ms a step"
    )


def curves_table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The run's curves as lines of text: first and last value, and the shape between."""
    table = plain_table(f"run {name}")
    table.add_column("metric", no_wrap=True)
    for column in ("first", "last", "min", "max"):
        table.add_column(column, justify="right")
    table.add_column("curve")
    for metric in CURVES:
        _, values = curve(rows, metric)
        if values:
            ends = (values[0], values[-1], min(values), max(values))
            table.add_row(metric, *map(_number, ends), sparkline(values, width=14))
    return table


COMPARED = {
    "accuracy": "solved",
    "groups/all_fail": "all-fail",
    "reward": "reward",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "store/queries": "asked",
    "grad_norm": "grad",
    "tokens_per_second/sampled": "sampled/s",
    "tokens_per_second/trained": "trained/s",
    "memory/peak_mib": "MiB",
    "seconds/step": "s/step",
}
"""Metric -> its head where the runs are rows."""


def comparison_table(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Fitting:
    """Several runs side by side: where each ended, as the mean over its last tenth of steps. A column a run;
    where these are too wide, a row a run."""
    ends = {name: _end_of(rows) for name, rows in runs.items()}
    metrics = [metric for metric in COMPARED if any(end[metric] is not None for end in ends.values())]
    title = "runs side by side (mean of the last tenth of steps)"
    wide, tall = plain_table(title), plain_table(title)
    wide.add_column("", no_wrap=True)
    tall.add_column("run", overflow="fold", min_width=_name_width(runs))
    for name in runs:
        wide.add_column(escape(name), justify="right")
    for head in ("step", *(COMPARED[metric] for metric in metrics)):
        tall.add_column(head, justify="right", no_wrap=True)
    wide.add_row("step", *(_number(end["step"]) for end in ends.values()))
    for metric in metrics:
        wide.add_row(metric, *(_number(end[metric]) for end in ends.values()))
    for name, end in ends.items():
        tall.add_row(escape(name), *(_number(end[metric]) for metric in ("step", *metrics)))
    return Fitting(wide, *fitting(tall, ("MiB", "sampled/s", "trained/s", "grad", "reward", "step")).forms)


def _end_of(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """What to compare, by metric, and the last `step`."""
    last = max((row["step"] for row in rows), default=0)
    return {"step": last} | {name: mean_of_last_tenth(curve(rows, name)[1]) for name in COMPARED}


def _name_width(runs: Collection[str]) -> int:
    """What a column of the runs' names is not folded below."""
    return min(max(map(len, runs), default=3), 30)


def mean_of_last_tenth(values: Sequence[float]) -> float | None:
    """Of one value at least; None where there is none."""
    last = values[-max(len(values) // 10, 1) :]
    return sum(last) / len(last) if last else None


def _number(value: float | None) -> str:
    """As many digits as tell something."""
    whole = value is not None and (isinstance(value, int) or abs(value) >= 100)
    return "-" if value is None else f"{value:,.0f}" if whole else f"{value:.3f}"


def time_line(rows: Sequence[dict[str, Any]]) -> str:
    """Where the steps' time went, in one line; empty for a run that did not measure it."""
    whole = sum(curve(rows, "seconds/step")[1])
    steps = len(curve(rows, "seconds/step")[1])
    if not whole:
        return ""
    spent = {phase: sum(curve(rows, f"seconds/{phase}")[1]) / whole for phase in PHASES}
    rest = 1 - sum(spent.values())
    shown = [f"{phase} {share:.0%}" for phase, share in spent.items() if share >= 0.005]
    return f"a step takes {whole / steps:.1f} s: {', '.join([*shown, f'the rest {rest:.0%}'])}"


def evaluations_table(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Fitting:
    """Held-out evaluations of one or several runs."""
    found = {name: evaluation_rows(rows) for name, rows in runs.items()}
    # Those of single sources (eval/aime/pass@1) would make it too wide; --json has them.
    names = {key for rows in found.values() for row in rows for key in row if key.count("/") == 1}
    metrics = sorted(names)
    table = plain_table("held-out evaluation")
    table.add_column("run", overflow="fold", min_width=_name_width(runs))
    table.add_column("step", justify="right")
    for metric in metrics:
        table.add_column(metric.removeprefix("eval/"), justify="right", no_wrap=True)
    for name, rows in found.items():
        for row in rows:
            table.add_row(escape(name), str(row["step"]), *(_cell(row.get(metric)) for metric in metrics))
        table.add_section()
    averages = (name for name in names if name.startswith("eval/avg@"))  # which is pass@1
    return fitting(table, [*(name.removeprefix("eval/") for name in averages), "cut_share", "mean_length"])


def evaluation_table(model: str, evaluation: Evaluation) -> RenderGroup:
    """One evaluation by `ampo eval`: a row a source, and one for all problems."""
    overall, sources = evaluation.overall, evaluation.sources
    table = plain_table(model)
    table.add_column("source", overflow="fold", min_width=8)
    passes = [f"pass@{k}" for k in overall.pass_at if k > 1]
    for name in ("problems", "n", "avg@n", *passes, "tokens", "cut"):
        table.add_column(name, justify="right", no_wrap=True)
    for source, score in sources.items():
        table.add_row(escape(source) or "-", *_score_cells(score))
    if sources:
        table.add_section()
        means = (f"{value:.3f}" for value in evaluation.mean_of_sources.values())
        table.add_row("mean", "", "", *means, "", "")
    table.add_row("all", *_score_cells(overall), style="bold")
    explained = f"[ ]: {COVERAGE:.0%} interval, bootstrap over problems; avg@n is pass@1"
    return RenderGroup(
        fitting(table, ("cut", "tokens", "problems", *passes[:-1])), Text(explained, style="dim")
    )


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
    """`0.433 [.36 .51]`; without brackets where no interval can be had."""
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    low, high = (f"{end:.2f}".removeprefix("0") for end in (found.low, found.high))
    return f"{found.value:.3f}{between}[{low} {high}]"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _clip(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:99] + "…"
