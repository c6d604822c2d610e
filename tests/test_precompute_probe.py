"""Expected cost of a run: arithmetic by hand, and a probe of a real teacher against a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from precompute_examples import GOOD, lab_config, parts_of
from rich.console import Console

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.run import pipeline
from precompute.run.probe import Probe, expected_samples
from precompute.run.tables import plan_tables
from store.reader import TraceStore


def teacher(**plan: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"name": "ada", "model": "m", **plan})


def test_expected_samples_by_hand() -> None:
    # Two problems with nothing, one with two unusable tries (one try left), one that is done.
    done = [{}, {}, {0: False, 1: False}, {0: True}]
    # Half of the problems are always solved, the others never: (1 + 3) / 2 for each of the first two.
    assert expected_samples(teacher(until_verified=1, max_samples=3), done, 0.5) == 2 + 2 + 1
    # Two are wanted: (2 + 3) / 2 twice, then 1 of 1, and (1 + 2) / 2 for the one that lacks a second.
    assert expected_samples(teacher(until_verified=2, max_samples=3), done, 0.5) == 2.5 + 2.5 + 1 + 1.5
    # A fixed number needs no share.
    assert expected_samples(teacher(samples=4), [{}, {0: True, 2: False}], 0.1) == 4 + 2


def test_expected_cost_by_hand() -> None:
    counts = {"samples": 10, "verified": 6, "usable": 5, "tokens": 1000, "bytes": 8000}
    probe = Probe(**counts, seconds=4.0, load_seconds=30.0, left=5.0)
    # Half as many samples again: half of the tokens, bytes and seconds, behind 30 s of loading.
    assert (probe.tokens_left, probe.bytes_left, probe.seconds_left) == (500, 4000, 32)


def config(store: Path, **changes: Any) -> PrecomputeConfig:
    return lab_config(store, GOOD | changes, part_traces=512)


def test_a_probe_measures_what_a_run_then_finds_and_keeps_nothing(tmp_path: Path) -> None:
    settings = config(tmp_path / "traces", samples=2)
    plan = pipeline.plan(settings, limit=24, probe=24)
    assert list(tmp_path.iterdir()) == []
    probe = plan.teachers[0].probe
    assert probe is not None
    report = pipeline.run(settings, limit=24)
    with TraceStore(tmp_path / "traces") as store:
        first = [trace for trace in store.traces() if trace.sample_index == 0]
    # The same seeds draw the same samples.
    assert probe.tokens == sum(trace.n_tokens for trace in first)
    assert probe.verified == probe.usable == sum(trace.is_correct for trace in first)
    assert probe.left == report.teachers[0].stored.traces == 48
    assert probe.tokens_left == pytest.approx(report.teachers[0].stored.tokens, rel=0.1)
    size = sum(part.stat().st_size for part in parts_of(tmp_path / "traces"))
    # What a part needs apart from its traces is counted with each probed one.
    assert size < probe.bytes_left < 2 * size


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
