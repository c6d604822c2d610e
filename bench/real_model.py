"""AMPO, GRPO and SFT from one published student for the same wall time: the longer half of `make real`.

    python -m bench.real_model [--minutes 15] [--seeds 0 1] [--samples 8] [--out docs/real]

Every arm begins with the same checkpoint: SmolLM2 after the `[sft]` steps of configs/real.toml. Arms run in
pairs with a thread each, AMPO beside GRPO, and end after the step in which their time is up. Then each model
samples the held-out problems and the siblings. Differences are paired by problem, with 95 % intervals by
bootstrap over the problems. Writes OUT.json; the last line is JSON. Runs are in runs/real: one that was
stopped goes on where it was, and finished ones are read.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.measure import bootstrap
from precompute.problems.problem_files import load_problems
from store.reader import TraceStore
from store.terminal.tables import plain_table
from trainer.config import Config, read_config
from trainer.eval_model import evaluate_model
from trainer.merge import merge
from trainer.run.checkpoint import checkpoints
from trainer.telemetry.metrics import read_metrics

CONFIG = "configs/real.toml"
FOLDER = Path("runs/real")
START = FOLDER / "start-model"
METHODS: dict[str, list[str]] = {
    "ampo": [],
    "grpo": ["guidance.trigger=never"],
    "sft": ["sft.steps=100000", "train.max_steps=0"],
}
SETS = {"heldout": 1, "siblings": 4}
"""Problems -> of how many samples one is drawn."""


def main() -> None:
    options = parse()
    console = Console(width=130)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        console.print("supervised steps from which every arm begins")
        pool.submit(make_start).result()
        for pair in pairs_of(options.methods, options.seeds):
            console.print(
                f"{' beside '.join(f'{name}-{seed}' for name, seed in pair)}: {options.minutes} min"
            )
            for arm in [pool.submit(train_arm, *arm, options.minutes * 60) for arm in pair]:
                console.print(f"  {arm.result()}")
        models = {"untrained": read_config(CONFIG, []).student.model, "start": str(START)}
        models |= {
            f"{name}-{seed}": str(newest(FOLDER / f"{name}-{seed}"))
            for name in options.methods
            for seed in options.seeds
        }
        jobs = [
            (name, model, problems, max(1, options.samples // share))
            for problems, share in SETS.items()
            for name, model in models.items()
        ]
        solved = {}
        for number, (job, counts) in enumerate(zip(jobs, pool.map(evaluated, jobs), strict=True), start=1):
            solved[job[0], job[2]] = counts
            console.print(f"evaluated {number}/{len(jobs)}: {job[0]} on {job[2]}")
    body = summary(solved, options)
    console.print(table(body))
    if options.out:
        text = json.dumps(body).replace("]], ", "]],\n").replace("}, ", "},\n")
        options.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps({"bench": "real_model", **body}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--samples", type=int, default=8, help="of each held-out problem; siblings: a quarter"
    )
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def pairs_of(methods: Sequence[str], seeds: Sequence[int]) -> list[list[tuple[str, int]]]:
    """Arms that run at the same time: AMPO and GRPO of one seed, then the others two by two."""
    first = [name for name in methods if name != "sft"]
    others = [("sft", seed) for seed in seeds if "sft" in methods]
    pairs = [[(name, seed) for name in first] for seed in seeds if first]
    return pairs + [others[index : index + 2] for index in range(0, len(others), 2)]


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def settings(name: str, *more: str) -> Config:
    return read_config(CONFIG, [f"run.name={name}", "verify.workers=1", *more])


def make_start() -> None:
    """Takes the supervised steps and merges their adapters."""
    from trainer.train import train

    train(settings("start", "train.max_steps=0"))
    if not START.exists():
        merge(newest(FOLDER / "start"), START)


def train_arm(name: str, seed: int, seconds: float) -> str:
    """Trains one arm until its steps have taken `seconds`; returns a line about it."""
    from trainer.train import train

    run = FOLDER / f"{name}-{seed}"
    spent = sum(map(seconds_of, read_metrics(run))) if (run / "metrics.jsonl").exists() else 0.0

    def on_step(row: Mapping[str, Any]) -> None:
        nonlocal spent
        spent += seconds_of(row)
        if spent >= seconds:
            os.kill(os.getpid(), signal.SIGTERM)  # the run ends as with Ctrl-C: it saves

    if spent < seconds:
        own = [f'student.model="{START}"', "sft.steps=0", f"train.seed={seed}", *METHODS[name]]
        train(settings(f"{name}-{seed}", *own), on_step=on_step)
    return f"{name}-{seed}: {len(read_metrics(run))} steps in {spent / 60:.1f} minutes"


def seconds_of(row: Mapping[str, Any]) -> float:
    """Seconds of a step, supervised or not."""
    return float(row.get("seconds/step", row.get("seconds/sft", 0.0)))


def newest(run: Path) -> Path:
    """The run's last checkpoint."""
    return checkpoints(run / "checkpoints")[-1]


