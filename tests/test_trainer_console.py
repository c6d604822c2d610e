"""What a person sees of a run; log.txt has the same lines."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from trainer.config import RunConfig
from trainer.telemetry.console import TrainReporter

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
    "completions/clipped_ratio": 0.5,
    "seconds/step": 1.04,
}


def test_a_step_is_a_line_with_its_numbers_and_log_txt_gets_all_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    console = Console(width=200, file=io.StringIO())
    with (
        caplog.at_level(logging.INFO, logger="ampo"),
        console.capture() as capture,
        TrainReporter(console, RunConfig(log_completions_every=0)) as reporter,
    ):
        reporter.stepped(ROW, [], 60)
    step, warning = capture.get().splitlines()
    assert step == (
        "step  7/60  reward 0.325  solved  25%  all-fail  75%  queried 12 (92% hit) "
        "loss -0.006  entropy      -  len 27  1.0 s"
    )
    assert "50% of the samples reached rollout.max_completion_length" in warning
    assert [record.getMessage() for record in caplog.records] == [step, warning.removeprefix("warning: ")]
