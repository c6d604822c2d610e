"""What a few AMPO steps do to a real pretrained model, measured on all traces of its store.

    python -m bench.real_model [--config configs/real.toml] [--set section.key=value]...

Needs a run of that config (`make real` does all of it). Every trace is read by the student as it was and as
the last checkpoint has it: s, the mean log-probability of the gold answer after reading the trace, and the
mean log-probability of the trace's own tokens; for problems that a step held, for the others, and by teacher.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from precompute.config_file import load_config
from precompute.verify.plain_numbers import plain_gold
from precompute.verify.verifier import Verifier
from store.reader import TraceStore
from store.reports.report import store_report
from store.terminal.tables import plain_table
from trainer.config import Config
from trainer.method.groups import Group
from trainer.method.guidance import answer_scores
from trainer.method.teacher_traces import Candidate
from trainer.reports.inspection import open_run, query_rows
from trainer.reports.tables import by_query
from trainer.run.checkpoint import checkpoints
from trainer.run.prompts import fitting_prompts, training_problems
from trainer.run.run_dir import Position
from trainer.run.setup import trace_reader
from trainer.student.batches import fill, pad
from trainer.student.load import load_policy
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics

Pair = tuple[Group, Candidate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a student takes one trace."""

    problem_id: str
    teacher: str
    answer: float
    """s: mean log-probability of the gold answer's tokens, the trace's reasoning read."""
    trace: float
    """Mean log-probability of the trace's own tokens."""


def main() -> None:
    options = parse()
    # At import it tells of a faster kernel that no package of ours wants.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = load_config(Config, options.config, options.set)
    run = open_run(Path(config.run.dir) / config.run.name)
    last = checkpoints(run / "checkpoints")[-1]
    held = held_problems(run)
    before, after = (read_traces(config, model) for model in (config.student.model, str(last)))
    figures = {
        "trained": compared(before, after, [reading.problem_id in held for reading in before]),
        "other": compared(before, after, [reading.problem_id not in held for reading in before]),
    }
    by_teacher = {
        teacher: compared(before, after, [reading.teacher == teacher for reading in before])
        for teacher in sorted({reading.teacher for reading in before})
    }
    Console().print(table({**figures, **{f"by {name}": row for name, row in by_teacher.items()}}))
    told = {"steps": Position.of(last).step, **of_run(run), "verified": verified_shares(config.store.path)}
    print(json.dumps({"bench": "real_model", **figures, "teachers": by_teacher, **told}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/real.toml")
    parser.add_argument("--set", action="append", default=[])
    return parser.parse_args()


def held_problems(run: Path) -> set[str]:
    """Problems that a step of the run held."""
    files = sorted((run / "rollouts").glob("step-*.parquet"))
    return {name for file in files for name in pq.read_table(file)["problem_id"].to_pylist()}


@torch.no_grad()
def read_traces(config: Config, model: str) -> list[Reading]:
    """Every usable trace of the store, read by a model directory; the same order for every model."""
    student = config.student.model_copy(update={"model": model, "use_peft": False, "load_in_4bit": False})
    policy = load_policy(student, temperature=config.rollout.temperature)
    with ExitStack() as stack:
        verifier = stack.enter_context(Verifier(config.verify))
        store = stack.enter_context(TraceStore(config.store.path))
        problems = training_problems(config, verifier, TrainReporter())
        traces = trace_reader(config, store, policy, TrainReporter())
        prompts = fitting_prompts(config, problems, policy.tokenizer, TrainReporter())
        pairs = [
            (Group(prompt=prompt, samples=()), candidate)
            for prompt, candidates in traces.all_candidates(prompts)
            for candidate in candidates
        ]
        gold = [traces.encode(plain_gold(group.prompt.problem.answer)) for group, _ in pairs]
        answers = answer_scores(
            policy,
            [
                ((*group.prompt.ids, *candidate.reasoning_ids, *ids), len(ids))
                for (group, candidate), ids in zip(pairs, gold, strict=True)
            ],
            score=config.guidance.score,
            max_tokens=config.train.max_tokens_per_microbatch,
        )
        own = trace_logprobs(policy, pairs, config.train.max_tokens_per_microbatch)
    return [
        Reading(problem_id=group.problem_id, teacher=trace.trace.teacher, answer=answer, trace=logprob)
        for (group, trace), answer, logprob in zip(pairs, answers, own, strict=True)
    ]


def trace_logprobs(policy: Policy, pairs: Sequence[Pair], max_tokens: int) -> list[float]:
    """Mean log-probability of each trace's tokens, its EOS included."""
    rows = [(*group.prompt.ids, *trace.token_ids) for group, trace in pairs]
    means = [0.0] * len(rows)
    for indices in fill([len(row) for row in rows], max_tokens):
        lengths = [len(pairs[index][1].token_ids) for index in indices]
        batch = pad([rows[i] for i in indices], lengths, pad_id=policy.pad_id, device=policy.device)
        sums = policy.logprobs(batch).sum(dim=1).tolist()
        for index, total, length in zip(indices, sums, lengths, strict=True):
            means[index] = total / length
    return means


def compared(before: Sequence[Reading], after: Sequence[Reading], chosen: Sequence[bool]) -> dict[str, Any]:
    """Means over the chosen traces, [before, after]."""
    sides = [[r for r, take in zip(side, chosen, strict=True) if take] for side in (before, after)]
    if not sides[0]:
        return {"problems": 0, "traces": 0}
    return {
        "problems": len({reading.problem_id for reading in sides[0]}),
        "traces": len(sides[0]),
        "answer_logprob": [round(fmean(r.answer for r in side), 3) for side in sides],
        "answer_probability": [round(fmean(math.exp(r.answer) for r in side), 3) for side in sides],
        "trace_logprob": [round(fmean(r.trace for r in side), 3) for side in sides],
    }


def of_run(run: Path) -> dict[str, Any]:
    """Groups, traces used and evaluations, as the run's own files have them."""
    metrics = read_metrics(run)
    rows = [row for row in metrics if row["step"] > 0]
    queries = query_rows(run)
    used = Counter(query["teacher"] for query in queries if query["selected"])
    return {
        "all_fail": [round(row["groups/all_fail"], 2) for row in rows],
        "asked": len(by_query(queries)),
        "used": used.total(),
        "share": {name: round(count / used.total(), 2) for name, count in sorted(used.items())},
        "pass@1": [round(row["eval/pass@1"], 3) for row in metrics if "eval/pass@1" in row],
    }


def verified_shares(store: str) -> dict[str, float]:
    """teacher -> share of its traces that are verified."""
    with TraceStore(store) as opened:
        teachers = store_report(opened).teachers
    return {teacher.teacher: round(teacher.verified_share, 3) for teacher in teachers}


def table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """Before and after, a row for each choice of traces."""
    drawn = plain_table("read by the student before -> after")
    for column in (
        "problems",
        "traces",
        "gold answer, mean log-prob",
        "mean prob",
        "trace's tokens, mean log-prob",
    ):
        drawn.add_column(column, justify="left" if column == "problems" else "right")
    for name, row in figures.items():
        measured = [
            row.get(key, ["", ""]) for key in ("answer_logprob", "answer_probability", "trace_logprob")
        ]
        cells = [f"{was} -> {now}" for was, now in measured]
        drawn.add_row(f"{row['problems']} {name}", str(row["traces"]), *cells)
    return drawn


if __name__ == "__main__":
    main()
