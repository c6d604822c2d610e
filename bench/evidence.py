"""Experiments on the lab of configs/evidence: each file has a hypothesis, a metric and the arms it compares.

    python -m bench.evidence [configs/evidence/1-methods.toml ...] [--seeds 5] [--out docs/evidence]

An arm is a list of config files and overrides over configs/evidence/lab.toml; an arm that several experiments
name is trained once for each seed. Runs are in runs/evidence: one that was stopped goes on where it was, and
finished ones are read. Writes OUT.md, OUT.json and a plot for each experiment; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from rich.console import Console

from bench.evidence_page import table, write_page
from precompute.problems.problem_files import configured_problems
from precompute.run import pipeline
from store import StoreWriter, TraceStore
from store.format.files import whole_file
from store.records import content_hash
from trainer.config import Config, read_config
from trainer.reports.inspection import query_rows
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics

BASE = "configs/evidence/lab.toml"
EXPERIMENTS = sorted(Path("configs/evidence").glob("[0-9]*.toml"))
LARGE, WRONG = "configs/evidence/large.toml", "store.path=runs/evidence/traces-wrong"
EMPTY = "store.path=runs/evidence/traces-empty"
WRONG_SHARE = 0.05
DOCS = Path("docs/evidence")
FINAL_SETS = {"heldout": 4, "longer": 4, "sibling": 4, "easy": 2}
"""Set -> samples of each problem after the last step."""
MANY = 64
"""Samples of each second held-out problem for pass@k, in experiments that ask for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: the layers of an arm, with a seed."""

    layers: tuple[str, ...]
    """Config files and overrides."""
    seed: int
    steps: int
    final: bool = True
    """True if FINAL_SETS are sampled after the last step."""
    many: bool = False
    """True if MANY samples of each held-out problem are taken."""

    @property
    def key(self) -> str:
        """Name of its directory: the same for arms of the same layers."""
        first = next((layer for layer in self.layers if "=" not in layer), "base")
        return f"{Path(first).stem}-{content_hash(*self.layers, self.steps)[:6]}-{self.seed}"

    @property
    def result_file(self) -> Path:
        """In the run's directory; there once it is trained."""
        config = self.config()
        return Path(config.run.dir) / config.run.name / "result.json"

    def config(self) -> Config:
        files = [BASE, *(layer for layer in self.layers if "=" not in layer)]
        own = [layer for layer in self.layers if "=" in layer]
        common = [f"run.name={self.key}", f"train.seed={self.seed}", f"train.max_steps={self.steps}"]
        # One reduction and one scale of advantages for all, so that the use of traces alone differs.
        alike = ['train.loss_type="dr_grpo"', 'train.scale_rewards="none"']
        return read_config(files, [*alike, *common, *own])


def main() -> None:
    options = parse()
    console = Console(width=130)
    experiments = {file.stem: tomllib.loads(file.read_text()) for file in options.experiments}
    jobs = jobs_of(experiments, options)
    results = published(jobs, options.keep) if options.keep else {}
    missing = [job for job in jobs if job.key not in results]
    if options.no_training:
        missing = [job for job in missing if job.result_file.exists()]
        jobs = [job for job in jobs if job.key in results or job in missing]
    make_stores(missing)
    results |= run_all(missing, options.processes, console)
    for name, experiment in experiments.items():
        runs: dict[str, dict[str, Any]] = {}
        for job, arm in ((job, arm) for job in jobs for arm in experiment["arms"]):
            if tuple(experiment["arms"][arm]) == job.layers:
                runs.setdefault(arm, {})[str(job.seed)] = results[job.key]
        experiments[name] = experiment | {"runs": runs}
        console.print(table(experiments[name]))
    if options.out:
        shares = coverage(read_config([BASE], []))
        keys = {job.key: {"layers": job.layers, "seed": job.seed} for job in jobs}
        body = {"coverage": shares, "runs": {key: keys[key] | results[key] for key in keys}}
        options.out.with_suffix(".json").write_text(json.dumps(body).replace('}, "', '},\n"') + "\n")
        write_page(experiments, shares, options.out, Path("README.md") if options.out == DOCS else None)
    print(json.dumps({"bench": "evidence", "runs": len(results), "steps": options.steps}))


def run_all(jobs: Sequence[Job], processes: int, console: Console) -> dict[str, dict[str, Any]]:
    """Job key -> its figures; runs that are finished are read."""
    results, started = {}, time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(result_of, job): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(pending), start=1):
                key = pending[future].key
                results[key] = future.result()
                left = timedelta(seconds=round((time.monotonic() - started) / number * (len(jobs) - number)))
                passed = results[key]["curve"][-1]
                console.print(f"{number}/{len(jobs)} {key}: pass@1 {passed:.3f}; {left} to go")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what runs stops by itself or is finished; nothing new begins
            raise
    return results


