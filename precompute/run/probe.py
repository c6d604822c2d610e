"""The cost of a run, measured before it begins: a few problems are sampled and nothing is kept.

probe (N problems x 1 sample)  --tokens/s, tokens, usable share, bytes-->  expectation for the rest
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines.registry import load_engine
from precompute.run.progress import Reporter
from precompute.run.solve import Done, PreparedTeacher, Solver, longest_prompt, next_samples, samples_left
from precompute.verify.verifier import Verifier
from store.format.parts import write_part
from store.format.schema import TRACE_SCHEMA, table_of
from store.records import Problem, Trace

WARM_UP_TOKENS = 8
"""An engine's first tokens can take many times as long as later ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Measurements of one teacher, and what they let expect for its remaining samples."""

    samples: int
    """One for each probed problem."""
    verified: int
    usable: int
    """Verified ones that no filter rejects."""
    tokens: int
    """Sum over the samples."""
    seconds: float
    """From the first request to the last verdict. The end of a probe, when few samples still run, is part of
    it: a short probe underestimates the speed."""
    load_seconds: float
    """Until the engine was ready."""
    bytes: int
    """Size of a part with the samples."""
    left: float
    """Expected number of samples that the store still lacks."""

    @property
    def tokens_left(self) -> float:
        """Expected tokens of the remaining samples."""
        return self.left * self.tokens / self.samples

    @property
    def seconds_left(self) -> float:
        """Expected duration of the run, loading included."""
        return self.load_seconds + self.left * self.seconds / self.samples

    @property
    def bytes_left(self) -> float:
        """Expected size of the remaining samples on disk."""
        return self.left * self.bytes / self.samples


def expected_samples(teacher: TeacherConfig, done: Iterable[Mapping[int, bool]], share: float) -> float:
    """Returns the expected further samples for problems with the samples `done` (sample_index -> usable).

    With `until_verified`, problems are assumed to differ as much as they can, which needs the most samples: a
    `share` of them is always solved, the others never, and those take every try.
    """
    expected = 0.0
    for samples in done:
        tries = samples_left(teacher, samples)
        if teacher.until_verified is not None:
            wanted = teacher.until_verified - sum(samples.values())
            expected += share * min(wanted, tries) + (1 - share) * tries
        else:
            expected += tries
    return expected


def run_probe(
    teacher: PreparedTeacher,
    problems: Sequence[Problem],
    done: Done,
    config: PrecomputeConfig,
    *,
    count: int,
    verifier: Verifier,
    reporter: Reporter,
) -> Probe | None:
    """Loads the teacher and takes one sample of `count` problems, spread evenly over those that lack samples.

    None when no problem does. Keeps nothing. Raises EngineError.
    """
    left = [p for p in problems if next_samples(teacher.config, done.get(p.problem_id, {}))]
    chosen = [left[number * len(left) // count] for number in range(count)] if count < len(left) else left
    if not chosen:
        return None
    once = {"samples": 1, "until_verified": None, "max_samples": None}
    probed = replace(teacher, config=teacher.config.model_copy(update=once))
    solver = Solver(probed, chosen, {}, verifier=verifier, filters=config.filters, reporter=reporter)
    solver.fill_prompts()
    if not solver.left:
        return None
    reporter.message(f"{teacher.name}: loading {teacher.config.model} with {teacher.engine} for a probe")
    longest = longest_prompt(solver.prompts)
    traces: list[Trace] = []
    started = time.monotonic()
    with closing(
        load_engine(teacher.config, teacher.engine, teacher.tokenizer, longest_prompt=longest)
    ) as engine:
        solver.warm_up(engine, WARM_UP_TOKENS)
        loaded = time.monotonic()
        solver.run(engine, traces.extend, config.store)
        seconds = time.monotonic() - loaded
    reporter.progress(solver.progress(), last=True)
    with TemporaryDirectory() as directory:
        size = write_part(Path(directory), table_of(traces, TRACE_SCHEMA))[1].bytes
    usable = sum(trace.is_usable for trace in traces)
    stored = [done.get(problem.problem_id, {}) for problem in problems]
    return Probe(
        samples=len(traces),
        verified=sum(trace.is_correct for trace in traces),
        usable=usable,
        tokens=sum(trace.n_tokens for trace in traces),
        seconds=seconds,
        load_seconds=loaded - started,
        bytes=size,
        left=expected_samples(teacher.config, stored, usable / len(traces)),
    )
