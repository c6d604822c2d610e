"""Runs of one rank and of two: equal samples, queries and losses; checkpoints that any number of ranks
resumes from; and how ranks end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from process_runs import cut_back
from processes import run_processes, start_processes
from run_examples import PROBLEMS, make_world, metrics_of, rows_of, run, settings, write_problems
from safetensors.torch import load_file

from trainer.parallel.world import ALONE, World
from trainer.run.checkpoint import check_complete, checkpoints
from trainer.run.run_dir import Position

LORA = {
    "student__use_peft": True,
    "student__lora_r": 4,
    "train__beta": 0.1,
    "sft__steps": 2,
    "sft__traces_per_step": 3,
}


BUFFER = {"guidance__place": "buffer", "guidance__buffer": 3}
PREFIX = {
    "guidance__insert": "prefix",
    "guidance__place": "instead",
    "guidance__share": [0.5],
    "rewards__length": 1.0,
    "rollout__max_prompt_length": 128,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_world(tmp_path_factory.mktemp("world"))
    write_problems(path / "held-out.jsonl", PROBLEMS[:5])
    return path


def changes(world: Path, name: str, **more: Any) -> dict[str, Any]:
    """Three problems a mini-batch, so that the ranks' shares are of different sizes."""
    return {
        "run__name": name,
        "run__keep_last": 9,
        "problems__eval": str(world / "held-out.jsonl"),
        "train__problems_per_step": 6,
        "train__mini_batch_problems": 3,
        "train__max_tokens_per_microbatch": 200,
        "guidance__k": 1,  # of two candidates, so that they are scored
        "eval__every": 2,
        "eval__samples": 2,
        "eval__k": [1],
        **more,
    }


def alone(world: Path, model: Path, name: str, **more: Any) -> Path:
    return run(world, model, **changes(world, name, **more)).run


