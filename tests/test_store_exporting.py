"""Exports: each form's rows written out by hand, files that are whole or not there, and the way back in."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_examples import JUDGE, make_store, problem, teacher, trace, wrong

from precompute.imports.foreign_rows import ImportColumns, ImportForm, TeacherNames
from precompute.problems.problem_files import LeftOut
from store.errors import StoreError, UserError
from store.export.export_forms import EXPORT_FORMS, ExportOptions, ExportReport, Solved
from store.export.exporting import export
from store.format.row_files import write_rows
from store.reader import TraceStore
from store.records import Problem
from store.writer import StoreWriter

HELD_BACK = "repetition: 0.9"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ada solved 0 twice, of which a filter holds one back, and 1; bob solved 0 and failed at 1."""
    return make_store(
        tmp_path / "traces",
        [trace(0, "ada"), trace(0, "ada", 1, filtered=HELD_BACK), trace(1, "ada")],
        [trace(0, "bob"), wrong(1, "bob")],
    )


def run(root: Path, out: Path, form: str, **options: Any) -> ExportReport:
    with TraceStore(root) as store:
        return export(store, out, form, ExportOptions(**options))


def rows_of(out: Path) -> list[dict[str, Any]]:
    if out.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
        return rows
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_verl_is_a_row_a_problem_with_its_traces_in_target_lst(root: Path, suffix: str) -> None:
    out = root.parent / f"verl{suffix}"
    report = run(root, out, "verl")
    first, second = rows_of(out)
    assert first == {
        "data_source": "",
        "prompt": [{"role": "user", "content": "What is 0 + 0?"}],
        "ability": "math",
        "reward_model": {"ground_truth": "0", "style": "rule"},
        "target_lst": [
            # "ada says: it is \boxed{0}" has 25 characters.
            {
                "content": f"{name} says: it is \\boxed{{0}}",
                "source": name,
                "quality_score": 1 / 25,
                "is_correct": True,
            }
            for name in ("ada", "bob")
        ],
        "extra_info": {"index": 0, "split": "train", "problem_id": problem(0).problem_id},
    }
    assert [target["source"] for target in second["target_lst"]] == ["ada"]
    assert second["extra_info"]["index"] == 1
    assert (report.rows, report.problems, report.traces) == (2, 2, {"ada": 2, "bob": 1})


def test_luffy_is_a_row_a_trace_with_the_one_message_in_target(root: Path) -> None:
    run(root, root.parent / "luffy.parquet", "luffy")
    rows = rows_of(root.parent / "luffy.parquet")
    assert [(row["reward_model"]["ground_truth"], row["extra_info"]["teacher"]) for row in rows] == [
        ("0", "ada"), ("0", "bob"), ("2", "ada"),
    ]  # fmt: skip
    assert rows[1]["target"] == [{"role": "assistant", "content": "bob says: it is \\boxed{0}"}]
    run(root, root.parent / "one.parquet", "luffy", max_per_problem=1)
    assert [row["extra_info"]["index"] for row in rows_of(root.parent / "one.parquet")] == [0, 1]


def test_chat_has_the_system_turn_that_the_teacher_had(root: Path) -> None:
    with StoreWriter.open(root, **JUDGE) as writer:
        own = teacher("eve", system_prompt=None)
        writer.register_teacher(own)
        asked = Problem(question="What is 2 + 2?", answer="4", system_prompt="Box it.")
        writer.write_problems([asked])
        writer.append([trace(2, "eve", generation_fingerprint=own.generation_fingerprint)])
    out = root.parent / "chat.jsonl"
    run(root, out, "chat", teachers=("bob", "eve"))
    bob, eve = rows_of(out)
    assert bob == {
        "messages": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "What is 0 + 0?"},
            {"role": "assistant", "content": "bob says: it is \\boxed{0}"},
        ]
    }
    assert eve["messages"][0] == {"role": "system", "content": "Box it."}
    run(root, out, "chat", teachers=("bob", "eve"), system_prompt="", overwrite=True)
    assert [len(row["messages"]) for row in rows_of(out)] == [2, 2]
    run(root, out, "chat", system_prompt="Be brief.", overwrite=True)
    assert {row["messages"][0]["content"] for row in rows_of(out)} == {"Be brief."}


