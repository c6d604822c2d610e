"""Traces out of a store, into another, and questions to it, as a user does it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_examples import PROBLEMS, write_store
from store_examples import make_store, trace
from test_cli import ENVIRONMENT, ampo


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exchange") / "traces"
    write_store(path)
    return path


def test_out_and_in_again(store: Path, tmp_path: Path) -> None:
    out = ampo("store", "export", str(store), "--to", "verl", "--out", "verl.parquet", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "verl, 8 rows, 8 problems, 16 traces (ada 8, bob 8)" in out.stdout
    back = ampo("store", "import", "verl.parquet", "back", "--rename", "ada=eve", "--json", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    teachers = {teacher["teacher"]: teacher for teacher in json.loads(back.stdout)["teachers"]}
    assert {name: (t["source"], t["new"], t["verdicts"]) for name, t in teachers.items()} == {
        "bob": ("bob", 8, {"match": 8}),
        "eve": ("ada", 8, {"match": 8}),
    }
    again = ampo("store", "import", "verl.parquet", "back", "--rename", "ada=eve", cwd=tmp_path)
    assert "0 new traces" in again.stdout, again.stderr


def test_questions_in_tables_json_and_csv(store: Path) -> None:
    (pair,) = json.loads(ampo("inspect", "store", "agreement", str(store), "--json").stdout)
    assert (pair["one"], pair["other"], pair["both"], pair["jaccard"]) == ("ada", "bob", 8, 1.0)
    sql = "SELECT teacher, count(*) AS n FROM traces GROUP BY teacher ORDER BY teacher"
    assert ampo("inspect", "store", "sql", sql, str(store), "--csv").stdout.split() == [
        "teacher,n", "ada,8", "bob,8",
    ]  # fmt: skip
    cut = ampo("inspect", "store", "sql", "FROM traces", str(store), "--limit", "3")
    assert "the first 3 rows; --limit 0 shows all" in cut.stdout
    program = ampo("inspect", "store", "sql", "FROM traces", str(store), "--limit", "3", "--json")
    assert len(json.loads(program.stdout)) == 3
    assert program.stderr == "the first 3 rows; --limit 0 shows all\n"
    one = ampo("inspect", "store", "traces", str(store), "--problem", PROBLEMS[1].problem_id)
    assert "we add and get" in one.stdout, one.stderr


def test_json_and_csv_have_all_rows_or_a_line_says_how_many_are_missing(tmp_path: Path) -> None:
    make_store(tmp_path / "many", [trace(n, "ada") for n in range(30)], problems=30)
    for kind in ("traces", "problems"):
        inspect = ("inspect", "store", kind, str(tmp_path / "many"))
        whole = ampo(*inspect, "--json")
        assert (len(json.loads(whole.stdout)), whole.stderr) == (30, "")
        assert len(ampo(*inspect, "--csv").stdout.splitlines()) == 31
        some = ampo(*inspect, "--json", "--limit", "8")
        assert len(json.loads(some.stdout)) == 8
        assert some.stderr == f"8 of 30 {kind} shown; 22 left out; --limit 0 shows all\n"
        assert f"20 of 30 {kind} shown; 10 left out; --limit 0 shows all" in ampo(*inspect).stdout
        assert "left out" not in ampo(*inspect, "--limit", "0").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["store", "export", "STORE", "--to", "csv", "--out", "x"],
            "--to = 'csv': give one of chat, dpo, hf, luffy, trl, verl",
        ),
        (["store", "export", "nowhere", "--to", "verl", "--out", "x.jsonl"], "no trace store at"),
        (["store", "import", "nowhere.parquet"], "no data file at"),
        (["store", "import", "STORE/manifest.json"], "left out: this line is not JSON, e.g. "),
        (["store", "import", "x.jsonl", "--rename", "ada"], "--rename ada: write OLD=NEW"),
        (["inspect", "store", "traces", "STORE", "--problem", "zz"], "--problem zz: no problem of"),
        (["inspect", "store", "traces", "STORE", "--teacher", "nope"], "its teachers: ada, bob"),
        (["inspect", "store", "sql", "DELETE FROM traces", "STORE"], "SQL: give one SELECT"),
        (["inspect", "store", "agreement", "nowhere"], "no trace store at"),
    ],
)
def test_a_users_error_is_one_line_and_leaves_nothing(
    store: Path, arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = ampo(*(argument.replace("STORE", str(store)) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    *before, error = done.stderr.strip().splitlines()
    assert said in error
    assert done.stdout == ""
    assert not before
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_was_judged_and_says_how_to_go_on(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n}+1", "answer": str(n + 1), "teacher": "r1", "text": f"\\boxed{{{n + 1}}}"}
        for n in range(20000)
    ]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["store", "import", "many.jsonl", "traces", "--set", "store.part_traces=64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *command],
        env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("traces/parts/r1/part-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted; what was verified is kept. Go on with the same command." in said
    assert "Traceback" not in said
    kept = ampo(
        "inspect", "store", "sql", "SELECT count(*) AS n FROM traces", "traces", "--json", cwd=tmp_path
    )
    assert 64 <= json.loads(kept.stdout)[0]["n"] < 20000