def evaluated(job: tuple[str, str, str, int]) -> list[int]:
    """Number of correct samples of each problem, in one order for all models."""
    name, model, problems, samples = job
    root = FOLDER / "evals" / f"{name}-{Path(model).name}-{problems}-{samples}"
    given = [f'student.model="{model}"', f"eval.samples={samples}", "eval.k=[1]"]
    evaluate_model(settings(name, *given, f'problems.eval="lab/real/{problems}.jsonl"'), out=root)
    ids = [problem.problem_id for problem in load_problems(f"lab/real/{problems}.jsonl").problems]
    with TraceStore(root) as store:
        found = store.candidates(ids, usable=False)
    return [sum(trace.is_correct for trace in found[problem]) for problem in ids]


def summary(solved: Mapping[tuple[str, str], list[int]], options: Any) -> dict[str, Any]:
    """Pass@1 and pass@k of every method, and the paired differences to AMPO."""
    rates: dict[str, dict[str, np.ndarray]] = {}
    for method in ("untrained", "start", *options.methods):
        rates[method] = {}
        for problems, share in SETS.items():
            samples = max(1, options.samples // share)
            names = [name for name, its in solved if its == problems and name.partition("-")[0] == method]
            counts = np.array([solved[name, problems] for name in names])
            rates[method][f"{problems} pass@1"] = (counts / samples).mean(axis=0)
            rates[method][f"{problems} pass@{samples}"] = (counts > 0).mean(axis=0)
    methods = {
        method: {name: interval(values) for name, values in each.items()} for method, each in rates.items()
    }
    lead = {
        f"ampo over {method}": {
            name: interval(rates["ampo"][name] - rates[method][name]) for name in rates[method]
        }
        for method in rates
        if method not in ("untrained", "ampo") and "ampo" in rates
    }
    curves = {
        f"{name}-{seed}": curve(read_metrics(FOLDER / f"{name}-{seed}"))
        for name in options.methods
        for seed in options.seeds
    }
    return {
        "minutes": options.minutes,
        "seeds": options.seeds,
        "samples": options.samples,
        "steps": {name: len(each) for name, each in curves.items()},
        "curves": curves,
        "methods": methods,
        "lead": lead,
    }


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float | None]]:
    """(Minutes so far, share of the step's samples that are correct) of each step; None: supervised steps."""
    minutes = np.cumsum([seconds_of(row) for row in rows]) / 60
    return [(round(float(at), 2), row.get("accuracy")) for at, row in zip(minutes, rows, strict=True)]


def interval(values: np.ndarray) -> list[float]:
    """Mean, low and high end, by resampling the problems."""
    return [round(each, 4) for each in bootstrap(values.tolist())]


def table(body: Mapping[str, Any]) -> Any:
    """Rows of methods and leads."""
    rows = [
        (name, *("{:.3f} [{:.3f} {:.3f}]".format(*value) for value in found.values()))
        for name, found in {**body["methods"], **body["lead"]}.items()
    ]
    heads = tuple(next(iter(body["methods"].values())))
    return plain_table("solved, 95 % intervals over problems", text=("",), numbers=heads, rows=rows)


if __name__ == "__main__":
    main()
