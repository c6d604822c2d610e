"""What bench.real_model tells of a run is what the run's files and its two students say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from run_examples import config_of, make_world, settings

from bench.real_model import main
from trainer.telemetry.console import TrainReporter
from trainer.train import train


def test_the_traces_of_a_run_are_read_before_and_after_it(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path)
    steps = {"train__max_steps": 1, "train__learning_rate": 0.05}
    train(config_of(world, model_dir, **steps), reporter=TrainReporter())
    given = [part for each in settings(world, model_dir, **steps) for part in ("--set", each)]
    (world / "empty.toml").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["real_model", "--config", str(world / "empty.toml"), *given])
    main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 8 of 12 problems have two traces each; a step holds 4 problems, of which some may have none.
    assert told["trained"]["traces"] + told["other"]["traces"] == 16
    assert {name: row["traces"] for name, row in told["teachers"].items()} == {"ada": 8, "bob": 8}
    assert (told["steps"], told["verified"]) == (1, {"ada": 1.0, "bob": 1.0})
    before, after = told["trained"]["trace_logprob"]
    assert after > before
