"""Several ranks that sample with vLLM: each has an engine of its own, or all have the same servers."""

from __future__ import annotations

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tied_student
from openai_examples import free_port, vllm_server
from proc_examples import children_of
from processes import run_processes, start_processes
from run_examples import metrics_of, rows_of, settings
from run_examples import run as run_one
from test_trainer_distributed import command, rank_of

from trainer.telemetry.metrics import read_metrics

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

LORA = {"student__use_peft": True, "student__lora_r": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is its embedding: one weight, sharded once."""
    return save_tied_student(tmp_path_factory.mktemp("tied"))


def run_two(plan: Path, world: Path, model: Path, name: str, **changes: Any) -> Path:
    """Runs two steps with two ranks; returns the run's directory."""
    values = {"train__max_steps": 2, "rollout__engine": "vllm", "run__name": name, **changes}
    plan.write_text(json.dumps([{"settings": settings(world, model, **values), "copy": None}]))
    done = run_processes(2, "tests/process_runs.py", str(plan), timeout=500)
    assert done.returncode == 0, done.stderr
    return world / "runs" / name


def assert_trained_on_vllms_samples(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        # Twice this far apart would be another model: the weights of the step before are.
        assert row["sampling/logp_difference"] < 1e-4
        assert row["grad_norm"] > 0
        assert row["seconds/sync"] > 0
    assert not list(run.glob("*weights*"))


def test_each_rank_samples_with_a_vllm_that_has_the_gathered_weights(
    world: Path, model: Path, tmp_path: Path
) -> None:
    run = run_two(tmp_path / "plan.json", world, model, "own")
    assert_trained_on_vllms_samples(run)
    # Four problems a step, four samples each, by whichever rank.
    drawn = [
        [row for row in rows if row["origin"] == "student"] for rows in rows_of(run, "rollouts").values()
    ]
    assert [len(rows) for rows in drawn] == [16, 16]
    assert all(len({row["problem_id"] for row in rows}) == 4 for rows in drawn)


@pytest.mark.slow
def test_two_ranks_with_vllm_train_as_one_does(world: Path, model: Path, tmp_path: Path) -> None:
    changes = LORA | {"rollout__max_refills": 1, "train__beta": 0.1}
    run = run_two(tmp_path / "plan.json", world, model, "many", **changes)
    assert_trained_on_vllms_samples(run)
    values = {"train__max_steps": 2, "rollout__engine": "vllm", "run__name": "many-one", **changes}
    alone = run_one(world, model, **values).run
    assert [row.keys() for row in metrics_of(alone)] == [row.keys() for row in metrics_of(run)]
    assert {path.name for path in alone.iterdir()} == {path.name for path in run.iterdir()}
    # The first step's samples have the same seeds and weights; two tokens nearly as likely may be swapped.
    first = [next(iter(rows_of(each, "rollouts").values())) for each in (alone, run)]
    same = sum(a["text"] == b["text"] for a, b in zip(*first, strict=False))
    assert same > 0.8 * len(first[0])


@pytest.mark.slow
def test_all_ranks_sample_from_servers_that_rank_0_gives_new_adapters(
    world: Path, model_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    port, log = free_port(), tmp_path / "log.txt"
    options = {"model": str(model_dir), "max-model-len": "128", "max-lora-rank": "8"}
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with vllm_server(log, port, "--enable-lora", options=options, environment=variables):
        urls = [f"http://127.0.0.1:{port}/v1"]
        run = run_two(tmp_path / "plan.json", world, model_dir, "servers", rollout__base_urls=urls, **LORA)
    assert_trained_on_vllms_samples(run)


@pytest.mark.slow
def test_a_killed_vllm_of_one_rank_ends_all_in_one_line(world: Path, model: Path) -> None:
    more = {"rollout__engine": "vllm", "train__max_steps": 100_000, "run__save_every": 1}
    arguments = command(world, model, "killed-vllm", **more)
    process = start_processes(2, *arguments)
    try:
        metrics, until = world / "runs" / "killed-vllm" / "metrics.jsonl", time.monotonic() + 400
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
            time.sleep(0.2)
        ranks = {rank_of(child): child for child in children_of(process.pid)}
        found = children_of(ranks["1"]).items()
        (vllm,) = [child for child, (_, command) in found if b"vllm_process" in command]
        os.kill(vllm, signal.SIGKILL)
        said, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode != 0
    assert said.count("the vllm process ended with exit code -9") == 1
    assert "the last checkpoint is" in said
