"""The cost of a run, measured before it begins: a few problems are sampled and nothing is kept.

probe (N problems x 1 sample)  --tokens/s, tokens, verified share, bytes-->  expectation for the rest
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines.registry import load_engine
from precompute.run.progress import Reporter
from precompute.run.solve import PreparedTeacher, Solver, longest_prompt, next_samples, samples_left
from precompute.verify.verifier import Verifier
from store.format.parts import write_traces
from store.records import Problem, Trace

WARM_UP_TOKENS = 8
"""An engine's first tokens can take many times as long as later ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Measurements of one teacher."""

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
    trace_bytes: float
    """Size that one more trace adds to a part."""
    part_bytes: float
    """Size of a part apart from its traces."""

    @property
    def usable_share(self) -> float:
        """Share of usable samples, in [0, 1]."""
        return self.usable / self.samples

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a sample."""
        return self.tokens / self.samples

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all samples together, per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """Expected size and cost of one teacher's remaining samples."""

    samples: float
    tokens: float
    seconds: float
    """Loading included."""
    bytes: float
    """Size of the parts on disk."""


def expected_tries(share: float, *, wanted: int, tries: int) -> float:
    """Returns the expected samples until `wanted` are usable or `tries` are taken, each usable with
    probability `share`: E[min(T, tries)] = sum over t < tries of P(fewer than `wanted` of t are usable)."""
    return math.fsum(
        math.comb(t, usable) * share**usable * (1 - share) ** (t - usable)
        for t in range(tries)
        for usable in range(min(wanted, t + 1))
    )


def split_tries(share: float, *, wanted: int, tries: int) -> float:
    """Returns the expected samples if problems differ as much as they can: a share of them is always solved,
    the others never, and those take every try."""
    return share * min(wanted, tries) + (1 - share) * tries


def expect(
    teacher: TeacherConfig, done: Iterable[Mapping[int, bool]], probe: Probe, *, part_traces: int
) -> tuple[Expectation, Expectation]:
    """Returns (least, most) for problems with the samples `done` (sample_index -> usable) in the store.

    Without `until_verified` both are equal. With it, least assumes that all problems are equally hard, and
    most that each is solved always or never; wrong samples are assumed to be as long as right ones.
    """
    left: Counter[tuple[int, int]] = Counter()  # (missing usable traces, tries left) -> problems
    for samples in done:
        if tries := samples_left(teacher, samples):
            left[(teacher.until_verified or 0) - sum(samples.values()), tries] += 1
    least = most = 0.0
    for (wanted, tries), problems in left.items():
        if teacher.until_verified is None:
            least, most = least + problems * tries, most + problems * tries
        else:
            least += problems * expected_tries(probe.usable_share, wanted=wanted, tries=tries)
            most += problems * split_tries(probe.usable_share, wanted=wanted, tries=tries)
    return _cost(least, probe, part_traces), _cost(most, probe, part_traces)


def _cost(samples: float, probe: Probe, part_traces: int) -> Expectation:
    tokens = samples * probe.mean_tokens
    return Expectation(
        samples=samples,
        tokens=tokens,
        seconds=probe.load_seconds + tokens / probe.tokens_per_second if samples else 0.0,
        bytes=samples * probe.trace_bytes + math.ceil(samples / part_traces) * probe.part_bytes,
    )


def run_probe(
    teacher: PreparedTeacher,
    problems: Sequence[Problem],
    done: Mapping[str, Mapping[int, bool]],
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
    reporter.finished(solver.progress())
    trace_bytes, part_bytes = measured_bytes(traces)
    return Probe(
        samples=len(traces),
        verified=sum(trace.is_correct for trace in traces),
        usable=sum(trace.is_usable for trace in traces),
        tokens=sum(trace.n_tokens for trace in traces),
        seconds=seconds,
        load_seconds=loaded - started,
        trace_bytes=trace_bytes,
        part_bytes=part_bytes,
    )


def measured_bytes(traces: Sequence[Trace]) -> tuple[float, float]:
    """Returns (bytes that one more trace adds, bytes of a part apart from its traces), from parts written
    for the purpose."""
    with TemporaryDirectory() as directory:
        whole, one = (write_traces(Path(directory), some)[1].bytes for some in (traces, traces[:1]))
    trace_bytes = (whole - one) / (len(traces) - 1) if len(traces) > 1 else float(one)
    return trace_bytes, one - trace_bytes