def published(jobs: Sequence[Job], file: Path) -> dict[str, dict[str, Any]]:
    """Job key -> its figures, of the jobs for which an earlier OUT.json has all that is asked for."""
    runs = json.loads(file.read_text())["runs"]
    found = {}
    for job in jobs:
        needed = {"curve"} | ({"heldout"} if job.final else set()) | ({"many"} if job.many else set())
        if needed <= runs.get(job.key, {}).keys():
            found[job.key] = runs[job.key]
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("experiments", nargs="*", type=Path, default=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=None, help="default: each experiment's")
    parser.add_argument("--steps", type=int, default=None, help="default: each experiment's")
    parser.add_argument("--arms", nargs="+", default=None, help="default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument(
        "--no-training", action="store_true", help="tables and plots of the runs that are finished"
    )
    parser.add_argument(
        "--keep", type=Path, default=None, help="an OUT.json: its runs are read, not trained again"
    )
    return parser.parse_args()


def jobs_of(experiments: Mapping[str, Mapping[str, Any]], options: Any) -> list[Job]:
    """The runs that the experiments need: all arms of a seed before the next seed. Arms of the same layers
    are one run, as long as the longest experiment needs."""
    found: dict[str, Job] = {}
    longest: dict[tuple[str, ...], int] = {}
    for experiment in experiments.values():
        for layers in experiment["arms"].values():
            longest[tuple(layers)] = max(longest.get(tuple(layers), 0), options.steps or experiment["steps"])
    for experiment in experiments.values():
        for arm, layers in experiment["arms"].items():
            if options.arms and arm not in options.arms:
                continue
            seeds = experiment.get("more_seeds", {}).get(arm, experiment["seeds"])
            for seed in range(options.seeds or seeds):
                steps = longest[tuple(layers)]
                job = Job(layers=tuple(layers), seed=seed, steps=steps, final=False)
                known = found.get(job.key, job)
                final = known.final or bool(FINAL_SETS.keys() & experiment["columns"])
                many = known.many or arm in experiment.get("many", ())
                found[job.key] = replace(known, final=final, many=many)
    return sorted(found.values(), key=lambda job: job.seed)


def make_stores(jobs: Sequence[Job]) -> None:
    """Lets the teachers solve the problems that the jobs train on."""
    base = read_config([BASE], [])
    pipeline.run(base)
    if any(LARGE in job.layers for job in jobs):
        large = read_config([BASE, LARGE], [])
        strong = [teacher for teacher in large.teachers if teacher.name == "strong"]
        pipeline.run(large.model_copy(update={"teachers": tuple(strong)}))
    if any(EMPTY in job.layers for job in jobs):
        StoreWriter.open(EMPTY.partition("=")[2], verifiers={}).close()
    if any(WRONG in job.layers for job in jobs):
        copy_with_wrong_traces(base.store.path, WRONG.partition("=")[2])


def copy_with_wrong_traces(source: str, target: str) -> None:
    """Copies a store; a share of the verified traces gets the text of another problem's."""
    if Path(target).exists():
        return
    rng = Random(0)
    with TraceStore(source) as store:
        traces = [trace for trace in store.traces() if trace.is_usable]
        with StoreWriter.open(target, verifiers={}) as writer:
            writer.write_problems(store.problems())
            for record in store.teachers().values():
                writer.register_teacher(record)
            copies = []
            for trace in traces:
                fellows = [t for t in traces if t.teacher == trace.teacher and t.answer != trace.answer]
                if fellows and rng.random() < WRONG_SHARE:
                    other = rng.choice(fellows)
                    taken = ("text", "answer", "answer_start", "n_tokens", "token_ids", "logprobs")
                    trace = replace(trace, **{name: getattr(other, name) for name in taken})
                copies.append(trace)
            writer.append(copies)


def coverage(config: Config) -> dict[str, float]:
    """Teacher -> share of the training problems with a usable trace; `peers`: of the four together."""
    problems = configured_problems(config.problems, config.problems.train, key="problems.train").problems
    found: Counter[str] = Counter()
    peers = set(config.guidance.teachers)
    with TraceStore(config.store.path) as store:
        for traces in store.candidates([problem.problem_id for problem in problems]).values():
            teachers = {trace.teacher for trace in traces}
            found.update(teachers, peers=bool(teachers & peers))
    return {name: round(count / len(problems), 4) for name, count in sorted(found.items())}


def result_of(job: Job) -> dict[str, Any]:
    """Trains, measures the sets of problems, and returns what tables and plots are made of."""
    import torch

    torch.set_num_threads(1)
    config, file = job.config(), job.result_file
    if not file.exists():
        train_with(config, clock(file.with_name("cpu.jsonl")))
        write(file, {})
    found: dict[str, Any] = json.loads(file.read_text())
    checkpoint = checkpoint_of(config, file.parent)
    if job.final and "heldout" not in found:
        found |= measured(checkpoint)
    if job.many and "many" not in found:
        found |= {"many": sampled(checkpoint, "heldout", MANY, every=2), "many_samples": MANY}
    write(file, found)
    return found | figures(config, file.parent)


