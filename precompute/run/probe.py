"""What a run will cost, measured before it is begun: a few problems are really drawn, and nothing is kept.

probe (N problems x 1 sample)  --tokens/s, tokens, verified share, bytes-->  expectation for what is left
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
from precompute.engines import Engine
from precompute.engines.registry import load_engine
from precompute.run.draws import next_samples, samples_left
from precompute.run.progress import Reporter
from precompute.run.solve import Job, TeacherWork, longest_prompt
from precompute.verify.verifier import Verifier
from store.format.parts import write_traces
from store.records import Problem, Trace

WARM_UP_TOKENS = 8
"""The first tokens of an engine may take many times as long as any later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured of one teacher."""

    samples: int
    """Drawn, one a problem."""
    verified: int
    usable: int
    """Of the verified: those that no filter holds back."""
    tokens: int
    """Of all samples together."""
    seconds: float
    """From the first request to the last verdict."""
    load_seconds: float
    """Until the engine was ready."""
    trace_bytes: float
    """What one more trace adds to a part."""
    part_bytes: float
    """What a part takes besides its traces."""

    @property
    def usable_share(self) -> float:
        """In [0, 1]."""
        return self.usable / self.samples

    @property
    def mean_tokens(self) -> float:
        """Of a sample."""
        return self.tokens / self.samples

    @property
    def tokens_per_second(self) -> float:
        """The end of a probe, when few samples still run, counts too: a short one errs on the slow side."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What one teacher will draw, and what it will cost."""

    samples: float
    tokens: float
    seconds: float
    """Loading included."""
    bytes: float
    """On disk, in parts."""


def expected_tries(share: float, *, wanted: int, tries: int) -> float:
    """Samples until `wanted` are usable or `tries` are drawn, each usable with probability `share`:
    E[min(T, tries)] = sum over t < tries of P(fewer than `wanted` of t are usable)."""
    return math.fsum(
        math.comb(t, usable) * share**usable * (1 - share) ** (t - usable)
        for t in range(tries)
        for usable in range(min(wanted, t + 1))
    )


def split_tries(share: float, *, wanted: int, tries: int) -> float:
    """The same where problems differ as much as they can: `share` of them are always solved, the others
    never, and those take every try."""
    return share * min(wanted, tries) + (1 - share) * tries


def expect(
    teacher: TeacherConfig, done: Iterable[Mapping[int, bool]], probe: Probe, *, part_traces: int
) -> tuple[Expectation, Expectation]:
    """(least, most) for problems of which `done` (sample_index -> usable) is there.

    Without `until_verified` both are the same. With it, least takes all problems for equally hard and most
    takes each for solved always or never; wrong samples are taken to be as long as right ones.
    """
    least = most = 0.0
    for (wanted, tries), problems in _open_tries(teacher, done).items():
        if teacher.until_verified is None:
            least, most = least + problems * tries, most + problems * tries
        else:
            least += problems * expected_tries(probe.usable_share, wanted=wanted, tries=tries)
            most += problems * split_tries(probe.usable_share, wanted=wanted, tries=tries)
    return _cost(least, probe, part_traces), _cost(most, probe, part_traces)


def _open_tries(teacher: TeacherConfig, done: Iterable[Mapping[int, bool]]) -> Counter[tuple[int, int]]:
    """(usable traces still wanted, tries left) -> problems"""
    found: Counter[tuple[int, int]] = Counter()
    for samples in done:
        if tries := samples_left(teacher, samples):
            found[(teacher.until_verified or 0) - sum(samples.values()), tries] += 1
    return found


def _cost(samples: float, probe: Probe, part_traces: int) -> Expectation:
    tokens = samples * probe.mean_tokens
    return Expectation(
        samples=samples,
        tokens=tokens,
        seconds=probe.load_seconds + tokens / probe.tokens_per_second if samples else 0.0,
        bytes=samples * probe.trace_bytes + math.ceil(samples / part_traces) * probe.part_bytes,
    )


def run_probe(
    job: Job,
    problems: Sequence[Problem],
    done: Mapping[str, Mapping[int, bool]],
    config: PrecomputeConfig,
    *,
    count: int,
    verifier: Verifier,
    reporter: Reporter,
) -> Probe | None:
    """Loads the teacher and draws one sample of `count` problems, spread evenly over those that still get
    some; None when none does. Nothing is kept. Raises EngineError."""
    left = [p for p in problems if next_samples(job.config, done.get(p.problem_id, {}))]
    chosen = [left[number * len(left) // count] for number in range(count)] if count < len(left) else left
    if not chosen:
        return None
    once = {"samples": 1, "until_verified": None, "max_samples": None}
    probing = replace(job, config=job.config.model_copy(update=once))
    work = TeacherWork(probing, chosen, {}, verifier=verifier, filters=config.filters, reporter=reporter)
    work.fill_prompts()
    reporter.message(f"{job.name}: loading {job.config.model} with {job.engine} for a probe")
    started = time.monotonic()
    longest = longest_prompt(work.prompts)
    with closing(load_engine(job.config, job.engine, job.tokenizer, longest_prompt=longest)) as engine:
        work.warm_up(engine, WARM_UP_TOKENS)
        loaded = time.monotonic()
        traces = _draw(work, engine, config)
        seconds = time.monotonic() - loaded
    reporter.finished(work.progress())
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


def _draw(work: TeacherWork, engine: Engine, config: PrecomputeConfig) -> list[Trace]:
    traces: list[Trace] = []
    work.run(engine, traces.extend, config.store)
    return traces


def measured_bytes(traces: Sequence[Trace]) -> tuple[float, float]:
    """(bytes that one more trace takes, bytes of a part besides its traces), by writing parts and looking at
    their sizes."""
    with TemporaryDirectory() as directory:
        whole, one = (write_traces(Path(directory), some)[1].bytes for some in (traces, traces[:1]))
    trace_bytes = (whole - one) / (len(traces) - 1) if len(traces) > 1 else float(one)
    return trace_bytes, one - trace_bytes
