"""The writing side: what is on disk after whatever happened."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from store_examples import (
    JUDGE,
    fork_and_be_killed,
    make_store,
    problem,
    teacher,
    trace,
    wrong,
)

from store.errors import RecipeChangedError, StoreError, StoreForeignError, UserError
from store.format.files import TMP_MARK
from store.format.parts import part_rows
from store.format.schema import TRACE_SCHEMA
from store.reader import TraceStore
from store.writer import StoreWriter, recipe_changes

spawn = multiprocessing.get_context("spawn")


def whole_numbers(root: Path) -> list[int]:
    """Rows of each part, read to the end."""
    return [pq.ParquetFile(part).read().num_rows for part in sorted(root.rglob("part-*.parquet"))]


def tmp_files(root: Path) -> list[Path]:
    return list(root.rglob(f"{TMP_MARK}*"))


def test_problems_merge_by_id_and_keep_their_order(tmp_path: Path) -> None:
    renewed = dataclasses.replace(problem(0), source="aime")
    with StoreWriter.open(tmp_path, **JUDGE) as writer:
        writer.write_problems([problem(0), problem(1)])
        writer.write_problems([problem(2), renewed])
    with TraceStore(tmp_path) as store:
        assert store.problems() == [renewed, problem(1), problem(2)]


def test_a_part_is_plain_parquet_sorted_by_problem_in_row_groups_of_16(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces", [trace(number, "ada") for number in range(20)])
    (part,) = root.rglob("part-*.parquet")
    file = pq.ParquetFile(part)
    assert file.schema_arrow == TRACE_SCHEMA
    rows = part_rows(part)
    assert rows["row"].to_pylist() == [*range(16), *range(4)]
    assert rows["row_group"].to_pylist() == [0] * 16 + [1] * 4
    ids = file.read(columns=["problem_id"])["problem_id"].to_pylist()
    assert ids == sorted(ids)
    assert part.relative_to(root).parts[:2] == ("parts", "ada")


def test_done_reads_the_parts_not_the_index(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces", [trace(0, "ada"), wrong(0, "ada", 1)], [wrong(1, "ada", 3)])
    (root / "index.duckdb").write_bytes(b"nonsense")
    with StoreWriter.open(root, **JUDGE) as writer:
        assert writer.done("ada") == {
            problem(0).problem_id: {0: True, 1: False},
            problem(1).problem_id: {3: False},
        }
        assert writer.done("bob") == {}


def test_a_damaged_part_counts_as_not_done_and_is_named(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces", [trace(0, "ada")], [trace(1, "ada")])
    first, _ = sorted(root.rglob("part-*.parquet"))
    os.truncate(first, first.stat().st_size // 2)
    with StoreWriter.open(root, **JUDGE) as writer:
        assert writer.done("ada") == {problem(1).problem_id: {0: True}}
        assert [broken.part for broken in writer.damaged("ada")] == [f"ada/{first.name}"]
        new = writer.append([trace(0, "ada")])
        assert new is not None
        assert new.name.startswith("part-000003-")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces", [trace(0, "ada")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StoreWriter.open(root, **JUDGE) as writer:
        with pytest.raises(UnicodeEncodeError):
            writer.append([trace(1, "ada", text="\ud800")])
        # The nearest thing to a full disk that a test can have: no file may grow beyond 1000 bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(StoreError, match=r"cannot write .*part-000002-.*\.parquet: File too large"):
                writer.append([trace(1, "ada")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert tmp_files(root) == []
        assert whole_numbers(root) == [1]
        writer.append([trace(1, "ada")])
    assert whole_numbers(root) == [1, 1]


def test_a_store_half_created_by_a_killed_process_is_finished(tmp_path: Path) -> None:
    (tmp_path / ".write.lock").write_text("123\n")
    (tmp_path / f"{TMP_MARK}0f-manifest.json").write_text("{")
    with StoreWriter.open(tmp_path, **JUDGE) as writer:
        assert writer.manifest.verified_by == "math-verify 0.9.0"
    assert tmp_files(tmp_path) == []


def test_a_forked_worker_does_not_hold_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    root = tmp_path / "traces"
    child = spawn.Process(target=fork_and_be_killed, args=(root,))
    child.start()
    child.join()
    worker = int((tmp_path / "worker.pid").read_text())
    os.kill(worker, 0)  # still there
    try:
        StoreWriter.open(root, **JUDGE).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_another_recipe_under_one_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces", [trace(0, "ada")])
    warmer = teacher("ada", sampling={"temperature": 0.7, "top_p": 1.0, "max_tokens": 64}, revision="v2")
    with (
        StoreWriter.open(root, **JUDGE) as writer,
        pytest.raises(RecipeChangedError) as refusal,
    ):
        writer.register_teacher(warmer)
    message = str(refusal.value)
    assert "revision None -> 'v2'; sampling.temperature 1.0 -> 0.7; give" in message
    assert "top_p" not in message
    assert f"ampo store forget {root} --teacher ada" in message
    with TraceStore(root) as store:
        assert store.teachers() == {"ada": teacher("ada")}


def test_another_recipe_is_refused_even_when_the_record_is_gone(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces", [trace(0, "ada")])
    (root / "teachers" / "ada.json").unlink()
    with StoreWriter.open(root, **JUDGE) as writer:
        with pytest.raises(RecipeChangedError, match="generation_fingerprint"):
            writer.register_teacher(teacher("ada", model="models/other"))
        writer.register_teacher(teacher("ada"))


def test_the_same_recipe_from_another_engine_goes_on(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces", [trace(0, "ada")])
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.register_teacher(teacher("ada", engine="vllm"))
        writer.append([trace(1, "ada")])
    assert json.loads((root / "teachers" / "ada.json").read_text())["engine"] == "vllm"


def test_a_long_template_is_shown_where_it_differs() -> None:
    # 100 letters in common: the window of 40 starts a quarter before the difference, at letter 90.
    (change,) = recipe_changes({"chat_template": "a" * 100 + "X"}, {"chat_template": "a" * 100 + "Y"})
    assert change == "chat_template ...'aaaaaaaaaaX' -> ...'aaaaaaaaaaY'"


def test_only_traces_of_registered_recipes_are_appended(tmp_path: Path) -> None:
    with StoreWriter.open(tmp_path, **JUDGE) as writer:
        writer.register_teacher(teacher("ada"))
        with pytest.raises(ValueError, match="'bob' is registered with None"):
            writer.append([trace(0, "bob")])
        with pytest.raises(StoreError, match="a teacher cannot be named"):
            writer.register_teacher(teacher("../ada"))
        assert writer.append([]) is None
    assert whole_numbers(tmp_path) == []


def test_another_verifier_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "traces", [trace(0, "ada")])
    with pytest.raises(StoreError, match=r"verdicts of math-verify 0.9.0, this is math-verify 0.9.1; "):
        StoreWriter.open(tmp_path / "traces", verifiers={"math-verify": "0.9.1"})


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreForeignError, match=r"contains thesis\.tex but no manifest\.json"):
        StoreWriter.open(tmp_path, **JUDGE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreForeignError, match="is a file"):
        StoreWriter.open(tmp_path / "thesis.tex", **JUDGE)


def test_a_place_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        StoreWriter.open(tmp_path / "file" / "traces", **JUDGE)