def train_with(config: Config, on_step: Any) -> None:
    from trainer.train import train

    report = train(config, reporter=TrainReporter(), on_step=on_step)
    if report.interrupted_by is not None:
        raise KeyboardInterrupt


def write(path: Path, found: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(found).encode())


def clock(file: Path) -> Callable[[Mapping[str, Any]], None]:
    """Returns an `on_step` that appends the processor seconds of each row: this machine's wall time without
    what else runs on it."""
    last = [time.process_time()]

    def on_step(row: Mapping[str, Any]) -> None:
        now = time.process_time()
        with file.open("a") as lines:
            lines.write(
                json.dumps({"step": row["step"], "cpu": now - last[0], "eval": row.get("seconds/eval", 0)})
                + "\n"
            )
        last[0] = now

    return on_step


def figures(config: Config, run: Path) -> dict[str, Any]:
    """Curves and sums of a run's own files; index i of a curve is after `eval_steps[i]` steps."""
    rows = read_metrics(run)
    steps = [row for row in rows if "reward" in row]
    evaluations = [row for row in rows if row.get("eval/pass@1") is not None]
    lines = (run / "cpu.jsonl").read_text().splitlines()
    costs = [json.loads(line) for line in lines[-len(rows) :]]  # a run that began again has older ones
    groups, size = config.train.problems_per_step, config.rollout.num_generations
    samples = [(groups + row["groups/refilled"]) * size * row["completions/mean_length"] for row in steps]
    seconds: list[float] = []
    for cost in costs:  # an evaluation is no part of a method's cost: such a step counts as the one before
        seconds.append(seconds[-1] if cost["eval"] and seconds else 0.0 if cost["eval"] else cost["cpu"])
    eval_steps = [row["step"] for row in evaluations]
    return {
        "eval_steps": eval_steps,
        "curve": [round(row["eval/pass@1"], 4) for row in evaluations],
        "tokens": [round(sum(samples[:step])) for step in eval_steps],
        "seconds": [
            round(sum(s for s, cost in zip(seconds, costs, strict=True) if cost["step"] <= step), 1)
            for step in eval_steps
        ],
        "entropy": [round(row["entropy"], 3) if row["entropy"] is not None else None for row in steps],
        "length": [round(row["completions/mean_length"], 1) for row in steps],
        "shares": shares_over_time(run) if any((run / "queries").glob("*")) else {},
    }


def shares_over_time(run: Path, periods: int = 6) -> dict[str, list[float]]:
    """Teacher -> its share of the traces used, in each of equally long periods of the run."""
    rows = [row for row in query_rows(run) if row["selected"]]
    last = max((row["step"] for row in rows), default=1)
    counts = [
        Counter(r["teacher"] for r in rows if (r["step"] - 1) * periods // last == p) for p in range(periods)
    ]
    teachers = sorted({row["teacher"] for row in rows})
    return {name: [round(c[name] / max(c.total(), 1), 4) for c in counts] for name in teachers}


def checkpoint_of(config: Config, run: Path) -> Path:
    """The run's last checkpoint; the student itself where nothing was trained."""
    from trainer.run.checkpoint import checkpoints

    return [Path(config.student.model), *checkpoints(run / "checkpoints")][-1]


def measured(checkpoint: Path) -> dict[str, float]:
    """Set -> pass@1 after the last step, at temperature 1."""
    return {
        name: round(fmean(solved / samples for solved in sampled(checkpoint, name, samples)), 4)
        for name, samples in FINAL_SETS.items()
    }


def sampled(checkpoint: Path, name: str, samples: int, every: int = 1) -> list[int]:
    """Number of correct samples of each problem of a set, or of each second one."""
    import torch
    from transformers import AutoModelForCausalLM

    from lab.measure import is_correct, solve
    from lab.problems import Chain, draw_sets
    from lab.recipes import PEERS_LAB
    from lab.tokenizer import build_tokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    generator, tokenizer = torch.Generator().manual_seed(0), build_tokenizer()
    by_length: dict[int, list[Chain]] = {}
    for chain in draw_sets(PEERS_LAB.sets, seed=0)[name][::every]:
        by_length.setdefault(len(chain.question), []).append(chain)
    counts: Counter[str] = Counter()
    for alike in by_length.values():
        for first in range(0, len(alike), 32):
            rows = [chain for chain in alike[first : first + 32] for _ in range(samples)]
            texts = solve(model, tokenizer, rows, PEERS_LAB.evaluation, generator)
            for chain, text in zip(rows, texts, strict=True):
                counts[chain.question] += is_correct(text, chain)
    return list(counts.values())


if __name__ == "__main__":
    main()
