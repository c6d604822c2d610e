"""A run that was stopped and resumed is the run that never stopped, to the bit; what differs is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from run_examples import (
    PROBLEMS,
    assert_same_run,
    config_of,
    make_world,
    metrics_of,
    rows_of,
    trace,
    weights_of,
)

from precompute.run.progress import Reporter
from precompute.verify.verifier import MATH_VERSIONS
from store.errors import RunError, UserError
from store.reader import TraceStore, Usable
from store.upkeep.compaction import compact
from store.writer import StoreWriter
from trainer.eval_model import evaluate_model
from trainer.merge import merge
from trainer.planning import dry_run
from trainer.telemetry.console import TrainReporter
from trainer.train import TrainReport, train

# 12 problems: 4 a step end an epoch with step 3, 2 a step with step 6.
EDGE = {"train__problems_per_step": 4, "train__mini_batch_problems": 2}
MIDDLE = {"train__problems_per_step": 2, "train__mini_batch_problems": 2}
SMALL = {
    "rollout__num_generations": 2,
    "rollout__max_completion_length": 16,
    "train__learning_rate": 1e-2,
}
LORA = {"student__use_peft": True, "student__lora_r": 4}
CASES: dict[str, dict[str, Any]] = {
    "two mini-batches, at the end of an epoch": EDGE,
    "LoRA": {**EDGE, **LORA},
    "adamw_8bit": {**EDGE, "train__optim": "adamw_8bit"},
    # One mini-batch, in the middle of an epoch.
    "paged_adamw_8bit": {**MIDDLE, "train__optim": "paged_adamw_8bit"},
}

WARM = {
    **MIDDLE,
    "train__max_steps": 2,
    "sft__steps": 4,
    "sft__traces_per_step": 5,  # 16 traces: an epoch ends with step 3
    "sft__learning_rate": 1e-2,
    "rollout__max_completion_length": 32,
    "train__optim": "adamw_8bit",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 4,096 makes the embedding large enough for 8-bit state."""
    path = tmp_path_factory.mktemp("wide")
    tiny_model(vocab_size=4096).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(world: Path, model: Path, name: str, **changes: Any) -> TrainReport:
    settings = {**SMALL, "run__save_every": 50, **changes}
    return train(config_of(world, model, run__name=name, **settings), reporter=TrainReporter())


def dtypes_of(value: Any) -> set[torch.dtype]:
    """Of every tensor in a nest of dicts."""
    if isinstance(value, dict):
        return {dtype for each in value.values() for dtype in dtypes_of(each)}
    return {value.dtype} if isinstance(value, torch.Tensor) else set()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", CASES)
