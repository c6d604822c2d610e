"""The methods of configs/methods on the lab: the same store, student, problems and seeds for each.

    python -m bench.methods [--methods ampo grpo ...] [--seeds 0 1 2 3 4] [--steps 40] [--out docs/evidence]

Writes OUT.md and OUT.json, and prints the table; the last line is JSON. Runs are in runs/evidence: one that
was stopped goes on where it was, and finished ones are read.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from precompute.run import pipeline
from store.terminal.tables import plain_table
from trainer.config import Config, read_config
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics

FOLDER = Path("runs/evidence")
METHODS = (
    *("ampo", "ampo_random", "ampo_shortest", "ampo_worst", "ampo_hybrid", "luffy", "hpt", "superrl"),
    *("chord_mu", "chord_phi", "rl_plus", "grpo", "dr_grpo", "sft", "sft_grpo", "sft_ampo"),
    *("relift", "srft", "bread", "prefix_rft", "ghpo", "scaf_grpo", "sdft"),
)
SETS = {"in distribution": "eval/pass@1", "longer": "eval/longer/pass@1"}
RESAMPLES = 10_000
Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    options = parse()
    console = Console(width=120)
    pipeline.run(settings(options, "ampo", 0))
    jobs = [(method, seed) for method in options.methods for seed in options.seeds]
    results: dict[str, dict[int, dict[str, float]]] = {method: {} for method in options.methods}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(run, options, *job): job for job in jobs}
        for number, future in enumerate(as_completed(pending), start=1):
            method, seed = pending[future]
            results[method][seed] = future.result()
            passed = results[method][seed]["in distribution"]
            console.print(f"{number}/{len(jobs)} {method} seed {seed}: held-out pass@1 {passed:.3f}")
    body = summary(results, options)
    console.print(table(body))
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(body, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(body))
    print(json.dumps({"bench": "methods", **body}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/lab.toml")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def settings(options: Any, method: str, seed: int) -> Config:
    """The lab's config with the method's file over it, and the sizes that all methods have in common."""
    own = [
        f'store.path="{FOLDER}/traces"',
        f'run.dir="{FOLDER}/{options.steps}"',
        f"run.name={method}-{seed}",
        f"train.seed={seed}",
        # The reduction and the advantages' scale are those of the lab for every method, so that the way of
        # using traces is what differs; grpo keeps its own.
        *([] if method == "grpo" else ['train.loss_type="dr_grpo"', 'train.scale_rewards="none"']),
        f"train.max_steps={0 if method == 'sft' else options.steps}",
        "guidance.start=0",
        "rollout.max_prompt_length=320",  # with room for parts of a trace
        'eval.sets.longer="lab/problems/harder.jsonl"',
        "eval.every=10",
        "eval.samples=2",
        "eval.k=[1]",
    ]
    return read_config([options.config, f"configs/methods/{method}.toml"], own)


def run(options: Any, method: str, seed: int) -> dict[str, float]:
    """Trains one method with one seed; returns what the table is made of."""
    import torch

    from trainer.train import train

    torch.set_num_threads(1)
    report = train(settings(options, method, seed), reporter=TrainReporter())
    rows = read_metrics(report.run)
    found = {name: curve(rows, key)[-1] for name, key in SETS.items()}
    early = curve(rows, "eval/pass@1")[:2]
    steps = [row for row in rows if "reward" in row]
    return found | {
        "early": early[-1],
        "sampled tokens": sum(row["completions/mean_length"] * 16 * 8 for row in steps),
    }


def curve(rows: Rows, key: str) -> list[float]:
    """The metric's values, in order; 0 where there are none."""
    return [float(row[key]) for row in rows if row.get(key) is not None] or [0.0]


def summary(results: Mapping[str, Mapping[int, Mapping[str, float]]], options: Any) -> dict[str, Any]:
    """Means over the seeds, and differences on the same seeds with their 95 % bootstrap intervals."""
    methods = {}
    for method, seeds in results.items():
        names = next(iter(seeds.values()))
        means = {name: round(fmean(each[name] for each in seeds.values()), 4) for name in names}
        leads = {
            "over grpo": difference(seeds, results.get("dr_grpo", {}), "in distribution"),
            "to ampo": difference(seeds, results.get("ampo", {}), "early"),
        }
        methods[method] = {**means, **leads}
    return {"steps": options.steps, "seeds": options.seeds, "methods": methods}


def difference(
    one: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]], name: str
) -> list[float]:
    """Mean, low and high end of a paired difference, by resampling the seeds; zeros without pairs."""
    values = [one[seed][name] - other[seed][name] for seed in one if seed in other] or [0.0]
    return interval(values)


def interval(values: Sequence[float]) -> list[float]:
    """Mean, low and high end, by resampling the seeds."""
    drawn = np.random.default_rng(0).choice(values, size=(RESAMPLES, len(values))).mean(axis=1)
    return [round(float(each), 4) for each in (fmean(values), *np.quantile(drawn, (0.025, 0.975)))]


def cells(method: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """The table's cells of one method."""
    over, behind = ("{:+.2f} [{:+.2f} {:+.2f}]".format(*found[name]) for name in ("over grpo", "to ampo"))
    held_out, longer, early = (f"{found[name]:.2f}" for name in (*SETS, "early"))
    return method, held_out, over, longer, early, behind, f"{found['sampled tokens'] / 1000:.0f}"


HEAD = ("method", "held-out", "over GRPO", "longer", "step 10", "to AMPO at step 10", "sampled k tokens")


def table(body: Mapping[str, Any]) -> Any:
    """The table for the terminal."""
    rows = [cells(method, found) for method, found in body["methods"].items()]
    title = f"held-out pass@1 after {body['steps']} steps, mean of seeds {body['seeds']}"
    return plain_table(title, text=HEAD[:1], numbers=HEAD[1:], rows=rows)


def page(body: Mapping[str, Any]) -> str:
    """docs/evidence.md."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    lines += [f"| {' | '.join(cells(method, found))} |" for method, found in body["methods"].items()]
    return PAGE.format(steps=body["steps"], seeds=len(body["seeds"]), table="\n".join(lines))


PAGE = """# Evidence

One store, one student, the same problems and seeds; only the method's file differs. Made by
`python -m bench.methods --seeds 0 1 2 --out docs/evidence`, which also writes the numbers as JSON beside
this page.

Pass@1 on the bundled lab, mean of {seeds} paired seeds: on held-out problems after {steps} steps and
after ten, and on sums of eight numbers (`longer`), which no method trains on. In brackets 95 % intervals of
paired differences, by bootstrap over the seeds: to `dr_grpo` at the end, and to `ampo` at step 10. Every
method takes the same number of steps; sampled tokens differ as shown.

{table}

The lab is an easy case that separates guidance from none: a student with one habit to unlearn, whose
groups are almost all wrong or all right, so that GRPO has nothing to learn from. At the end most ways of
using traces are level; what selects them shows early, at step 10. Longer sums are learnt by no method.
`sft` has no steps of sampling. Three seeds, one lab: nothing here is about a 7B model.
"""


if __name__ == "__main__":
    main()
