"""What bench.real_model computes from counts, and when its arms end."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from run_examples import config_of, make_world

from bench import real_model
from bench.real_model import METHODS, interval, summary, train_arm
from trainer.run.checkpoint import checkpoints
from trainer.telemetry.metrics import read_metrics


def test_leads_are_paired_by_problem_and_averaged_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "read_metrics", lambda run: [])
    counts = {"untrained": [0, 0], "start": [2, 0]}
    counts |= {"ampo-0": [8, 4], "ampo-1": [8, 0], "grpo-0": [4, 0], "grpo-1": [4, 0], "sft-0": [8, 4]}
    counts["sft-1"] = counts["ampo-1"]
    solved = {(name, "heldout"): each for name, each in counts.items()}
    solved |= {(name, "siblings"): [1, 1] for name in counts}
    body = summary(solved, Namespace(minutes=1, seeds=[0, 1], samples=8, methods=list(METHODS)))
    # ampo: problem 1 is 8/8 in both seeds, problem 2 is 4/8 and 0/8: (1 + 0.25) / 2. grpo: (0.5 + 0) / 2.
    assert body["methods"]["ampo"]["heldout pass@1"][0] == 0.625
    # Differences of the two problems: 0.5 and 0.25; a resample is one of 0.25, 0.375, 0.5.
    assert body["lead"]["ampo over grpo"]["heldout pass@1"] == [0.375, 0.25, 0.5]
    # Problem 2 is solved in one of two seeds: (1 + 0.5) / 2.
    assert body["methods"]["ampo"]["heldout pass@8"][0] == 0.75
    assert body["lead"]["ampo over sft"]["siblings pass@2"] == [0.0, 0.0, 0.0]


def test_an_interval_of_equal_values_has_no_width() -> None:
    assert interval(real_model.np.array([0.5, 0.5, 0.5])) == [0.5, 0.5, 0.5]


def test_an_arm_ends_after_the_step_in_which_its_time_is_up_and_stays_ended(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)

    def settings(name: str, *more: str) -> object:
        return config_of(world, model_dir, run__name=name, train__max_steps=100)

    monkeypatch.setattr(real_model, "settings", settings)
    monkeypatch.setattr(real_model, "FOLDER", world / "runs")
    assert set(METHODS) == {"ampo", "grpo", "sft"}
    for _ in range(2):  # the second call finds that the time is up
        train_arm("ampo", 0, seconds=1e-6)
        run = world / "runs" / "ampo-0"
        assert [row["step"] for row in read_metrics(run)] == [1]
        assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-000001"]
