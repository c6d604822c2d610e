"""`ampo report`: runs on one HTML page that needs no server: curves, shares of the teachers, and groups."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader

from precompute.config_file import read_toml
from store.errors import UserError
from store.format.files import whole_file
from trainer.reports.charts import COLOURS, line_chart, stacked_chart
from trainer.reports.inspection import Rows, curve, problems_of, query_rows, stored_texts
from trainer.telemetry.metrics import read_metrics

TEXT = 6000
"""Longer texts show their first two thirds and last third of so many characters."""
NO_TRACE = "no trace"
SFT_LOSS = "sft/loss"
METRICS = {
    "reward": ("reward", 1.0),
    "accuracy": ("solved samples of the student", 1.0),
    "groups/all_fail": ("groups whose samples all fail", 1.0),
    "eval/pass@1": ("held-out pass@1", 1.0),
    "entropy": ("entropy (nats)", 0.0),
    "completions/mean_length": ("response length (tokens)", 0.0),
    "seconds/step": ("seconds per step", 0.0),
}
"""Metric -> title of its chart, and a value that the axis has at least."""


def write_report(runs: Mapping[str, Path], out: Path, *, most: int) -> list[str]:
    """Writes the page of the runs, which appears whole or not at all; returns a line for each kind of thing
    that it leaves out.

    Args:
        runs: name -> directory.
        most: groups in the page, of all runs together; 0: all.

    Raises UserError when `out` has another suffix.
    """
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: a page ends in .html")
    metrics = [read_metrics(run) for run in runs.values()]
    queries = {name: query_rows(run) for name, run in runs.items()}
    groups, n_groups = [], 0
    for name, run in runs.items():
        keys = _group_keys(run)
        n_groups += len(keys)
        groups += _groups(name, run, _chosen(keys, max(most // len(runs), 1) if most else 0), queries[name])
    notes = _shorten(groups)
    if len(groups) < n_groups:
        left_out = f"{n_groups - len(groups):,} left out; --groups 0 shows all"
        notes = [f"{len(groups):,} of {n_groups:,} groups, spread over the steps; {left_out}", *notes]
    teachers = sorted({row["teacher"] for rows in queries.values() for row in rows} - {None})
    colours = {name: str(n % len(COLOURS)) for n, name in enumerate(teachers)} | {NO_TRACE: "none"}
    charts = _charts(metrics)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.html").render(
        runs={name: _summary(rows) for name, rows in zip(runs, metrics, strict=True)},
        differences=_differences(list(runs.values())),
        charts=charts,
        n_sets=sum(metric.count("/") > 1 for metric in charts),
        shares=[chart for name, rows in queries.items() if rows for chart in _shares(name, rows, colours)],
        colours=colours,
        n_colours=len(COLOURS),
        notes=notes,
        groups=groups,
    )
    with whole_file(out.absolute()) as file:
        file.write(text.encode("utf-8"))
    return notes


def _charts(runs: Sequence[Rows]) -> dict[str, dict[str, Any]]:
    """Returns metric -> chart: METRICS, the loss of SFT, pass@1 and the largest k of each evaluated set."""
    keys = {key for rows in runs for row in rows for key in row}
    largest: dict[str, int] = {}
    for key in sorted(keys):
        if match := re.fullmatch(r"eval/(.*pass@)(\d+)", key):
            largest[match[1]] = max(int(match[2]), largest.get(match[1], 1))
    evaluated = {
        f"eval/{name}{k}": (f"held-out {name}{k}", 1.0) for name, most in largest.items() for k in (1, most)
    }
    shown = METRICS | ({SFT_LOSS: ("loss of SFT", 0.0)} if SFT_LOSS in keys else {}) | evaluated
    return {
        key: line_chart(
            title,
            [curve(rows, key, over="sft/step" if key == SFT_LOSS else "step") for rows in runs],
            top=top,
        )
        for key, (title, top) in shown.items()
    }


def _summary(rows: Rows) -> dict[str, str]:
    """Returns the run's numbers for the table at the top of the page; means of the last tenth of steps."""
    found = {"steps": f"{max((row['step'] for row in rows), default=0):,}"}
    for key in ("reward", "accuracy", "groups/all_fail", "eval/pass@1", "seconds/step"):
        values = curve(rows, key)[1]
        last = values[-1:] if key.startswith("eval") else values[-max(len(values) // 10, 1) :]
        found[key] = f"{fmean(last):.3f}" if last else "–"
    found["queries"] = f"{sum(row.get('store/queries') or 0 for row in rows):,}"
    return found


def _differences(runs: Sequence[Path]) -> dict[str, list[str]]:
    """Returns the config keys in which the runs differ, each with its value in every run."""
    configs = [
        {f"{section}.{key}": json.dumps(value, ensure_ascii=False) for section, table in tree.items()
         for key, value in (table.items() if isinstance(table, dict) else [("", table)])}
        for tree in (read_toml(run / "config.toml") for run in runs)
    ]  # fmt: skip
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key, "–") for config in configs] for key in keys if key != "run.name"}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _shares(name: str, rows: Rows, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the charts of a run's candidates and of the traces used, by teacher."""
    found: dict[int, dict[str, int]] = {}
    used: dict[int, dict[str, int]] = {}
    for row in rows:
        for counts in (found, used) if row["selected"] else (found,):
            count = counts.setdefault(row["step"], dict.fromkeys(colours, 0))
            count[row["teacher"] or NO_TRACE] += 1
    titles = {f"{name}: candidates by teacher": found, f"{name}: traces used by teacher": used}
    return [stacked_chart(title, counts, colours) for title, counts in titles.items()]


def _group_keys(run: Path) -> dict[tuple[int, str], bool]:
    """Returns (step, problem_id) of every group, with True where a trace replaced a sample."""
    keys: dict[tuple[int, str], bool] = {}
    for file in sorted((run / "rollouts").glob("step-*.parquet")):
        for row in pq.read_table(file, columns=["step", "problem_id", "replaced"]).to_pylist():
            key = (row["step"], row["problem_id"])
            keys[key] = keys.get(key, False) or row["replaced"]
    return keys


def _chosen(keys: Mapping[tuple[int, str], bool], most: int) -> list[tuple[int, str]]:
    """Returns at most so many groups (0: all) at equal distances, half of them with traces if there are."""
    if not most or len(keys) <= most:
        return sorted(keys)
    guided, others = ([key for key in sorted(keys) if keys[key] is wanted] for wanted in (True, False))
    n_guided = min(len(guided), max(most // 2, most - len(others)))
    counts = ((guided, n_guided), (others, most - n_guided))
    return sorted(kept[n * len(kept) // count] for kept, count in counts for n in range(count))


def _groups(name: str, run: Path, keys: Sequence[tuple[int, str]], queries: Rows) -> list[dict[str, Any]]:
    """Returns the groups with their problem, rollouts and candidates."""
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    problems = problems_of(run, {problem_id for _, problem_id in keys})
    for step, problem_id in keys:
        problem = problems.get(problem_id)
        about = {"question": problem.question, "gold": problem.answer} if problem else {}
        rows: dict[str, Any] = {"samples": [], "traces": [], "candidates": [], "queried": False}
        groups[step, problem_id] = {"run": name, "step": step, "id": problem_id, **about, **rows}
    for step in sorted({step for step, _ in keys}):
        ids = [problem_id for other, problem_id in keys if other == step]
        file = run / "rollouts" / f"step-{step:06d}.parquet"
        table = pq.read_table(file, filters=[("problem_id", "in", ids)])
        for row in sorted(table.to_pylist(), key=lambda row: row["sample_index"]):
            kind = "traces" if row["origin"] == "teacher" else "samples"
            groups[step, row["problem_id"]][kind].append(row)
    queried = [row for row in queries if (row["step"], row["problem_id"]) in groups]
    texts = stored_texts(run, {row["problem_id"] for row in queried})
    for row in queried:
        group = groups[row["step"], row["problem_id"]]
        group["queried"] = True
        if row["trace_id"] is not None:
            used = (trace["text"] for trace in group["traces"] if trace["trace_id"] == row["trace_id"])
            group["candidates"].append({**row, "text": next(used, texts.get(row["trace_id"]))})
    return list(groups.values())


def _shorten(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cuts the middle out of long texts; returns a line on these, and one on candidates without a text."""
    texts = [row for group in groups for kind in ("samples", "candidates") for row in group[kind]]
    long = [row for row in texts if len(row["text"] or "") > TEXT]
    for row in long:
        text, third = row["text"], TEXT // 3
        row["text"] = f"{text[: 2 * third]}\n[… {len(text) - TEXT:,} characters …]\n{text[-third:]}"
    unknown = sum(row["text"] is None for row in texts)
    lines = {
        f"{len(long):,} texts of more than {TEXT:,} characters lack their middle": len(long),
        f"{unknown:,} unused candidates have no text: the run's store lacks them or cannot be read": unknown,
    }
    return [line for line, count in lines.items() if count]
