"""What guidance is worth on the lab: AMPO, random selection and GRPO on the same seeds, all else equal.

    python -m bench.learning [--seeds 0 1 2] [--steps 60] [--png docs/learning.png]

Held-out pass@1 and the share of all-fail groups, mean over seeds; the last line is JSON. A run that was
stopped goes on where it was; delete runs/bench to measure anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from precompute.config_file import load_config
from precompute.run import pipeline
from store.terminal.tables import plain_table
from trainer.config import Config
from trainer.reports.charts import COLOURS
from trainer.reports.inspection import curve
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics
from trainer.train import train

METHODS = {
    "ampo": [],
    "random": ["guidance.select=random"],
    "grpo": ["guidance.trigger=never"],
}
FOLDER = Path("runs/bench")
PANELS = {"eval/pass@1": "held-out pass@1", "groups/all_fail": "groups whose samples all fail"}


def main() -> None:
    options = parse()
    console = Console()
    base = ["store.path=runs/bench/traces", "run.dir=runs/bench", f"train.max_steps={options.steps}"]
    pipeline.run(load_config(Config, options.config, base))
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for method in options.methods:
        for seed in options.seeds:
            started = time.perf_counter()
            own = [f"run.name={method}-{seed}", f"train.seed={seed}", *METHODS[method]]
            report = train(load_config(Config, options.config, [*base, *own]), reporter=TrainReporter())
            runs.setdefault(method, []).append(read_metrics(report.run))
            seconds = time.perf_counter() - started
            passed = last(runs[method][-1], "eval/pass@1")
            console.print(f"{method} seed {seed}: held-out pass@1 {passed:.3f}  ({seconds:.0f} s)")
    console.print(table(runs))
    if options.png:
        curves = {method: mean_curves(rows) for method, rows in runs.items()}
        figure_of(curves).savefig(options.png, dpi=110)
    print(json.dumps(summary(runs, options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/lab.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--png", type=Path, default=None)
    return parser.parse_args()


def figure_of(runs: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """A panel a metric, with one colour per method."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for index, (metric, title) in enumerate(PANELS.items()):
        axes: Any = figure.add_subplot(1, len(PANELS), index + 1, title=title, xlabel="step")
        axes.grid(alpha=0.25)
        for (name, rows), colour in zip(runs.items(), COLOURS, strict=False):
            axes.plot(*curve(rows, metric), color=colour, label=name)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def last(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The metric's last value."""
    return float(curve(list(map(dict, rows)), key)[1][-1])


def mean_curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each metric's mean over the seeds, step by step."""
    merged = []
    for rows in zip(*runs, strict=True):
        row: dict[str, Any] = {"step": rows[0]["step"]}
        for key in rows[0]:
            values = [each[key] for each in rows if isinstance(each.get(key), int | float)]
            if key != "step" and len(values) == len(rows):
                row[key] = fmean(values)
        merged.append(row)
    return merged


def table(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Table:
    """Held-out pass@1 and pass@8 by method and step, mean over seeds."""
    drawn = plain_table("held-out pass@1 / pass@8, mean over seeds")
    steps = [row["step"] for row in next(iter(runs.values()))[0] if "eval/pass@1" in row]
    drawn.add_column("method")
    for step in steps:
        drawn.add_column(str(step), justify="right")
    for method, seeds in runs.items():
        by_step = {row["step"]: row for row in mean_curves(seeds)}
        cells = [f"{by_step[step]['eval/pass@1']:.2f}/{by_step[step]['eval/pass@8']:.2f}" for step in steps]
        drawn.add_row(method, *cells)
    return drawn


def summary(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], options: Any) -> dict[str, Any]:
    """Last values by method and seed, and AMPO's lead."""
    means = {method: fmean(last(rows, "eval/pass@1") for rows in seeds) for method, seeds in runs.items()}
    final = {
        method: {
            "pass@1": [round(last(rows, "eval/pass@1"), 4) for rows in seeds],
            "pass@1_mean": round(means[method], 4),
            "pass@8_mean": round(fmean(last(rows, "eval/pass@8") for rows in seeds), 4),
            "all_fail_mean": round(fmean(last(rows, "groups/all_fail") for rows in seeds), 4),
        }
        for method, seeds in runs.items()
    }
    lead = {
        f"ampo_over_{method}": round(means["ampo"] - mean, 4)
        for method, mean in means.items()
        if "ampo" in means and method != "ampo"
    }
    return {"bench": "learning", "steps": options.steps, "seeds": options.seeds, **final, **lead}


if __name__ == "__main__":
    main()