def test_dpo_pairs_verified_with_wrong_of_the_same_teacher_first(root: Path) -> None:
    with StoreWriter.open(root, **JUDGE) as writer:
        cut = trace(1, "ada", 3, is_correct=False, verdict="no_answer", text="...", finish_reason="length")
        broken = trace(1, "ada", 4, is_correct=False, verdict="timeout", text="1/0/0")
        writer.append([cut, broken, trace(1, "bob", 1), trace(1, "bob", 2)])
    out = root.parent / "pairs.jsonl"
    report = run(root, out, "dpo")
    # Problem 1 has three verified traces and one that is known to be wrong; problem 0 has none of those.
    assert rows_of(out) == [
        {
            "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
            "chosen": [{"role": "assistant", "content": "bob says: it is \\boxed{2}"}],
            "rejected": [{"role": "assistant", "content": "no idea"}],
        }
    ]
    assert (report.rows, report.problems, report.traces) == (1, 1, {"bob": 2})


def test_dpo_without_a_pair_is_an_error(tmp_path: Path) -> None:
    make_store(tmp_path / "traces", [wrong(0, "ada"), trace(1, "ada")])
    with pytest.raises(StoreError, match="no problem with both a verified and a wrong trace"):
        run(tmp_path / "traces", tmp_path / "x.jsonl", "dpo")


def test_max_per_problem_counts_pairs(tmp_path: Path) -> None:
    traces = [trace(0, "ada", n) for n in range(3)] + [wrong(0, "ada", n) for n in range(3, 6)]
    make_store(tmp_path / "traces", traces)
    for most, pairs in ((None, 3), (2, 2), (9, 3)):
        report = run(tmp_path / "traces", tmp_path / f"{most}.parquet", "dpo", max_per_problem=most)
        assert report.rows == pairs


def test_trl_is_a_row_a_problem_with_its_gold_answer(root: Path) -> None:
    run(root, root.parent / "trl.parquet", "trl", system_prompt="Box it.")
    first, second = rows_of(root.parent / "trl.parquet")
    assert first["prompt"] == [
        {"role": "system", "content": "Box it."},
        {"role": "user", "content": "What is 0 + 0?"},
    ]
    assert [first["solution"], second["solution"]] == ["0", "2"]


def test_wrong_and_filtered_traces_go_out_only_when_all_is_asked_for(root: Path) -> None:
    run(root, root.parent / "all.jsonl", "verl", everything=True)
    targets = [
        (target["source"], target["is_correct"])
        for row in rows_of(root.parent / "all.jsonl")
        for target in row["target_lst"]
    ]
    assert targets == [("ada", True), ("bob", True), ("ada", True), ("ada", True), ("bob", False)]


@pytest.mark.parametrize(
    ("form", "out", "options", "complaint"),
    [
        (
            "csv",
            "x.csv",
            {},
            r"--to = 'csv': give one of chat, dpo, hf, luffy, trl, verl, or module:function",
        ),
        ("verl", "x.csv", {}, r"a file that ends in \.parquet or \.jsonl"),
        ("verl", "there.jsonl", {}, "exists already; --overwrite replaces it"),
        ("hf", "full.jsonl", {"overwrite": True}, "Is a directory"),
        ("verl", "x.jsonl", {"teachers": ("eve",)}, "no teacher 'eve' in .*; its teachers: ada, bob"),
    ],
)
def test_what_cannot_be_written_is_said_and_nothing_is_touched(
    root: Path, form: str, out: str, options: dict[str, Any], complaint: str
) -> None:
    (root.parent / "there.jsonl").write_text("mine")
    (root.parent / "full.jsonl").mkdir()
    (root.parent / "full.jsonl" / "thesis.tex").write_text("mine")
    before = sorted(root.parent.iterdir())
    with pytest.raises(UserError, match=complaint):
        run(root, root.parent / out, form, **options)
    assert sorted(root.parent.iterdir()) == before
    assert (root.parent / "there.jsonl").read_text() == "mine"