def test_three_steps_and_three_are_six(name: str, world: Path, wide: Path) -> None:
    changes = CASES[name]
    one = run(world, wide, f"{name} straight", train__max_steps=6, **changes)
    run(world, wide, f"{name} halves", train__max_steps=3, **changes)
    two = run(world, wide, f"{name} halves", train__max_steps=6, **changes)
    assert (one.done.step, two.done.step) == (6, 6)
    assert [row["step"] for row in metrics_of(two.run)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(one.run, two.run, "step-000006")
    saved = torch.load(two.run / "checkpoints" / "step-000006" / "optimizer.pt", weights_only=True)
    assert sum(row["optimizer_steps"] for row in metrics_of(two.run)) >= 6
    assert (torch.uint8 in dtypes_of(saved["optimizer"]["state"])) == ("8bit" in name and "LoRA" not in name)


@pytest.fixture(scope="module")
def warm(world: Path, wide: Path) -> Path:
    """A run with SFT that never stopped."""
    return run(world, wide, "warm straight", **WARM).run


@pytest.mark.parametrize(
    ("sft_steps", "max_steps"), [(2, 0), (4, 0), (4, 1)], ids=["inside", "at the edge", "after"]
)
def test_a_stop_anywhere_about_sft_changes_nothing(
    sft_steps: int, max_steps: int, warm: Path, world: Path, wide: Path
) -> None:
    name = f"warm {sft_steps} {max_steps}"
    run(world, wide, name, **{**WARM, "sft__steps": sft_steps, "train__max_steps": max_steps})
    assert_same_run(warm, run(world, wide, name, **WARM).run, "step-000002")


@pytest.fixture(scope="module")
def begun_once(world: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of its own with a run of two steps."""
    path = tmp_path_factory.mktemp("begun")
    shutil.copytree(world / "traces", path / "traces")
    shutil.copy(world / "train.jsonl", path)
    run(path, model_dir, "run", train__max_steps=2, run__save_every=1)
    return path


@pytest.fixture
def begun(begun_once: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(begun_once, tmp_path / "begun")


def test_a_store_that_gained_a_trace_is_refused_unless_asked_for(begun: Path, model_dir: Path) -> None:
    # PROBLEMS[0] had no trace: with one, the next steps would be others.
    with StoreWriter.open(begun / "traces", verifiers=MATH_VERSIONS) as w:
        w.append([trace(PROBLEMS[0], "ada", "\\boxed{0}")])
    with pytest.raises(RunError, match=r"other traces of ada than .*--resume-with-changed-store"):
        run(begun, model_dir, "run", train__max_steps=3)
    reporter = TrainReporter()
    settings = config_of(begun, model_dir, run__name="run", **SMALL, train__max_steps=3)
    assert train(settings, changed_store=True, reporter=reporter).done.step == 3
    assert any("other traces of ada than" in warning for warning in reporter.warnings)
    # From there on it is the store that was trained with.
    assert run(begun, model_dir, "run", train__max_steps=4).done.step == 4


def test_a_store_that_was_moved_and_compacted_is_the_same(begun: Path, model_dir: Path) -> None:
    (begun / "traces").rename(begun / "moved")
    compact(begun / "moved")
    assert run(begun, model_dir, "run", train__max_steps=3, store__path=str(begun / "moved")).done.step == 3


def test_where_a_run_is_given_for_a_checkpoint_its_last_one_is_named(
    begun: Path, model_dir: Path, tmp_path: Path
) -> None:
    folder = begun / "runs" / "run"
    config = config_of(begun, folder, run__name="other", problems__eval=str(begun / "train.jsonl"))
    calls: dict[str, Callable[[], object]] = {
        "MODEL": lambda: evaluate_model(config, Reporter(), out=tmp_path / "eval"),
        "CHECKPOINT": lambda: merge(folder, tmp_path / "out"),
        "student.model": lambda: train(config, reporter=TrainReporter()),
        "no checkpoint at": lambda: train(
            config, resume=str(folder / "checkpoints"), reporter=TrainReporter()
        ),
    }
    for said, call in calls.items():
        with pytest.raises(UserError, match=f"^{said} .*: it is a run") as error:
            call()
        assert str(error.value).endswith(f"the last one is {folder / 'checkpoints' / 'step-000002'}")


def test_a_checkpoint_past_the_last_step_says_what_to_raise(begun: Path, model_dir: Path) -> None:
    config = config_of(begun, model_dir, **SMALL, train__max_steps=1)
    with pytest.raises(RunError, match=r"past train.max_steps = 1: to go on, set train.max_steps above 2;"):
        train(config, reporter=TrainReporter())


def test_what_a_store_lets_be_asked_is_told_by_teacher(world: Path) -> None:
    with TraceStore(world / "traces") as store:
        everything = store.usable([problem.problem_id for problem in PROBLEMS])
        assert {name: usable.traces for name, usable in everything.items()} == {"ada": 8, "bob": 8}
        assert list(store.usable([PROBLEMS[1].problem_id], teachers=["bob"])) == ["bob"]
        (found,) = store.candidates([PROBLEMS[1].problem_id], teachers=["bob"])[PROBLEMS[1].problem_id]
        # Of one trace the exclusive or is its own id.
        only = store.usable([PROBLEMS[1].problem_id], teachers=["bob"])["bob"]
        assert only == Usable(traces=1, fingerprint=found.trace_id)
        assert store.usable([PROBLEMS[0].problem_id]) == {}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("cut", "model.safetensors is not what was saved"),
        ("flipped", "optimizer.pt is not what was saved"),
        ("gone", "config.json is gone"),
        ("blank", "state.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_one_before(
    harm: str, said: str, begun: Path, model_dir: Path
) -> None:
    damaged = begun / "runs" / "run" / "checkpoints" / "step-000002"
    if harm == "cut":
        with (damaged / "model.safetensors").open("r+b") as file:
            file.truncate(100)
    elif harm == "flipped":
        with (damaged / "optimizer.pt").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read()
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
    elif harm == "gone":
        (damaged / "config.json").unlink()
    else:
        (damaged / "state.json").write_text("")
    with pytest.raises(RunError, match=rf"2 is damaged: .*{said}.* remove it to go on from .*000001"):
        run(begun, model_dir, "run", train__max_steps=3)
    shutil.rmtree(damaged)
    assert run(begun, model_dir, "run", train__max_steps=3).done.step == 3


def test_a_dry_run_refuses_what_training_would(begun: Path, model_dir: Path) -> None:
    settings = config_of(begun, model_dir, run__name="run", **SMALL, train__max_steps=3)
    dry_run(settings)
    with StoreWriter.open(begun / "traces", verifiers=MATH_VERSIONS) as w:
        w.append([trace(PROBLEMS[0], "ada", "\\boxed{0}")])
    with pytest.raises(RunError, match="other traces of ada"):
        dry_run(settings)
    dry_run(settings, changed_store=True)
    with pytest.raises(RunError, match="already holds a run"):
        dry_run(settings, resume="never")
    last = begun / "runs" / "run" / "checkpoints" / "step-000002"
    other = config_of(begun, model_dir, run__name="other", **SMALL, train__max_steps=3)
    dry_run(other, resume=str(last), changed_store=True)
    (last / "optimizer.pt").write_bytes(b"")
    with pytest.raises(RunError, match="is damaged"):
        dry_run(other, resume=str(last), changed_store=True)


def test_a_copy_of_a_checkpoint_beside_the_others_is_left_alone(begun: Path, model_dir: Path) -> None:
    folder = begun / "runs" / "run" / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000002-backup")
    shutil.copy(begun / "runs/run/rollouts/step-000001.parquet", begun / "runs/run/rollouts/step-x.parquet")
    assert run(begun, model_dir, "run", train__max_steps=3).done.step == 3
    assert (folder / "step-000002-backup" / "state.json").exists()


def test_a_fork_may_change_rate_lengths_and_steps_and_is_recorded(begun: Path, model_dir: Path) -> None:
    first = begun / "runs" / "run" / "checkpoints" / "step-000002"
    changes = {
        "train__learning_rate": 5e-4,
        "train__lr_schedule": "linear",
        "rollout__max_completion_length": 12,
        "train__max_steps": 4,
    }

    def fork(name: str, **more: Any) -> tuple[TrainReport, list[str]]:
        lines: list[str] = []
        reporter = TrainReporter()
        reporter.line = lines.append  # type: ignore[method-assign]
        config = config_of(begun, model_dir, run__name=name, **{**SMALL, **changes, **more})
        return train(config, resume=str(first), reporter=reporter), lines

    with pytest.raises(RunError, match=rf"or fork it: --resume {first} under another run\.name"):
        fork("run")
    with pytest.raises(RunError, match=r"train\.seed = 0, now 7\. Set it back, or start again under another"):
        fork("other", train__seed=7)
    report, lines = fork("fork")
    assert report.done.step == 4
    assert lines[0].startswith(f"a fork of {first}, trained with ")
    assert "rollout.max_completion_length = 16, now 12" in lines[0]
    assert [row["learning_rate"] for row in metrics_of(report.run)] == [5e-4 * 0.5, 5e-4 * 0.25]
    changed = {each.split(" = ")[0] for each in read_fork(report.run)["changed"]}
    assert changed == {key.replace("__", ".") for key in changes}
    # It is resumed like any run, and stays recorded.
    config = config_of(begun, model_dir, run__name="fork", **{**SMALL, **changes})
    train(config, reporter=TrainReporter())
    assert read_fork(report.run)["of"] == str(first)


def read_fork(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "fork.json").read_text())
    return found


def test_a_stop_in_an_evaluation_saves_at_once_and_the_evaluation_follows(
    world: Path, model_dir: Path
) -> None:
    held_out = {"problems__eval": str(world / "train.jsonl"), "eval__every": 2, "eval__samples": 2}
    changes = {**held_out, "eval__k": [1], "train__max_steps": 3}
    straight = run(world, model_dir, "evaluated", **changes)

    class Stopping(TrainReporter):
        """Sends SIGTERM in the middle of the evaluation of step 2."""

        seen, sent = 0, False

        def progress(self, what: str, done: int, total: int, **_: Any) -> None:
            self.seen = self.seen + 1 if what == "step 2" else self.seen
            if what == "evaluation" and self.seen and done == 3 and not self.sent:
                self.sent = True
                signal.raise_signal(signal.SIGTERM)

    config = config_of(world, model_dir, run__name="stopped", **{**SMALL, "run__save_every": 50, **changes})
    reporter = Stopping()
    stopped = train(config, reporter=reporter)
    assert reporter.sent
    assert (stopped.done.step, stopped.interrupted_by) == (2, "SIGTERM")
    assert not any("eval/pass@1" in row for row in metrics_of(stopped.run) if row["step"] == 2)
    train(config, reporter=TrainReporter())

    def by_step(path: Path) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for row in metrics_of(path):
            found[row["step"]] = found.get(row["step"], {}) | row
        return found

    assert by_step(stopped.run) == by_step(straight.run)
    assert rows_of(stopped.run, "evals") == rows_of(straight.run, "evals")
    assert weights_of(stopped.run, "step-000003") == weights_of(straight.run, "step-000003")
