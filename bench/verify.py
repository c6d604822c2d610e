"""The verification service against a plain loop of math_verify's `parse` and `verify`, over the same answers.

    python -m bench.verify [--problems 250] [--samples 32] [--many 100000]

The answers are made as students make them: each problem has a pass rate of its own, the right answer is
written in several ways, a wrong one is a slip in a digit, a sign or a factor, and the common slips come
again and again. Gold answers are those of ../shared/data/math/valid.parquet where that file lies there,
otherwise made up. Each way runs in a process of its own, after its imports and two answers to each of as
many other problems: the parser learns as it reads. Answers on which both would wait for a timeout are not
among them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure import alone
from precompute.problems.data_files import data_rows
from precompute.verify.final_answer import find_answer
from precompute.verify.verifier import Verifier
from store.terminal.tables import plain_table

GOLDS = Path("../shared/data/math/valid.parquet")
SLIPS = 8
"""Wrong answers that a problem tempts to; the n-th is n times as rare as the first."""

PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

PairOfTexts = tuple[str, str]
"""(response, gold)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One way over all pairs."""

    seconds: float
    cpu_seconds: float
    """Of all its processes: what `seconds` times the cores would be on a machine with nothing else to do."""
    correct: tuple[bool, ...]
    peak_mb: float
    """Largest resident memory of the process that asked, in MiB."""
    worker_peak_mb: float
    """Largest resident memory of any one worker, in MiB; 0 without workers."""


def main() -> None:
    options = parse()
    golds = gold_answers(2 * options.problems)
    golds, others = golds[: options.problems], golds[options.problems :]
    pairs = [pair for group in groups(golds, options.samples, seed=0) for pair in group]
    first = [pair for group in groups(others, 2, seed=1) for pair in group]
    plain, ours = alone(plain_loop, (first, pairs)), alone(service, (first, pairs))
    many = alone(service_over, (golds, options.many))
    console = Console()
    console.print(table({"parse/verify": plain, "ampo Verifier": ours}, len(pairs)))
    result = summary(pairs, plain, ours) | memory(ours, many, options.many)
    console.print(
        f"{result['distinct']} distinct of {len(pairs)}; the verdicts agree on {result['agreement']:.2%}; "
        f"over {options.many} answers {many.peak_mb:.0f} MiB at most, a worker {many.worker_peak_mb:.0f}; "
        f"over {len(pairs)} it was {ours.peak_mb:.0f} and {ours.worker_peak_mb:.0f}"
    )
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--problems", type=int, default=250)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--many", type=int, default=100_000)
    return parser.parse_args()


def plain_loop(task: tuple[Sequence[PairOfTexts], Sequence[PairOfTexts]]) -> Measured:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    for pairs in task:
        started, cpu = time.perf_counter(), time.process_time()
        correct = tuple(verify(parse(f"\\boxed{{{gold}}}"), parse(response)) for response, gold in pairs)
    return measured(time.perf_counter() - started, time.process_time() - cpu, correct)


def service(task: tuple[Sequence[PairOfTexts], Sequence[PairOfTexts]]) -> Measured:
    first, pairs = task
    # The CPU time of two workers until they are warm is known only when they have ended.
    with Verifier() as verifier:
        list(verifier.stream(first))
    starts, own = worker_cpu_seconds(), time.process_time()
    with Verifier() as verifier:
        list(verifier.stream(first))
        started = time.perf_counter()
        correct = tuple(verdict.is_correct for verdict in verifier.stream(pairs))
        seconds = time.perf_counter() - started
    return measured(seconds, time.process_time() - own + worker_cpu_seconds() - 2 * starts, correct)


def worker_cpu_seconds() -> float:
    """Of the workers that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measured(seconds: float, cpu: float, correct: tuple[bool, ...]) -> Measured:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, workers = (resource.getrusage(who).ru_maxrss / unit for who in PROCESSES)
    return Measured(seconds=seconds, cpu_seconds=cpu, correct=correct, peak_mb=own, worker_peak_mb=workers)


def gold_answers(count: int) -> list[str]:
    """`count` gold answers, always the same."""
    generator = random.Random(0)
    if GOLDS.exists():
        every = {row["reward_model"]["ground_truth"] for _, row in data_rows(GOLDS)}
        known = sorted(gold for gold in every if "dot{" not in gold)
    else:
        known = sorted({made_up(generator) for _ in range(4 * count)})
    return generator.sample(known, min(count, len(known)))


def made_up(generator: random.Random) -> str:
    a, b, c = (generator.randint(2, 99) for _ in range(3))
    forms = [f"{a}", f"{a * b}", f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{c}}}", f"({a},{b})", f"[{a},\\infty)"]
    return generator.choice(forms)


def groups(golds: Sequence[str], samples: int, *, seed: int) -> Iterator[list[PairOfTexts]]:
    """For each gold answer, `samples` responses of one student."""
    generator = random.Random(seed)
    for gold in golds:
        pass_rate = generator.betavariate(0.7, 0.9)
        slips = [slip(gold, golds, generator) for _ in range(SLIPS)]
        yield [(response(gold, slips, pass_rate, generator), gold) for _ in range(samples)]


