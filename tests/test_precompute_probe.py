"""What a run is expected to take: arithmetic by hand, and a probe of a real teacher against a real run."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.run import pipeline
from precompute.run.probe import Probe, expect, expected_tries, split_tries
from precompute.run.tables import plan_tables, short_bytes, short_count, short_time
from store.reader import TraceStore

LAB = Path(__file__).parents[1] / "lab"

pytestmark = pytest.mark.usefixtures("one_thread")


def teacher(**plan: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"name": "ada", "model": "m", **plan})


PROBE = Probe(
    samples=10,
    verified=6,
    usable=5,
    tokens=1000,
    seconds=4.0,
    load_seconds=30.0,
    trace_bytes=200.0,
    part_bytes=5000.0,
)
"""Half is usable, 100 tokens a sample, 250 tokens a second."""


def test_tries_by_hand() -> None:
    # One wanted, p = 1/2, three tries: 1 + 1/2 + 1/4. All or nothing: half take 1, half take 3.
    assert expected_tries(0.5, wanted=1, tries=3) == pytest.approx(1.75)
    assert split_tries(0.5, wanted=1, tries=3) == pytest.approx(2.0)
    # Two wanted: the first two are drawn in any case, the third unless both were right (1 - 1/4).
    assert expected_tries(0.5, wanted=2, tries=3) == pytest.approx(2.75)
    assert split_tries(0.5, wanted=2, tries=3) == pytest.approx(2.5)
    # Nothing is ever right, or everything is; more are wanted than may be tried.
    assert expected_tries(0.0, wanted=1, tries=8) == split_tries(0.0, wanted=1, tries=8) == 8
    assert expected_tries(1.0, wanted=1, tries=8) == split_tries(1.0, wanted=1, tries=8) == 1
    assert expected_tries(0.5, wanted=4, tries=3) == split_tries(0.5, wanted=4, tries=3) == 3


@given(st.floats(0, 1), st.integers(1, 3), st.integers(1, 6))
def test_tries_are_those_of_every_possible_course(share: float, wanted: int, tries: int) -> None:
    mean = 0.0
    for course in product([False, True], repeat=tries):
        likely = share ** sum(course) * (1 - share) ** (tries - sum(course))
        ends = [n for n in range(1, tries + 1) if sum(course[:n]) == wanted]
        mean += likely * (ends[0] if ends else tries)
    assert expected_tries(share, wanted=wanted, tries=tries) == pytest.approx(mean)


def test_what_is_expected_by_hand() -> None:
    # Two problems with nothing, one with two unusable tries (one try left), one that is done.
    done = [{}, {}, {0: False, 1: False}, {0: True}]
    least, most = expect(teacher(until_verified=1, max_samples=3), done, PROBE, part_traces=2)
    assert least.samples == pytest.approx(1.75 + 1.75 + 1)
    assert most.samples == pytest.approx(2 + 2 + 1)
    # 5 samples of 100 tokens at 250 a second, behind 30 s of loading; 3 parts of at most 2 traces.
    assert most.tokens == pytest.approx(500)
    assert most.seconds == pytest.approx(30 + 2)
    assert most.bytes == pytest.approx(5 * 200 + 3 * 5000)


def test_a_fixed_number_of_samples_needs_no_share() -> None:
    least, most = expect(teacher(samples=4), [{}, {0: True, 2: False}], PROBE, part_traces=512)
    assert least == most
    assert (least.samples, least.tokens) == (4 + 2, 600)
    nothing, _ = expect(teacher(samples=1), [{0: False}], PROBE, part_traces=512)
    assert (nothing.samples, nothing.seconds, nothing.bytes) == (0, 0, 0)


def config(store: Path, **changes: Any) -> PrecomputeConfig:
    totals = {"name": "totals", "model": str(LAB / "models" / "teacher-totals"), "system_prompt": ""}
    return PrecomputeConfig.model_validate(
        {
            "problems": {"train": str(LAB / "problems" / "train.jsonl")},
            "store": {"path": str(store)},
            "verify": {"workers": 1},
            "teachers": [totals | {"max_tokens": 120} | changes],
        }
    )


def test_a_probe_measures_what_a_run_then_finds_and_keeps_nothing(tmp_path: Path) -> None:
    settings = config(tmp_path / "traces", samples=2)
    plan = pipeline.plan(settings, limit=24, probe=24)
    assert list(tmp_path.iterdir()) == []
    (probed,) = plan.teachers
    probe, least = probed.probe, probed.least
    assert probe is not None
    assert least is not None
    report = pipeline.run(settings, limit=24)
    with TraceStore(tmp_path / "traces") as store:
        first = [trace for trace in store.traces() if trace.sample_index == 0]
    # The same seeds draw the same samples.
    assert probe.tokens == sum(trace.n_tokens for trace in first)
    assert probe.verified == probe.usable == sum(trace.is_correct for trace in first)
    assert least.samples == report.teachers[0].samples == 48
    assert least.tokens == pytest.approx(report.teachers[0].tokens, rel=0.1)
    size = sum(part.stat().st_size for part in (tmp_path / "traces" / "parts").rglob("*.parquet"))
    # Two samples of a problem lie beside each other and compress better than one each of two problems.
    assert size < least.bytes < 1.25 * size


def test_a_probe_is_spread_over_the_problems_that_are_left(tmp_path: Path) -> None:
    settings = config(tmp_path / "traces")
    pipeline.run(settings, limit=4)
    plan = pipeline.plan(settings, limit=12, probe=3)
    probe = plan.teachers[0].probe
    assert probe is not None
    assert probe.samples == 3
    done = pipeline.plan(settings, limit=4, probe=3)
    assert done.teachers[0].probe is None
    assert "measured on a probe" not in shown(done)


def shown(plan: pipeline.PrecomputePlan) -> str:
    console = Console(width=80, record=True)
    console.print(plan_tables(plan, student_form="answer_tags"))
    return console.export_text()


def test_the_plan_fits_80_columns_and_shows_the_way_into_the_students_form(tmp_path: Path) -> None:
    settings = config(tmp_path / "traces", until_verified=1, max_samples=4)
    text = shown(pipeline.plan(settings, limit=8, probe=4))
    assert "…" not in text
    assert "8 x 4" in text
    assert "totals answers in the form boxed" in text
    # The first problem's gold answer, 30-7+9-5+1-8-5 = 15.
    assert "the student reads ... \\boxed{15}  as  ... <answer>15</answer>" in text
    tags = pipeline.plan(config(tmp_path / "traces", answer_form="answer_tags"), limit=8)
    assert "totals answers in the form answer_tags" in shown(tags)


def test_amounts_are_short() -> None:
    assert [short_count(n) for n in (0, 999, 1000, 12_345, 999_999, 3.4e12)] == [
        "0", "999", "1.0k", "12.3k", "1.0M", "3.4T",
    ]  # fmt: skip
    assert [short_bytes(n) for n in (12, 2048, 300 * 2**20)] == ["12 B", "2.0 KiB", "300 MiB"]
    assert [short_time(s) for s in (12, 90, 3600, 500 * 3600)] == ["12 s", "1.5 min", "1.0 h", "500 h"]