@pytest.mark.parametrize(("form", "name"), [("verl", "out.parquet"), ("chat", "out.jsonl")])
def test_an_export_that_stops_leaves_what_was_there(root: Path, form: str, name: str) -> None:
    out = root.parent / name
    run(root, out, form, max_per_problem=1)
    before = out.read_bytes()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with TraceStore(root) as store, pytest.raises(KeyboardInterrupt):
        export(store, out, form, ExportOptions(overwrite=True), progress=interrupt)
    assert out.read_bytes() == before
    assert sorted(path.name for path in root.parent.iterdir()) == sorted([name, "traces"])
    run(root, out, form, overwrite=True)
    assert out.read_bytes() != before


def test_a_store_without_a_verified_trace_makes_no_empty_file(tmp_path: Path) -> None:
    make_store(tmp_path / "traces", [wrong(0, "ada")])
    for form, out in (("chat", "x.jsonl"), ("verl", "x.parquet")):
        with pytest.raises(StoreError, match="no trace to export; --all"):
            run(tmp_path / "traces", tmp_path / out, form)
    assert [path.name for path in tmp_path.iterdir()] == ["traces"]


def test_datasets_loads_a_row_a_trace(root: Path) -> None:
    from datasets import load_dataset

    out = root.parent / "set.parquet"
    run(root, out, "hf", everything=True)
    loaded = load_dataset("parquet", data_files=str(out), cache_dir=str(root.parent / "cache"))
    assert list(loaded) == ["train"]
    rows = loaded["train"].to_list()
    assert [(row["question"], row["teacher"], row["verdict"], row["filtered"]) for row in rows] == [
        ("What is 0 + 0?", "ada", "match", None),
        ("What is 0 + 0?", "bob", "match", None),
        ("What is 0 + 0?", "ada", "match", HELD_BACK),
        ("What is 1 + 1?", "ada", "match", None),
        ("What is 1 + 1?", "bob", "mismatch", None),
    ]


def test_a_form_of_ones_own_is_a_function_in_a_file(root: Path) -> None:
    (root.parent / "mine.py").write_text(
        "def rows(solved):\n    yield {'q': solved.problem.question, 'n': len(solved.traces)}\n"
    )
    for suffix in (".parquet", ".jsonl"):
        run(root, root.parent / f"mine{suffix}", f"{root.parent / 'mine.py'}:rows")
        assert rows_of(root.parent / f"mine{suffix}") == [
            {"q": "What is 0 + 0?", "n": 2}, {"q": "What is 1 + 1?", "n": 1},
        ]  # fmt: skip


WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)
TRACES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["ada", "bob"]), WORDS), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None)
@given(items=TRACES, questions=st.lists(WORDS, min_size=3, max_size=3, unique=True))
@pytest.mark.parametrize(
    ("form", "suffix"), [("verl", ".parquet"), ("verl", ".jsonl"), ("luffy", ".parquet")]
)
def test_what_is_written_reads_back_the_same(
    form: str, suffix: str, items: list[tuple[int, str, str]], questions: list[str]
) -> None:
    problems = [Problem(question=q, answer=str(2 * n)) for n, q in enumerate(questions)]
    solved = [
        Solved(
            index=number,
            problem=problem,
            traces=[trace(number, name, text=text, answer_start=0) for n, name, text in items if n == number],
            teachers={},
            system_prompt=None,
        )
        for number, problem in enumerate(problems)
    ]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / f"out{suffix}"
        write_rows(out, (row for one in solved if one.traces for row in EXPORT_FORMS[form](one)))
        read = ImportForm([out], ImportColumns(), TeacherNames(renames={}))
        back = {
            (c.problem.question, c.problem.answer, c.teacher, c.text)
            for _, row in read.rows(LeftOut())
            for c in row
        }
    assert back == {(questions[number], str(2 * number), name, text) for number, name, text in items}