def response(gold: str, slips: Sequence[str], pass_rate: float, generator: random.Random) -> str:
    thought = " ".join(generator.choices(STEPS, k=generator.randint(10, 60)))
    if generator.random() < 0.06:
        return thought
    if generator.random() < pass_rate:
        answer = right(gold, generator)
    else:
        answer = generator.choices(slips, weights=[1 / rank for rank in range(1, SLIPS + 1)])[0]
    return f"{thought} Therefore the answer is $\\boxed{{{answer}}}$."


STEPS = [
    "Let $x$ be the number that we look for, so that $2x + 3 = 11$ must hold.",
    "First we note that 17 is prime, hence no factor is lost.",
    "By symmetry, $\\frac{a+b}{2} \\geq \\sqrt{ab}$ with equality for $a = b$.",
    "Adding both equations gives $$3y = 27,$$ and therefore $y = 9$.",
    "There are $\\binom{7}{2} = 21$ ways to choose them, of which 6 are excluded.",
    "Wait, let me check this again: 45 divided by 5 is 9, fine.",
    "The angle is $60^\\circ$, so the triangle is equilateral with side 4.",
    "We substitute back and simplify step by step.",
]


def right(gold: str, generator: random.Random) -> str:
    """The gold answer as students write it."""
    if generator.random() < 0.85:
        return gold
    bare = gold.strip("$")
    ways = [bare, bare.replace("\\frac", "\\dfrac"), f" {bare} ", bare.replace(" ", "")]
    return generator.choice(ways)


def slip(gold: str, golds: Sequence[str], generator: random.Random) -> str:
    """A wrong answer: one digit changed, the sign, a factor, something added, or another problem's answer."""
    bare = gold.strip("$")
    digits = [match.start() for match in re.finditer(r"\d", bare)]
    kind = generator.random()
    if kind < 0.6 and digits:
        place = generator.choice(digits)
        return bare[:place] + str((int(bare[place]) + generator.randint(1, 9)) % 10) + bare[place + 1 :]
    if kind < 0.7:
        return bare[1:] if bare.startswith("-") else f"-{bare}"
    if kind < 0.8:
        return f"2{bare}" if digits else f"{bare}+1"
    return str(generator.randint(0, 100)) if kind < 0.95 else generator.choice(golds)


def service_over(task: tuple[Sequence[str], int]) -> Measured:
    """The service over a stream of answers that nobody holds in memory."""
    golds, count = task
    samples = -(-count // len(golds))
    stream = (pair for group in groups(golds, samples, seed=1) for pair in group)
    with Verifier() as verifier:
        started = time.perf_counter()
        correct = sum(verdict.is_correct for verdict in verifier.stream(stream))
        seconds = time.perf_counter() - started
    return measured(seconds, time.process_time() + worker_cpu_seconds(), (correct > 0,))


def table(ways: dict[str, Measured], count: int) -> Table:
    figures = ("seconds", "verdicts/s", "ratio", "CPU s", "CPU ratio", "peak MiB")
    drawn = plain_table(f"{count} answers with repeats", text=("way",), numbers=figures)
    first = next(iter(ways.values()))
    for name, way in ways.items():
        drawn.add_row(
            name,
            f"{way.seconds:.2f}",
            f"{count / way.seconds:,.0f}",
            f"{first.seconds / way.seconds:.1f}",
            f"{way.cpu_seconds:.2f}",
            f"{first.cpu_seconds / way.cpu_seconds:.1f}",
            f"{way.peak_mb:.0f}",
        )
    return drawn


def summary(pairs: Sequence[PairOfTexts], plain: Measured, ours: Measured) -> dict[str, object]:
    both = Counter(zip(plain.correct, ours.correct, strict=True))
    return {
        "bench": "verify",
        "answers": len(pairs),
        "distinct": len({(find_answer(response).answer, gold) for response, gold in pairs}),
        "plain_per_second": round(len(pairs) / plain.seconds, 1),
        "ours_per_second": round(len(pairs) / ours.seconds, 1),
        "ratio": round(plain.seconds / ours.seconds, 2),
        "cpu_ratio": round(plain.cpu_seconds / ours.cpu_seconds, 2),
        "agreement": round((both[True, True] + both[False, False]) / len(pairs), 5),
        "only_plain": both[True, False],
        "only_ours": both[False, True],
    }


def memory(ours: Measured, many: Measured, count: int) -> dict[str, object]:
    return {
        "peak_mb": round(ours.peak_mb, 1),
        "many": count,
        "many_per_second": round(count / many.seconds, 1),
        "many_peak_mb": round(many.peak_mb, 1),
        "many_worker_peak_mb": round(many.worker_peak_mb, 1),
    }


if __name__ == "__main__":
    main()
