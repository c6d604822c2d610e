"""Other people's traces: read in their forms, verified by us, the same file twice changing nothing."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from precompute_examples import jsonl, keys_of, traces_of
from run_examples import PROBLEMS, make_world, metrics_of, run, write_store

from precompute.config import FiltersConfig, StoreConfig, VerifyConfig
from precompute.imports.foreign_rows import ImportColumns, ImportForm, TeacherNames
from precompute.imports.import_traces import ImportReport, import_traces
from precompute.problems.data_files import files_at
from precompute.run.refilter import refilter
from precompute.verify.verifier import Verifier
from store.errors import RecipeChangedError, StoreError, UserError
from store.export.export_forms import ExportOptions
from store.export.exporting import export
from store.reader import TraceStore

SUM = {"prompt": [{"role": "user", "content": "2+2"}], "reward_model": {"ground_truth": "4"}}
PLAIN = {"question": "2+2", "answer": "4", "teacher": "r1"}


def bring(
    file: Path,
    store: Path,
    *,
    columns: ImportColumns | None = None,
    teacher: str | None = None,
    renames: dict[str, str] | None = None,
    part_traces: int = 512,
    verifier: Verifier | None = None,
    **options: Any,
) -> ImportReport:
    names = TeacherNames(default=teacher, renames=renames or {})
    return import_traces(
        ImportForm(files_at(file), columns or ImportColumns(), names),
        store=StoreConfig(path=str(store), part_traces=part_traces),
        verifier=verifier or shared_verifier(),
        **options,
    )


@cache
def shared_verifier() -> Verifier:
    """A worker takes a second to start; it ends with the process."""
    verifier = Verifier(VerifyConfig(workers=1))
    atexit.register(verifier.close, cancel=True)
    return verifier


def content_of(store: Path) -> dict[str, bytes]:
    """Every file of the store but its index and its locks."""
    files = (path for path in store.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(store)): path.read_bytes() for path in files if path.name != "index.duckdb"}


def test_the_published_form_is_a_row_a_problem_with_a_trace_a_teacher(tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "openr1",
            "prompt": [{"role": "system", "content": "Box it."}, {"role": "user", "content": "2+2"}],
            "ability": "math",
            "reward_model": {"ground_truth": "4", "style": "rule"},
            "extra_info": {"index": 0, "split": "train"},
            "target_lst": [
                {
                    "content": "<think>\nfour\n</think>\n\\boxed{4}",
                    "quality_score": 0.9,
                    "source": "org/R1 671B",
                },
                {"content": "surely \\boxed{5}", "quality_score": 0.1, "source": "qwq"},
            ],
        },
        {
            "data_source": "openr1",
            "prompt": [{"role": "system", "content": "Box it."}, {"role": "user", "content": "1+2"}],
            "ability": "math",
            "reward_model": {"ground_truth": "3", "style": "rule"},
            "extra_info": {"index": 1, "split": "train"},
            "target_lst": None,
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ampo.parquet")
    report = bring(tmp_path / "ampo.parquet", tmp_path / "traces")
    right, wrong = sorted(traces_of(tmp_path / "traces"), key=lambda trace: not trace.is_correct)
    assert (right.teacher, right.verdict, right.is_correct) == ("org-R1-671B", "match", True)
    assert right.text[: right.answer_start].endswith("\\boxed{")
    assert (wrong.teacher, wrong.verdict, wrong.is_correct, wrong.answer) == ("qwq", "mismatch", False, "5")
    with TraceStore(tmp_path / "traces") as store:
        record = store.teachers()["org-R1-671B"]
        (first, second) = store.problems()
    assert (record.engine, record.engine_version, record.model) == ("import", "ampo.parquet", "org/R1 671B")
    assert (first.question, first.answer, first.source, first.system_prompt) == (
        "2+2",
        "4",
        "openr1",
        "Box it.",
    )
    assert second.question == "1+2", "a problem without a trace is a problem all the same"
    assert report.problems == 2


def test_luffys_form_and_plain_rows_are_one_trace_a_row(tmp_path: Path) -> None:
    luffy = SUM | {"target": [{"role": "assistant", "content": "\\boxed{4}"}]}
    bring(jsonl(tmp_path / "luffy.jsonl", luffy), tmp_path / "one", teacher="r1")
    bring(jsonl(tmp_path / "plain.jsonl", PLAIN | {"text": "\\boxed{4}"}), tmp_path / "two")
    (one,), (two,) = traces_of(tmp_path / "one"), traces_of(tmp_path / "two")
    assert one.trace_id == two.trace_id


def test_a_users_verifier_decides_and_its_name_and_hash_are_recorded(tmp_path: Path) -> None:
    code = "def same_city(answer, gold, **_):\n    return answer.lower() == gold.lower()\n"
    (tmp_path / "cities.py").write_text(code)
    rows = [PLAIN | {"answer": "Paris", "text": f"\\boxed{{{city}}}"} for city in ("PARIS", "Rome")]
    file = jsonl(tmp_path / "cities.jsonl", *rows)
    with Verifier(VerifyConfig(workers=1, default=f"{tmp_path / 'cities.py'}:same_city")) as verifier:
        bring(file, tmp_path / "traces", verifier=verifier)
    assert [trace.is_correct for trace in traces_of(tmp_path / "traces")] == [True, False]
    with TraceStore(tmp_path / "traces") as store:
        assert list(store.manifest.verifiers) == ["cities.py:same_city"]
    with pytest.raises(StoreError, match=r"verdicts of cities\.py:same_city .* is math-verify"):
        bring(file, tmp_path / "traces")


def test_reasoning_beside_a_text_stands_before_it_in_think_tags(tmp_path: Path) -> None:
    apart = PLAIN | {"text": "\\boxed{4}", "reasoning_content": "two and two\n"}
    message = {"role": "assistant", "content": "\\boxed{4}", "reasoning_content": "2 twice"}
    chat = PLAIN | {"teacher": "r2", "text": [{"role": "user", "content": "2+2"}, message]}
    bring(jsonl(tmp_path / "x.jsonl", [apart, chat]), tmp_path / "s")
    assert [(t.teacher, t.text, t.verdict) for t in traces_of(tmp_path / "s")] == [
        ("r1", "<think>\ntwo and two\n</think>\n\n\\boxed{4}", "match"),
        ("r2", "<think>\n2 twice\n</think>\n\n\\boxed{4}", "match"),
    ]


def test_conversations_of_sharegpt_are_a_question_and_its_answer(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "\\boxed{4}"}]
    rows = [{"conversations": turns, "answer": "4"}]
    bring(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "s", teacher="r1")
    with TraceStore(tmp_path / "s") as store:
        assert [(problem.question, problem.answer) for problem in store.problems()] == [("2+2", "4")]
    assert [(t.teacher, t.text, t.verdict) for t in traces_of(tmp_path / "s")] == [
        ("r1", "\\boxed{4}", "match")
    ]
    with pytest.raises(UserError, match=r"no gold answer beside 'conversations', .*; add a column `answer`"):
        bring(jsonl(tmp_path / "y.jsonl", [{"conversations": turns}]), tmp_path / "s", teacher="r1")


def test_a_teacher_may_be_a_number_and_half_a_character_is_replaced_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [PLAIN | {"teacher": 7, "text": "\ud83d \\boxed{4}"}]
    rows += [PLAIN | {"text": [{"content": "x", "source": 8}]}, PLAIN | {"teacher": "r\ud83d", "text": "x"}]
    report = bring(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "s")
    assert {(trace.teacher, trace.text) for trace in traces_of(tmp_path / "s")} == {
        ("7", "\ufffd \\boxed{4}"),
        ("8", "x"),
        ("r-", "x"),
    }
    assert [each.mended for each in report.teachers] == [1, 0, 0]


def test_a_file_of_which_nothing_can_be_imported_is_an_error_and_makes_no_store(tmp_path: Path) -> None:
    rows = [PLAIN | {"text": " "}, PLAIN | {"text": [{"role": "user", "content": "2+2"}]}]
    with pytest.raises(UserError, match="'text' has no response in any row; --text-column"):
        bring(jsonl(tmp_path / "x.jsonl", rows), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_samples_are_numbered_by_their_place_and_equal_texts_are_one(tmp_path: Path) -> None:
    texts = ["first \\boxed{4}", "second \\boxed{4}", "first \\boxed{4}", "", "third \\boxed{4}"]
    file = jsonl(tmp_path / "plain.jsonl", *(PLAIN | {"text": text} for text in texts))
    (counts,) = bring(file, tmp_path / "traces").teachers
    traces = traces_of(tmp_path / "traces")
    assert [(trace.sample_index, trace.text.split()[0]) for trace in traces] == [
        (0, "first"), (1, "second"), (2, "third"),
    ]  # fmt: skip
    assert (counts.found, counts.new, counts.repeated, counts.empty) == (5, 3, 1, 1)


def test_the_same_content_again_changes_nothing_under_whatever_file_name(tmp_path: Path) -> None:
    rows = [PLAIN | {"text": f"{n}: \\boxed{{4}}"} for n in range(3)]
    bring(jsonl(tmp_path / "plain.jsonl", *rows), tmp_path / "traces")
    before = content_of(tmp_path / "traces")
    (again,) = bring(tmp_path / "plain.jsonl", tmp_path / "traces").teachers
    assert (again.existing, again.new) == (3, 0)
    assert content_of(tmp_path / "traces") == before
    (tmp_path / "plain.jsonl").rename(tmp_path / "moved.jsonl")
    (moved,) = bring(tmp_path / "moved.jsonl", tmp_path / "traces").teachers
    assert (moved.existing, moved.new) == (3, 0)


def test_another_file_under_the_same_teacher_is_refused_with_the_way_out(tmp_path: Path) -> None:
    bring(jsonl(tmp_path / "one.jsonl", PLAIN | {"text": "\\boxed{4}"}), tmp_path / "traces")
    before = content_of(tmp_path / "traces")
    other = jsonl(
        tmp_path / "two.jsonl", {"question": "3+3", "answer": "6", "teacher": "r1", "text": "\\boxed{6}"}
    )
    with pytest.raises(RecipeChangedError, match=r"revision .* --rename r1=NAME"):
        bring(other, tmp_path / "traces")
    assert content_of(tmp_path / "traces") == before, "the refused file's problem must not be there"
    bring(other, tmp_path / "traces", renames={"r1": "r1b"})
    with TraceStore(tmp_path / "traces") as store:
        assert sorted(store.teachers()) == ["r1", "r1b"]
        assert store.teachers()["r1b"].model == "r1"


def test_a_directory_is_read_as_one_file(tmp_path: Path) -> None:
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    (tmp_path / "set" / "dataset_info.json").write_text("[1, 2]")
    for number in range(2):
        row = PLAIN | {"text": f"{number} \\boxed{{4}}"}
        pq.write_table(pa.Table.from_pylist([row]), data / f"train-{number}.parquet")
    (counts,) = bring(tmp_path / "set", tmp_path / "traces").teachers
    assert counts.new == 2
    with TraceStore(tmp_path / "traces") as store:
        assert store.teachers()["r1"].engine_version == "2 files"


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ([PLAIN | {"teacher": None, "text": "x"}], {},
         r"no trace: 1 left out: the trace names no teacher, e.g. .*bad.jsonl, row 1; give --teacher NAME"),
        ([PLAIN | {"text": 5}], {}, "text is neither a text nor a list of messages, e.g. .*row 1: 5"),
        ([PLAIN | {"text": [{"content": {"a": 1}, "source": "x"}]}], {}, "text has a message that is not"),
        ([{"question": "?"}, {"question": "!"}], {},
         r"no problem: 2 left out: no column 'answer'.*--answer-column.*row 1; "),
        ([PLAIN | {"words": "x"}], {}, "no column 'target_lst' or .*--text-column"),
        ([PLAIN | {"text": "x"}], {"columns": ImportColumns(teacher="who")}, r"'who' \(--teacher-column\)"),
        ([], {}, "bad.jsonl holds no row"),
        ([SUM | {"target_lst": []}], {}, "its column 'target_lst' has no response"),
        ([SUM | {"target_lst": [{"source": "a/b", "content": "x"}, {"source": "a b", "content": "x"}]}], {},
         "'a/b' and 'a b' would both be 'a-b' .* --rename a b=NAME"),
        ([PLAIN | {"teacher": "//", "text": "x"}], {},
         "'//' cannot name a teacher, e.g. .*row 1; give --rename //=NAME"),
        ([PLAIN | {"text": "x"}], {"tokenizer": "/gone"}, "^--tokenizer: .*model '/gone': there is no dir"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_and_nothing_is_made(
    tmp_path: Path, rows: Sequence[dict[str, Any]], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        bring(jsonl(tmp_path / "bad.jsonl", *rows), tmp_path / "traces", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "traces").exists()


def test_rows_that_cannot_be_read_are_counted_by_reason_and_end_nothing(tmp_path: Path) -> None:
    good = [json.dumps(PLAIN | {"text": f"{n}: \\boxed{{4}}"}) for n in range(2)]
    bad = [
        "{",
        json.dumps({"question": "?"}),
        json.dumps(PLAIN | {"text": 5}),
        json.dumps(PLAIN | {"text": 6}),
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join([bad[1], good[0], *bad, good[1]]))
    report = bring(file, tmp_path / "traces")
    assert [each.new for each in report.teachers] == [2]
    assert sorted(report.left_out.counts.values()) == [1, 2, 2]
    assert (
        f"2 left out: text is neither a text nor a list of messages, e.g. {file}, row 5: 5"
        in report.left_out.lines
    )
    (again,) = bring(file, tmp_path / "traces").teachers
    assert (again.existing, again.new) == (2, 0)


def test_a_tokenizer_gives_ids_and_counts(tmp_path: Path, model_dir: Path) -> None:
    file = jsonl(tmp_path / "plain.jsonl", PLAIN | {"text": "so:\\boxed{4}"})
    bring(file, tmp_path / "without")
    bring(file, tmp_path / "with", tokenizer=str(model_dir))
    (without,), (counted,) = traces_of(tmp_path / "without"), traces_of(tmp_path / "with")
    assert (without.n_tokens, without.token_ids, without.logprobs) == (0, (), ())
    # One token a character, "so:\boxed{4}" has 12 of them, and the EOS, which is 1.
    assert (counted.n_tokens, counted.token_ids[-1], counted.logprobs) == (13, 1, ())
    assert len(counted.token_ids) == 13


def test_a_killed_import_goes_on_and_nothing_is_there_twice(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n}+{n}", "answer": str(2 * n), "teacher": f"t{t}", "text": f"\\boxed{{{2 * n}}}"}
        for n in range(1000)
        for t in range(2)
    ]
    file = jsonl(tmp_path / "many.jsonl", *rows)
    code = (
        "import sys; from pathlib import Path; from test_precompute_importing import bring;"
        "bring(Path(sys.argv[1]), Path(sys.argv[2]), part_traces=16)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(file), str(tmp_path / "traces")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("traces/parts/t1/part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it ended before it could be killed"
    there = len(keys_of(tmp_path / "traces"))
    assert 0 < there < 2000
    report = bring(file, tmp_path / "traces")
    assert [teacher.existing + teacher.new for teacher in report.teachers] == [1000, 1000]
    assert sum(teacher.existing for teacher in report.teachers) == there
    assert len(keys_of(tmp_path / "traces")) == 2000


def test_the_trainer_runs_on_imported_traces_as_on_generated_ones(tmp_path: Path, model_dir: Path) -> None:
    """The same texts, once from teachers and once imported: the steps must be equal to the last digit."""
    make_world(tmp_path)
    by_id = {problem.problem_id: problem for problem in PROBLEMS}
    traces = [(trace, by_id[trace.problem_id]) for trace in traces_of(tmp_path / "traces")]
    rows = [
        {"question": problem.question, "answer": problem.answer, "teacher": trace.teacher, "text": trace.text}
        for trace, problem in traces
    ]
    bring(jsonl(tmp_path / "others.jsonl", *rows), tmp_path / "imported")
    changes = {"train__max_steps": 1, "run__save_every": 1}
    metrics = []
    for store in ("traces", "imported"):
        where = {"store__path": str(tmp_path / store), "run__name": store}
        metrics += metrics_of(run(tmp_path, model_dir, **changes, **where).run)
    assert metrics[0] == metrics[1]
    assert metrics[0]["store/hit_rate"] > 0
    assert metrics[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("form", "name"), [("verl", "out.parquet"), ("luffy", "out.jsonl"), ("hf", "out.parquet")]
)
def test_an_export_comes_back_with_the_same_problems_teachers_and_texts(
    tmp_path: Path, form: str, name: str
) -> None:
    write_store(tmp_path / "traces")
    with TraceStore(tmp_path / "traces") as store:
        export(store, tmp_path / name, form, ExportOptions())
    bring(tmp_path / name, tmp_path / "back")
    assert {t.trace_id: t.verdict for t in traces_of(tmp_path / "traces")} == {
        t.trace_id: t.verdict for t in traces_of(tmp_path / "back")
    }


def test_filters_hold_imported_traces_back_and_say_why(tmp_path: Path) -> None:
    rows = [
        PLAIN | {"text": "four \\boxed{4}"},
        PLAIN | {"text": "четыре \\boxed{4}"},
        PLAIN | {"text": "пять \\boxed{5}"},
    ]
    file, store = jsonl(tmp_path / "plain.jsonl", *rows), tmp_path / "traces"
    latin = FiltersConfig(scripts=("latin",))
    (teacher,) = bring(file, store, filters=latin).teachers
    # The wrong one is held back too, but would have been of no use.
    assert (teacher.verdicts, teacher.filtered) == ({"match": 2, "mismatch": 1}, 1)
    with TraceStore(store) as opened:
        (usable,) = opened.traces(usable=True)
        held = opened.traces(filtered=True)
    assert usable.text == "four \\boxed{4}"
    # Of the letters of "четыре boxed" 6 in 11 are not latin, of "пять boxed" 4 in 9.
    assert [trace.filtered for trace in held] == [
        "scripts: 0.545 of its letters are not latin, more than 0.05",
        "scripts: 0.444 of its letters are not latin, more than 0.05",
    ]
    # The same again changes nothing; other filters want `ampo store refilter`, as everywhere.
    assert bring(file, store, filters=latin).teachers[0].new == 0
    with pytest.raises(RecipeChangedError, match=r"under other filters: filters\.scripts"):
        bring(file, store)
    refilter(store, FiltersConfig())
    assert bring(file, store).teachers[0].new == 0
    with TraceStore(store) as opened:
        assert len(opened.traces(usable=True)) == 2
