"""Whole runs: what the files say, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_student
from run_examples import PROBLEMS, assert_same_run, config_of, metrics_of, rows_of, run, write_problems

from store.errors import RunError, TrainingError, UserError
from store.records import Problem
from trainer.config import Config
from trainer.planning import dry_run
from trainer.run import checkpoint
from trainer.run.run_dir import RunFiles
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import PHASES
from trainer.train import train


@pytest.fixture(scope="module")
def straight(world: Path, model_dir: Path) -> Path:
    """Four steps without a stop; other tests compare with it or read its files."""
    return run(world, model_dir, run__name="straight").run


def test_each_line_says_where_the_steps_time_went_and_what_it_took(straight: Path) -> None:
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        phases = [row[f"seconds/{phase}"] for phase in PHASES]
        # The tiny student draws, asks and learns in every step: none of it takes no time.
        assert all(row[f"seconds/{phase}"] > 0 for phase in ("sample", "query", "update"))
        assert sum(phases) <= row["seconds/step"] + 0.001
        assert sum(row[f"share/{phase}"] for phase in PHASES) == pytest.approx(
            sum(phases) / row["seconds/step"], abs=0.01
        )
        assert row["tokens_per_second/sampled"] > 0
        assert row["tokens_per_second/trained"] > 0
        assert row["memory/peak_mib"] >= row["memory/peak_mib/update"] > 50


def test_asked_are_exactly_the_problems_whose_samples_all_failed_by_the_files_alone(straight: Path) -> None:
    queries, rollouts = rows_of(straight, "queries"), rows_of(straight, "rollouts")
    assert list(queries) == list(rollouts) == [f"step-{step:06d}.parquet" for step in range(1, 5)]
    for name, rows in rollouts.items():
        student = [row for row in rows if row["origin"] == "student"]
        solved = {row["problem_id"] for row in student if row["is_correct"]}
        failed = {row["problem_id"] for row in student} - solved
        assert {row["problem_id"] for row in queries[name]} == failed
        assert failed


def test_replaced_samples_stay_in_the_rollouts_beside_the_selected_trace(straight: Path) -> None:
    queries = rows_of(straight, "queries")
    for name, rows in rows_of(straight, "rollouts").items():
        replaced = {(r["problem_id"], r["sample_index"]) for r in rows if r["replaced"]}
        traces = [r for r in rows if r["origin"] == "teacher"]
        assert {(r["problem_id"], r["sample_index"]) for r in traces} == replaced
        assert {r["trace_id"] for r in traces} == {q["trace_id"] for q in queries[name] if q["selected"]}
        assert all(r["advantage"] is None for r in rows if r["replaced"])
        assert all(r["is_correct"] and r["reward"] == pytest.approx(1.0) for r in traces)
        student = [r for r in rows if r["origin"] == "student"]
        assert len(student) == 4 * 4  # problems x G, replaced ones included


def test_a_run_leaves_what_the_design_promises(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    assert names >= {"config.toml", "env.json", "log.txt", "metrics.jsonl"}
    first = metrics_of(straight)[0]
    assert {"loss", "reward", "entropy", "grad_norm", "store/hit_rate", "teacher/ada/selected_share"} <= set(
        first
    )
    assert first["groups/all_fail"] + first["groups/all_solved"] + first["groups/mixed"] == pytest.approx(1.0)


def test_sampler_and_trainer_agree_on_the_samples_log_probabilities(world: Path, model_dir: Path) -> None:
    # Ids in, ids out: one shifted or re-tokenised token would show as a difference of whole nats.
    report = run(world, model_dir, run__name="warm", rollout__temperature=0.7, train__max_steps=1)
    (row,) = metrics_of(report.run)
    assert row["entropy"] is not None
    assert row["sampling/logp_difference"] < 1e-4


def test_groups_that_train_nothing_are_refilled_until_none_is_left(world: Path, model_dir: Path) -> None:
    # Every group of the random student fails. A problem in three has no trace, so its group trains nothing;
    # of 12 problems 8 have one, so with enough rounds every step of 4 problems is filled.
    path = run(world, model_dir, run__name="refilled", rollout__max_refills=12, train__max_steps=2).run
    for row, rollouts in zip(metrics_of(path), rows_of(path, "rollouts").values(), strict=True):
        live = {r["problem_id"] for r in rollouts if r["advantage"]}
        problems = {r["problem_id"] for r in rollouts}
        assert len(live) == 4
        assert len(problems) == 4 + row["groups/refilled"]
        assert row["optimizer_steps"] == 2  # mini-batches of 2, both full
        assert row["store/queries"] == len(problems)
    assert any(row["groups/refilled"] > 0 for row in metrics_of(path))


def test_refilling_ends_when_its_rounds_or_the_problems_do(world: Path, model_dir: Path) -> None:
    # Without a store no group of the random student trains: a round of 4 problems more, and the step ends.
    changes = {"guidance__trigger": "never", "store__path": "/nowhere", "train__max_steps": 1}
    one = run(world, model_dir, run__name="one-round", rollout__max_refills=1, **changes).run
    assert metrics_of(one)[0]["groups/refilled"] == 4
    assert metrics_of(one)[0]["store/queries"] == 0
    all_ = run(world, model_dir, run__name="all-rounds", rollout__max_refills=9, **changes).run
    assert metrics_of(all_)[0]["groups/refilled"] == 8


def test_what_a_killed_run_logged_past_its_checkpoint_is_written_anew(
    straight: Path, world: Path, model_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "killed"
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000004")  # killed after step 4, before its checkpoint
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # and in the middle of a line
    run(world, model_dir, run__dir=str(tmp_path), run__name="killed")
    assert_same_run(straight, copy, "step-000004")


def test_a_run_that_is_done_does_nothing_more(straight: Path, world: Path, model_dir: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    report = run(world, model_dir, run__name="straight")
    assert (report.done.step, report.interrupted_by) == (4, None)
    assert report.checkpoint == straight / "checkpoints" / "step-000004"
    assert (straight / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("resume", "changes", "said"),
    [
        ("auto", {"train__learning_rate": 0.5, "train__max_steps": 6}, r"learning_rate = 0\.001, now 0\.5"),
        ("auto", {"student__use_peft": True}, r"student\.use_peft = False, now True"),
        ("auto", {"problems__train": "DIR/other.jsonl"}, "other problems"),
        ("never", {}, "already holds a run"),
        ("DIR", {"run__name": "branch2"}, "DIR"),
    ],
)
def test_a_run_goes_on_as_it_was_or_not_at_all(
    resume: str, changes: dict[str, Any], said: str, straight: Path, model_dir: Path, tmp_path: Path
) -> None:
    write_problems(tmp_path / "other.jsonl", PROBLEMS[:8])
    here = {"run__name": "straight"} | {
        key: value.replace("DIR", str(tmp_path)) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(RunError, match=said.replace("DIR", str(tmp_path))):
        run(straight.parents[1], model_dir, resume=resume.replace("DIR", str(tmp_path)), **here)


def test_memory_settings_may_change_on_resume(straight: Path, world: Path, model_dir: Path) -> None:
    report = run(world, model_dir, run__name="straight", train__max_tokens_per_microbatch=64)
    assert report.done.step == 4


def test_resume_from_a_path_starts_a_run_of_its_own(straight: Path, world: Path, model_dir: Path) -> None:
    start = straight / "checkpoints" / "step-000002"
    report = run(world, model_dir, run__name="branch", resume=str(start))
    assert report.done.step == 4
    assert metrics_of(report.run) == metrics_of(straight)[2:]


def test_old_checkpoints_are_pruned_and_the_last_kept(world: Path, model_dir: Path) -> None:
    report = run(
        world, model_dir, run__name="pruned", run__save_every=1, run__keep_last=2, train__max_steps=3
    )
    kept = checkpoint.checkpoints(report.run / "checkpoints")
    assert [path.name for path in kept] == ["step-000002", "step-000003"]


def test_a_run_that_stopped_before_its_first_checkpoint_is_done_again_from_the_start(
    straight: Path, world: Path, model_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "early"
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "checkpoints")
    evaluated = {"step": 0, "eval/pass@1": 0.5}
    (copy / "metrics.jsonl").write_text(json.dumps(evaluated) + "\n" + (copy / "metrics.jsonl").read_text())
    run(world, model_dir, run__dir=str(tmp_path), run__name="early")
    assert_same_run(straight, copy, "step-000004")  # and the old evaluation of step 0 stands there no more


def test_a_run_without_a_checkpoint_is_not_written_over_by_another_config(
    straight: Path, world: Path, model_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "early"
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_text()
    with pytest.raises(RunError, match=r"guidance.k = 2, now 1"):
        run(world, model_dir, run__dir=str(tmp_path), run__name="early", guidance__k=1)
    with pytest.raises(RunError, match="already holds a run"):
        run(world, model_dir, run__dir=str(tmp_path), run__name="early", resume="never")
    assert (copy / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__problems_per_step": 16, "train__mini_batch_problems": 16}, "only 12 problems"),
        ({"rollout__max_completion_length": 510}, "512 positions"),
        ({"run__dir": "/dev/null/x"}, "run.dir: cannot write /dev/null"),
        ({"problems__train": "empty"}, "holds no problem"),
        ({"problems__train": "senseless"}, "no problem can be used: 1 left out: a gold answer"),
        ({"guidance__teachers": ["eve"]}, "'eve'"),
        ({"guidance__loss": "shaped_ratio"}, "needs the student's tokenizer"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step_and_begins_no_run(
    changes: dict[str, Any], said: str, world: Path, model_dir: Path, tmp_path: Path
) -> None:
    files = {"empty": tmp_path / "empty.jsonl", "senseless": tmp_path / "senseless.jsonl"}
    files["empty"].write_text("")
    files["senseless"].write_text('{"question": "q", "answer": "\\\\frac{"}\n')
    if "problems__train" in changes:
        changes = {"problems__train": str(files[changes["problems__train"]])}
    with pytest.raises(UserError, match=said):
        run(world, model_dir, **{"run__name": "impossible", **changes})
    assert not (world / "runs" / "impossible" / "config.toml").exists()


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([], "0 of 8 training problems: is it the right store?"),
        (PROBLEMS, "traces of 8 of 20 training problems"),  # 8 of the 12 have one, and 8 are strangers
    ],
)
def test_a_store_that_covers_less_than_half_is_told(
    known: list[Problem], said: str, world: Path, model_dir: Path, tmp_path: Path
) -> None:
    strangers = [Problem(question=f"{n}-0", answer=str(n)) for n in range(8)]
    write_problems(tmp_path / "many.jsonl", [*known, *strangers])
    reporter = TrainReporter()
    changes = {"problems__train": str(tmp_path / "many.jsonl"), "run__dir": str(tmp_path)}
    train(config_of(world, model_dir, train__max_steps=1, **changes), reporter=reporter)
    assert any(said in warning for warning in reporter.warnings)


def test_a_checkpoint_that_cannot_be_written_says_so_and_leaves_the_older_ones(
    straight: Path, world: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(RunError, match="older checkpoints are complete"):
            run(world, model_dir, run__name="full", run__save_every=1)
    folder = world / "runs" / "full" / "checkpoints"
    assert list(folder.iterdir()) == []
    assert run(world, model_dir, run__name="full").done.step == 4


def test_a_loss_that_is_not_a_number_names_step_and_checkpoint(
    world: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: .*not finite.*learning_rate"):
        run(world, model_dir, run__name="nan", train__learning_rate=1e20, train__max_grad_norm=1e30)
    (batch,) = (world / "runs" / "nan" / "failed").glob("step-*.parquet")
    rows = pq.read_table(batch).to_pylist()
    assert rows
    assert all(row["prompt_ids"] and row["response_ids"] for row in rows)


def test_a_student_with_invalid_sampling_defaults_can_be_saved(world: Path, tmp_path: Path) -> None:
    path = save_student(tmp_path / "model") / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 0.6}))
    report = run(world, tmp_path / "model", run__dir=str(tmp_path / "runs"), train__max_steps=1)
    assert report.checkpoint is not None


def test_evaluations_are_logged_and_kept(world: Path, model_dir: Path) -> None:
    changes: dict[str, Any] = {
        "problems__eval": str(world / "train.jsonl"),
        "eval__every": 2,
        "eval__samples": 2,
        "eval__k": [1, 2],
        "train__max_steps": 3,
    }
    one = run(world, model_dir, run__name="unstopped", **changes).run
    rows = [row for row in metrics_of(one) if "eval/pass@2" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    samples = rows_of(one, "evals")["step-000003.parquet"]
    assert len(samples) == 12 * 2
    assert rows[2]["eval/avg@2"] == pytest.approx(sum(row["is_correct"] for row in samples) / 24)


def test_a_run_is_trained_by_one_process_at_a_time(world: Path, model_dir: Path) -> None:
    root = world / "runs" / "held"
    with RunFiles(root).held(), pytest.raises(RunError, match=f"trained by process {os.getpid()}; wait"):
        run(world, model_dir, run__name="held", train__max_steps=1)
    assert run(world, model_dir, run__name="held", train__max_steps=1).done.step == 1


def test_a_dry_run_refuses_to_go_on_as_another_run(straight: Path, world: Path, model_dir: Path) -> None:
    with pytest.raises(RunError, match=r"train\.seed"):
        dry_run(config_of(world, model_dir, run__name="straight", train__seed=7))


def test_teachers_of_the_store_that_the_config_does_not_name_are_said_once(
    world: Path, model_dir: Path
) -> None:
    reporter = TrainReporter()
    teachers = [{"name": "ada", "model": "any"}]
    tables = config_of(world, model_dir, run__name="named", train__max_steps=1).model_dump(mode="json")
    train(Config.model_validate({**tables, "teachers": teachers}), reporter=reporter)
    (said,) = (warning for warning in reporter.warnings if "[[teachers]]" in warning)
    assert "traces of bob are used too" in said
    assert 'guidance.teachers = ["ada"]' in said


def test_callbacks_get_every_row_and_every_group(world: Path, model_dir: Path) -> None:
    rows: list[Mapping[str, Any]] = []
    groups: list[tuple[int, str]] = []
    report = train(
        config_of(
            world, model_dir, run__name="called", train__max_steps=2, sft__steps=1, sft__traces_per_step=4
        ),
        on_step=rows.append,
        on_group=lambda step, group: groups.append((step, group.problem_id)),
    )
    written = (report.run / "metrics.jsonl").read_text().splitlines()
    assert [dict(row) for row in rows] == [json.loads(line) for line in written]
    rollouts = [row for rows in rows_of(report.run, "rollouts").values() for row in rows]
    assert set(groups) == {(row["step"], row["problem_id"]) for row in rollouts}


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("trainer.run.setup.shard", "setting up the run"),
        (
            "trainer.run.checkpoint.save",
            r"saving step 1 \(older checkpoints in .*/out/checkpoints are complete\)",
        ),
        ("trainer.run.checkpoint._write", r"saving step 1 \(older checkpoints"),
        ("trainer.run.checkpoint.restore_optimizer", "loading the optimizer of .*step-000001"),
    ],
)
def test_memory_that_runs_out_between_steps_is_told_in_one_line(
    place: str, doing: str, world: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch raises this on a GPU alone: here it is raised in its stead.
    def full(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    changes: dict[str, Any] = {"run__dir": str(tmp_path), "run__name": "out", "train__max_steps": 1}
    if "restore" in place:
        run(world, model_dir, **changes)
    monkeypatch.setattr(place, full)
    with pytest.raises(TrainingError, match=f"out of GPU memory while {doing}.*: lower train.max_tokens"):
        run(world, model_dir, **{**changes, "train__max_steps": 2 if "restore" in place else 1})
