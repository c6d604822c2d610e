"""What a person sees of a run, in narrow and wide terminals; log.txt has the whole line in both."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from trainer.config import RunConfig
from trainer.telemetry.console import STEP_HEADS, WIDE, ConsoleReporter

ROW: dict[str, Any] = {
    "step": 7,
    "reward": 0.325,
    "accuracy": 0.25,
    "groups/all_fail": 0.75,
    "store/queries": 12,
    "store/hit_rate": 11 / 12,
    "loss": -0.00612,
    "entropy": None,
    "completions/mean_length": 26.6,
    "completions/clipped_ratio": 0.0,
    "seconds/step": 1.04,
}


def said(width: int, *, rows: int) -> list[str]:
    """What `rows` equal steps print, a warning after the second."""
    console = Console(width=width, file=io.StringIO())
    reporter = ConsoleReporter(console, RunConfig(log_completions_every=0))
    reporter.max_steps = 60
    reporter._task = reporter._progress.add_task("training", total=60, note="")
    with console.capture() as capture:
        for number in range(rows):
            reporter.stepped(ROW, [])
            if number == 1:
                reporter.warned("look")
    return [line.rstrip() for line in capture.get().splitlines()]


def test_in_80_columns_the_numbers_stand_below_their_names_and_names_return_after_other_lines() -> None:
    lines = said(80, rows=3)
    heads, numbers = STEP_HEADS.rstrip(), lines[1]
    assert lines == [heads, numbers, numbers, "warning: look", heads, numbers]
    assert numbers.split() == ["7", "0.325", "25%", "75%", "12", "92%", "-0.006", "-", "27", "1.0", "s"]
    # Each number ends where its name ends, the unit of the time with it.
    ends = {place + len(name) for name in heads.split() for place in [heads.index(f" {name}") + 1]}
    assert {
        end for end in ends if numbers[end - 1 : end].strip() and not numbers[end : end + 1].strip()
    } == ends
    assert max(map(len, lines)) <= 80


def test_a_wide_terminal_gets_a_line_with_the_names_in_it_and_log_txt_gets_it_from_both(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="ampo"):
        (line,) = said(WIDE, rows=1)
        said(80, rows=1)
    assert line.startswith("step  7/60  reward 0.325  solved  25%  all-fail  75%  queried 12 (92% hit)")
    assert [record.getMessage() for record in caplog.records] == [line, line]
    assert len(line) <= WIDE