@pytest.fixture(scope="module")
def runs(world: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by one process: `one`, `one-lora`. By two: the same, and `two-two`, `two-lora-two`, `one-two`, the
    second halves of what two and one began. By one: `two-one`."""
    folder = world / "runs"
    alone(world, model_dir, "one")
    alone(world, model_dir, "one-lora", **LORA)
    alone(world, model_dir, "one-buffer", **BUFFER)
    alone(world, model_dir, "one-prefix", **PREFIX)
    described = [
        {"settings": settings(world, model_dir, **changes(world, name, **more)), "copy": copy}
        for name, more, copy in [
            ("two", {"run__report_to": ["tensorboard"]}, None),
            ("two-lora", LORA, None),
            ("two-buffer", BUFFER, None),
            ("two-prefix", PREFIX, None),
            ("two-buffer-two", BUFFER, [str(folder / "two-buffer"), str(folder / "two-buffer-two")]),
            ("two-two", {}, [str(folder / "two"), str(folder / "two-two")]),
            ("two-lora-two", LORA, [str(folder / "two-lora"), str(folder / "two-lora-two")]),
            ("one-two", {}, [str(folder / "one"), str(folder / "one-two")]),
        ]
    ]
    plan = tmp_path_factory.mktemp("plan") / "runs.json"
    plan.write_text(json.dumps(described))
    done = run_processes(2, "tests/process_runs.py", str(plan))
    assert done.returncode == 0, done.stderr
    cut_back(folder / "two", folder / "two-one")
    alone(world, model_dir, "two-one")
    return folder


def assert_close(one: Any, two: Any) -> None:
    """Equal but for the order of floating-point sums."""
    if isinstance(one, float) and isinstance(two, float):
        assert two == pytest.approx(one, rel=2e-3, abs=1e-5)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for ours, theirs in zip(one, two, strict=True):
            assert_close(ours, theirs)
    else:
        assert one == two


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("one", "two"),
        ("one-lora", "two-lora"),
        ("one-buffer", "two-buffer"),
        ("one-prefix", "two-prefix"),
        ("one", "one-two"),
        ("one", "two-one"),
    ],
)
def test_a_run_of_two_ranks_is_the_run_of_one(ours: str, theirs: str, runs: Path) -> None:
    one, two = runs / ours, runs / theirs
    assert_close(metrics_of(one), metrics_of(two))
    for folder in ("rollouts", "queries", "evals"):
        assert rows_of(one, folder)
        assert_close(rows_of(one, folder), rows_of(two, folder))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("two", "model.safetensors"),
        ("two-lora", "adapter_model.safetensors"),
        ("two-buffer", "model.safetensors"),
    ],
)
def test_resuming_with_as_many_ranks_changes_no_bit(name: str, file: str, runs: Path) -> None:
    whole, resumed = runs / name, runs / f"{name}-two"
    assert metrics_of(whole) == metrics_of(resumed)
    for folder in ("rollouts", "queries", "evals"):
        assert rows_of(whole, folder) == rows_of(resumed, folder)
    ours, theirs = (load_file(each / "checkpoints" / "step-000004" / file) for each in (whole, resumed))
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["", "-lora"])
def test_a_checkpoint_is_what_one_process_would_have_written(kind: str, runs: Path) -> None:
    one, two = (runs / f"{name}{kind}" / "checkpoints" / "step-000004" for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    (weights,) = (path.name for path in one.glob("*.safetensors"))
    ours, theirs = load_file(one / weights), load_file(two / weights)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=2e-2, atol=1e-4)
    states = [torch.load(path / "optimizer.pt", weights_only=True) for path in (one, two)]
    assert_same_layout(*states)


def assert_same_layout(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same_layout(one[key], two[key])
    elif isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype, type(one)) == (two.shape, two.dtype, type(two))


def test_env_json_has_the_number_of_processes_and_trackers_run_in_rank_0(runs: Path) -> None:
    counts = [json.loads((runs / name / "env.json").read_text())["processes"] for name in ("one", "two")]
    assert counts == [1, 2]
    assert len(list((runs / "two" / "tensorboard").iterdir())) == 1


def test_every_rank_has_every_size_th_item() -> None:
    assert [World(rank=rank, size=3).share("abcdefg") for rank in range(3)] == [
        ["a", "d", "g"],
        ["b", "e"],
        ["c", "f"],
    ]
    assert ALONE.share("abc") == ["a", "b", "c"]


AMPO = str(Path(sys.executable).parent / "ampo")


def command(world: Path, model: Path, name: str, **more: Any) -> list[str]:
    """As the README has it."""
    sets = [each for value in settings(world, model, run__name=name, **more) for each in ("--set", value)]
    return ["--no-python", AMPO, "train", *sets]


def test_a_user_error_is_printed_once_and_ends_all_ranks(world: Path, model_dir: Path) -> None:
    four_bits = {"student__use_peft": True, "student__load_in_4bit": True}
    done = run_processes(2, *command(world, model_dir, "mistaken", **four_bits))
    assert done.returncode != 0
    assert done.stderr.count("error: student.load_in_4bit") == 1
    assert "exitcode  : 2" in done.stderr
    assert not (world / "runs" / "mistaken" / "config.toml").exists()


@pytest.fixture
def running(world: Path, model_dir: Path) -> Any:
    """A run of two processes that has done its first step, and its directory."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, save_every: int = 100_000) -> tuple[subprocess.Popen[str], Path]:
        arguments = command(world, model_dir, name, train__max_steps=100_000, run__save_every=save_every)
        process = start_processes(2, *arguments)
        started.append(process)
        path = world / "runs" / name
        until = time.monotonic() + 200
        while not metrics_if_any(path) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
        return process, path

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def metrics_if_any(run: Path) -> str:
    path = run / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_saves_once_and_all_leave(
    sent: signal.Signals, running: Any, world: Path, model_dir: Path
) -> None:
    process, path = running(f"stopped-{sent.name}")
    process.send_signal(sent)
    said, _ = process.communicate(timeout=100)
    (saved,) = (path / "checkpoints").iterdir()
    assert (saved / "state.json").is_file()
    step = int(saved.name.removeprefix("step-"))
    assert json.loads(metrics_if_any(path).splitlines()[-1])["step"] == step
    assert said.count("finishing this step") == 1
    assert said.count(f"stopped by {sent.name} after step {step}") == 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0", "1"])
def test_a_killed_rank_ends_the_others_and_the_last_checkpoint_is_whole(
    killed: str, running: Any, world: Path, model_dir: Path
) -> None:
    name = f"killed-{killed}"
    process, path = running(name, save_every=1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {rank_of(int(child)): int(child) for child in children}
    time.sleep(0.5)  # into the next steps, and into whatever they save
    os.kill(ranks[killed], signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{each}").exists() for each in ranks.values())
    found = checkpoints(path / "checkpoints")
    for each in found:
        check_complete(each)
    done = Position.of(found[-1]).step if found else 0
    last = {"train__max_steps": done + 1, "run__save_every": 1}
    assert run(world, model_dir, run__name=name, **last).done.step == done + 1
    assert [row["step"] for row in metrics_of(path)] == list(range(1, done + 2))


def rank_of(process: int) -> str | None:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((v.decode().removeprefix("RANK=") for v in variables if v.startswith(b"RANK=")), None)


@pytest.mark.slow
def test_ranks_end_with_0_thirty_times_in_a_row(world: Path, model_dir: Path) -> None:
    for number in range(30):
        given = settings(world, model_dir, run__name=f"ended-{number}", train__max_steps=1)
        flags = [word for each in given for word in ("--set", each)]
        done = run_processes(2, "cli.py", "train", *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done: step 1") == 1
