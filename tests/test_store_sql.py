"""SQL over the store: every column, nothing written, no other file, nobody disturbed."""

from __future__ import annotations

import io
import shutil
import signal
import threading
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console
from store_examples import JUDGE, make_store, problem, teacher, trace, wrong

from store.errors import StoreError, UserError
from store.format.columns import VIEWS, views_help
from store.format.manifest import PARTS
from store.reader import TraceStore
from store.reports.sql import SqlResult, StoreSql
from store.reports.tables import sql_table
from store.writer import StoreWriter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_store(
        tmp_path / "traces",
        [trace(0, "ada"), trace(1, "ada", filtered="language: cyrillic")],
        [trace(0, "bob"), wrong(1, "bob")],
    )


def ask(root: Path, sql: str, limit: int | None = None) -> SqlResult:
    with TraceStore(root) as store, StoreSql(store) as views:
        return views.query(sql, limit=limit)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_has_the_columns_that_the_help_lists(root: Path, view: str, tmp_path: Path) -> None:
    assert list(ask(root, f"FROM {view}").columns) == list(VIEWS[view])
    empty = make_store(tmp_path / "empty", problems=0)
    assert list(ask(empty, f"FROM {view}").columns) == list(VIEWS[view])
    assert ask(empty, f"FROM {view}").rows == []
    assert f"**{view}** (" in views_help()


def test_texts_and_lists_are_readable(root: Path) -> None:
    answer = ask(
        root, "SELECT text, token_ids, created_at, is_usable FROM traces ORDER BY teacher, sample_index, text"
    )
    assert answer.rows[0] == (
        "ada says: it is \\boxed{0}",
        [5, 6, 7],
        datetime(2026, 1, 2, 12, 0, 0, 123456),
        True,
    )
    assert [row[3] for row in answer.rows] == [True, False, True, False]


def test_the_views_can_be_joined(root: Path) -> None:
    sql = """
        SELECT p.question, t.teacher, m.model, json_extract(m.sampling, 'max_tokens')::INT AS most
        FROM traces t JOIN problems p USING (problem_id) JOIN teachers m ON m.name = t.teacher
        WHERE NOT is_correct
    """
    assert ask(root, sql).dicts() == [
        {"question": problem(1).question, "teacher": "bob", "model": "models/bob", "most": 64}
    ]
    assert ask(root, "SELECT sum(rows) FROM parts").rows == [(4,)]


def test_equal_column_names_are_told_apart(root: Path) -> None:
    assert ask(root, "SELECT 1 AS x, 2 AS x, 3 AS x").dicts() == [{"x": 1, "x_2": 2, "x_3": 3}]


def test_a_limit_says_that_there_is_more(root: Path) -> None:
    assert (ask(root, "FROM traces", limit=3).more, len(ask(root, "FROM traces", limit=3).rows)) == (True, 3)
    assert (ask(root, "FROM traces", limit=4).more, len(ask(root, "FROM traces", limit=4).rows)) == (False, 4)


@pytest.mark.parametrize(
    ("sql", "complaint"),
    [
        ("selec 1", 'SQL: Parser Error: syntax error at or near "selec"'),
        ("SELECT nope FROM traces", 'SQL: Binder Error: Referenced column "nope" not found'),
        ("", "give one SELECT"),
        ("SELECT 1; SELECT 2", "give one SELECT"),
        ("DROP VIEW traces", "give one SELECT"),
        ("SET threads = 1", "give one SELECT"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO '{part}' (USE_TMP_FILE false)", "give one SELECT"),
        ("COPY (SELECT 1) TO '{root}/out.parquet'", "give one SELECT"),
        ("ATTACH '{root}/out.duckdb'", "give one SELECT"),
        ("SELECT * FROM read_text('{root}/manifest.json')", "SQL: Permission Error"),
        ("SELECT * FROM read_text('/etc/hostname')", "SQL: Permission Error"),
        ("SELECT * FROM glob('/*')", "SQL: Permission Error"),
        ("SELECT * FROM '{root}/index.duckdb'", "SQL: "),
    ],
)
def test_whatever_is_no_question_to_the_store_is_refused_in_one_line(
    root: Path, sql: str, complaint: str
) -> None:
    part = next(root.glob("parts/*/part-*.parquet"))
    ask(root, "SELECT 1")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=complaint) as error:
        ask(root, sql.format(root=root, part=part))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("mark", ["?", "*", "["])
def test_a_pattern_as_path_is_refused(tmp_path: Path, mark: str) -> None:
    with pytest.raises(StoreError, match=r"a store's path \(store\.path\) cannot contain"):
        make_store(tmp_path / f"traces{mark}", [trace(0, "ada")])
    root = make_store(tmp_path / "traces", [trace(0, "ada")]).rename(tmp_path / f"moved{mark}")
    with pytest.raises(StoreError, match="cannot contain"):
        TraceStore(root)


def test_answer_form_and_filters_of_teachers_are_in_the_view(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces")
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.register_teacher(teacher("ada", answer_form="boxed", filters={"max_tokens": 8}))
    assert ask(root, "SELECT answer_form, filters FROM teachers").rows == [("boxed", '{"max_tokens": 8}')]


@pytest.mark.parametrize("width", [80, 300])
def test_a_result_of_many_columns_is_whole_in_any_terminal(width: int) -> None:
    columns = [f"column_{n}" for n in range(20)]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(sql_table(columns, [["value"] * 20], width=width))
    text = console.export_text()
    assert [name for name in columns if name not in text] == []
    assert text.count("value") >= 20


def test_a_writer_and_the_views_do_not_disturb_each_other(root: Path) -> None:
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.register_teacher(teacher("ada"))
        with TraceStore(root) as store, StoreSql(store) as views:
            writer.append([trace(2, "ada")])
            assert views.query("SELECT count(*) FROM traces").rows == [(4,)]
        assert ask(root, "SELECT count(*) FROM traces").rows == [(5,)]


def test_a_damaged_part_is_left_out(root: Path) -> None:
    part = next(root.glob("parts/bob/part-*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    assert ask(root, "SELECT DISTINCT teacher FROM traces").rows == [("ada",)]
    assert ask(root, "SELECT count(error) FROM parts").rows == [(1,)]


def test_a_trace_that_lies_in_two_parts_is_one(root: Path) -> None:
    (part,) = root.glob("parts/ada/part-*.parquet")
    shutil.copy(part, root / PARTS / "ada" / "part-000009-12345678.parquet")
    assert ask(root, "SELECT count(*) FROM traces").rows == [(4,)]
    assert ask(root, "SELECT count(*) FROM traces WHERE teacher = 'ada'").rows == [(2,)]


def test_a_query_can_be_interrupted(root: Path) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    threading.Timer(0.5, signal.pthread_kill, (ident, signal.SIGINT)).start()
    began = datetime.now()
    with pytest.raises(KeyboardInterrupt):
        ask(root, "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range * b.range % 7 = 3")
    assert (datetime.now() - began).total_seconds() < 30
