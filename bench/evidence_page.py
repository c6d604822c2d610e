"""Tables, plots and the page of bench.evidence: means over seeds, paired differences, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.measure import bootstrap
from store.terminal.tables import plain_table
from trainer.evaluation import pass_at_k
from trainer.reports.charts import COLOURS

FEWEST_SEEDS = 5
"""Below, an interval decides nothing."""
Result = Mapping[str, Any]
Measure = Callable[[Result, Result], float | None]
"""(a run, the reference arm's run of the same seed) -> value, or None where the run has none."""


def at_budget(axis: str) -> Measure:
    """Held-out pass@1 when the run has spent what the reference spent in all; None where it never did."""

    def value(run: Result, reference: Result) -> float | None:
        spent, budget = run[axis], reference[axis][-1]
        if spent[-1] < budget:
            return float(run["curve"][-1]) if spent[-1] > 0.98 * budget else None
        return float(np.interp(budget, spent, run["curve"]))

    return value


def entropy_at_level(run: Result, reference: Result) -> float | None:
    """Mean entropy of the five steps in which the run first reached the lower of both final pass@1."""
    level = min(run["curve"][-1], reference["curve"][-1])
    reached = [step for step, p in zip(run["eval_steps"], run["curve"], strict=True) if p >= level and step]
    values = (
        [e for e in run["entropy"][max(reached[0] - 5, 0) : reached[0]] if e is not None] if reached else []
    )
    return fmean(values) if values else None


def pass_at(k: int) -> Measure:
    """Unbiased pass@k of the held-out problems."""

    def value(run: Result, reference: Result) -> float | None:
        if "many" not in run:
            return None
        n = run["many_samples"]
        return fmean(pass_at_k(samples=n, correct=solved, k=k) for solved in run["many"])

    return value


def last_third(name: str) -> Measure:
    """Mean of a curve over the last third of the steps."""

    def value(run: Result, reference: Result) -> float | None:
        values = [v for v in run[name][-max(len(run[name]) // 3, 1) :] if v is not None]
        return fmean(values) if values else None

    return value


def plain(name: str) -> Measure:
    return lambda run, reference: float(run[name])


AREA_STEPS = 40


def area(run: Result, reference: Result) -> float:
    """Mean of the held-out curve over the evaluations of steps 1 to AREA_STEPS."""
    return fmean(p for step, p in zip(run["eval_steps"], run["curve"], strict=True) if 0 < step <= AREA_STEPS)


def at_end_of_area(run: Result, reference: Result) -> float:
    return float(run["curve"][run["eval_steps"].index(AREA_STEPS)])


MEASURES: dict[str, tuple[str, Measure]] = {
    "heldout": ("held-out", plain("heldout")),
    "longer": ("longer", plain("longer")),
    "sibling": ("sibling", plain("sibling")),
    "easy": ("easy sibling", plain("easy")),
    "area": ("area", area),
    "at_40": ("step 40", at_end_of_area),
    "at_tokens": ("at equal tokens", at_budget("tokens")),
    "at_seconds": ("at equal time", at_budget("seconds")),
    "pass@8": ("pass@8", pass_at(8)),
    "pass@64": ("pass@64", pass_at(64)),
    "entropy": ("entropy", last_third("entropy")),
    "entropy_at_level": ("entropy at equal pass@1", entropy_at_level),
    "length": ("tokens an answer", last_third("length")),
    "tokens": ("sampled k tokens", lambda run, reference: run["tokens"][-1] / 1000),
    "seconds": ("CPU seconds", lambda run, reference: float(run["seconds"][-1])),
}
"""Name in an experiment's `columns` -> (heading, measure of a run)."""


def reference_of(experiment: Mapping[str, Any], arm: str) -> str:
    """The arm that differences of `arm` refer to."""
    return str(experiment.get("references", {}).get(arm, experiment["reference"]))


def values(experiment: Mapping[str, Any], arm: str, name: str) -> dict[str, float]:
    """Seed -> value of one arm."""
    runs, reference = experiment["runs"][arm], experiment["runs"].get(reference_of(experiment, arm), {})
    found = {seed: MEASURES[name][1](run, reference.get(seed, run)) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def difference(experiment: Mapping[str, Any], arm: str, name: str) -> str:
    """The arm's lead over the reference on the same seeds, e.g. `+0.12 [+0.08 +0.15]`."""
    against = reference_of(experiment, arm)
    if arm == against or against not in experiment["runs"]:
        return ""
    own, other = values(experiment, arm, name), values(experiment, against, name)
    pairs = [own[seed] - other[seed] for seed in own if seed in other]
    if not pairs:
        return ""
    mean, low, high = (round(value, 2) + 0.0 for value in bootstrap(pairs))
    verdict = "" if low <= 0 <= high or len(pairs) < FEWEST_SEEDS else "**"
    return f"{verdict}{mean:+.2f}{verdict} [{low:+.2f} {high:+.2f}]"


def rows_of(
    experiment: Mapping[str, Any], columns: Sequence[str], metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a table: means of the columns, and differences of the metrics."""
    heads = ["arm", *(MEASURES[name][0] for name in columns)]
    heads += [f"{MEASURES[name][0]}: over {experiment['reference']}" for name in metrics]
    rows = []
    for arm, runs in experiment["runs"].items():
        plural = "s" if len(runs) > 1 else ""
        label = arm if len(runs) == experiment["seeds"] else f"{arm} ({len(runs)} seed{plural})"
        means = [cell(name, list(values(experiment, arm, name).values())) for name in columns]
        rows.append([label, *means, *(difference(experiment, arm, name) for name in metrics)])
    return heads, rows


def cell(name: str, found: Sequence[float]) -> str:
    """The mean of a measure's values."""
    if not found:
        return "-"
    return f"{fmean(found):.0f}" if name in ("tokens", "seconds", "length") else f"{fmean(found):.2f}"


def table(experiment: Mapping[str, Any]) -> Any:
    """The table for the terminal."""
    heads, rows = rows_of(experiment, experiment["columns"], experiment["metrics"])
    title = experiment["title"]
    return plain_table(title, text=heads[:1], numbers=heads[1:], rows=[tuple(row) for row in rows])


def markdown(experiment: Mapping[str, Any], columns: Sequence[str], metrics: Sequence[str] = ()) -> str:
    """The table for a page."""
    heads, rows = rows_of(experiment, columns, metrics)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shares_table(experiment: Mapping[str, Any]) -> str:
    """Teachers' shares of the traces used in each sixth of the run, mean over the seeds of `shares`' arm."""
    runs = [run["shares"] for run in experiment["runs"].get(experiment.get("shares"), {}).values()]
    lines = ["| share of the traces used, by sixths of the run | 1 | 2 | 3 | 4 | 5 | 6 |", "| --- " * 7 + "|"]
    for teacher in sorted({name for run in runs for name in run}):
        means = np.mean([run.get(teacher, [0.0] * 6) for run in runs], axis=0)
        lines.append(f"| {teacher} | {' | '.join(f'{mean:.0%}' for mean in means)} |")
    return "\n".join(lines)


def plot(experiment: Mapping[str, Any], path: Path) -> None:
    """Draws held-out pass@1 over the steps, mean over the seeds, for the arms of `plotted`."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, arm in enumerate(experiment.get("plotted", experiment["runs"])):
        runs = list(experiment["runs"].get(arm, {}).values())
        if not runs or len(runs[0]["curve"]) < 2:
            continue
        steps, curves = runs[0]["eval_steps"], np.array([run["curve"] for run in runs])
        colour = COLOURS[number % len(COLOURS)]
        style = "-" if number < len(COLOURS) else "--"
        axes.plot(steps, curves.mean(axis=0), style, color=colour, label=arm)
        axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.1, linewidth=0)
    axes.set(xlabel="step", ylabel="held-out pass@1", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def write_page(
    experiments: Mapping[str, Mapping[str, Any]],
    coverage: Mapping[str, float],
    out: Path,
    readme: Path | None = None,
) -> None:
    """Writes OUT.md, a plot for each experiment, and the first table into `readme` between its two marks."""
    sections = []
    for name, each in experiments.items():
        picture = out.with_name(f"{out.name}-{name}.png")
        plot(each, picture)
        tables = [markdown(each, each["columns"], each["metrics"])]
        tables += [markdown(each, each["costs"])] if "costs" in each else []
        tables += [shares_table(each)] if "shares" in each else []
        joined = "\n\n".join(tables)
        sections.append(
            f"## {each['title']}\n\n**Expected.** {each['hypothesis']}\n\n**Measured.** {each['measured']} "
            f"{each['seeds']} paired seeds, {each['steps']} steps.\n\n{joined}\n\n"
            f"![held-out pass@1]({picture.name})\n\n**Found.** {each.get('finding', 'See the table.')}\n"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in coverage.items())
    page = PAGE.read_text().format(coverage=shares, sections="\n".join(sections))
    out.with_suffix(".md").write_text(page)
    if readme is not None:
        first = next(iter(experiments.values()))
        before, _, rest = readme.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        lines = markdown(first, first["columns"], first["metrics"])
        readme.write_text(f"{before}{MARKS[0]}\n\n{lines}\n\n{MARKS[1]}{after}")


PAGE = Path("configs/evidence/page.md")
MARKS = ("<!-- the first table of docs/evidence.md, by `make evidence` -->", "<!-- end of the table -->")
