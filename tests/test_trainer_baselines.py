"""The paper's whole table is configuration: six short files, each run through the same code."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from run_examples import metrics_of, rows_of, settings

from precompute.config_file import load_config
from trainer.config import Config
from trainer.telemetry.console import TrainReporter
from trainer.train import train

BASELINES = Path(__file__).parent.parent / "configs" / "baselines"

METHODS = {
    # name -> (supervised steps, sampling steps, when the store is asked, most traces of a group)
    "sft": (True, False, "never", 0),
    "grpo": (False, True, "never", 0),
    "sft-grpo": (True, True, "never", 0),
    "single-teacher": (False, True, "always", 1),
    "ampo": (False, True, "all_fail", 2),
    "sft-ampo": (True, True, "all_fail", 2),
}


def shrunk(name: str, world: Path, model: Path) -> Config:
    """The file as it ships, on the tiny world: paths and sizes are changed, the method is not."""
    sft, rl, _, k = METHODS[name]
    small: dict[str, Any] = {"train__max_steps": 2 * rl, "run__name": name, "sft__steps": 2 * sft}
    small |= {"sft__traces_per_step": 4, "rollout__max_completion_length": 40, "train__seed": 1}
    if k == 1:
        small |= {"guidance__teachers": ["ada"]}  # the tiny store's
    return load_config(Config, str(BASELINES / f"{name}.toml"), settings(world, model, **small))


@pytest.mark.parametrize("name", METHODS)
def test_a_baseline_does_what_its_name_says(name: str, world: Path, model_dir: Path) -> None:
    sft, rl, asked, k = METHODS[name]
    config = shrunk(name, world, model_dir)
    assert config.guidance.trigger == asked or not rl
    run = train(config, reporter=TrainReporter()).run
    rows = metrics_of(run)
    assert sum("sft/loss" in row for row in rows) == 2 * sft
    assert sum("reward" in row for row in rows) == 2 * rl
    queries = rows_of(run, "queries")
    assert bool(queries) == (asked != "never")
    for file, samples in rows_of(run, "rollouts").items():
        student = [row for row in samples if row["origin"] == "student"]
        failed = {row["problem_id"] for row in student} - {
            row["problem_id"] for row in student if row["is_correct"]
        }
        everything = {row["problem_id"] for row in samples}
        due = {"never": set(), "always": everything, "all_fail": failed}[asked]
        assert {row["problem_id"] for row in queries.get(file, [])} == due
        traces = [row["problem_id"] for row in samples if row["origin"] == "teacher"]
        assert max((traces.count(problem) for problem in traces), default=0) == k


def test_the_table_is_whole_and_every_file_is_short() -> None:
    assert {path.stem for path in BASELINES.glob("*.toml")} == set(METHODS)
    for path in BASELINES.glob("*.toml"):
        assert len(path.read_text().splitlines()) <= 20
        assert "extends" in tomllib.loads(path.read_text())


def test_evaluation_is_the_same_for_all() -> None:
    loaded = [load_config(Config, str(BASELINES / f"{name}.toml"), []) for name in METHODS]
    for config in loaded:
        assert (config.eval, config.problems) == (loaded[0].eval, loaded[0].problems)
    assert len({config.run.name for config in loaded}) == len(METHODS)
