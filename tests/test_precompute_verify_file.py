"""`ampo verify`: anybody's (response, gold) pairs, verified as a stream."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from precompute_examples import jsonl
from proc_examples import needs_proc, wait_until, workers_of
from rich.console import Console

from precompute.config import VerifyConfig
from precompute.verify.verifier import Verifier
from precompute.verify.verify_file import (
    FileReport,
    PairFile,
    verify_file,
    verify_tables,
)
from store.errors import ProblemsError, UserError
from store.format.row_files import ROWS_AT_ONCE

ROOT = Path(__file__).parent.parent

ROWS = [
    {"completion": "so \\boxed{7/4}", "answer": "\\frac{7}{4}"},
    {"completion": "\\boxed{500}", "answer": "5"},
    {"completion": "first \\boxed{5}, then \\boxed{", "answer": "5"},
    {"completion": "<think>\\boxed{5}", "answer": "5"},
    {"completion": "<answer>5</answer>", "answer": 5},
    {"completion": None, "answer": "5"},
    {"completion": "\\boxed{1}", "answer": "1/0"},
    {
        "completion": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\\boxed{5}"}],
        "answer": 5.0,
    },
    {"completion": "\\boxed{\ud800}", "answer": "5"},
]
# By hand: 7/4, the tag and the chat match; 500 and the surrogate do not; an opening that is never closed, a
# thought that is never closed and nothing at all are no answer; 1/0 is no gold.
VERDICTS = [
    "match",
    "mismatch",
    "no_answer",
    "no_answer",
    "match",
    "no_answer",
    "gold_unparseable",
    "match",
    "mismatch",
]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifyConfig(workers=1, timeout=20.0)) as shared:
        yield shared


def verified(verifier: Verifier, file: Path, **options: Any) -> FileReport:
    pairs = PairFile(file, options.pop("response_column", None), options.pop("gold_column", None))
    return verify_file(pairs, verifier, failed=options.pop("failed", 20), progress=lambda *_: None, **options)


def test_counts_rows_by_verdict_and_keeps_the_first_that_failed(verifier: Verifier, tmp_path: Path) -> None:
    report = verified(verifier, jsonl(tmp_path / "rows.jsonl", *ROWS), failed=3)
    counts = {verdict: VERDICTS.count(verdict) for verdict in set(VERDICTS)}
    assert {verdict: rows for verdict, rows in report.verdicts.items() if rows} == counts
    assert (report.rows, report.verdicts["match"]) == (9, 3)
    assert (report.response_column, report.gold_column) == ("completion", "answer")
    assert [(row["row"], row["verdict"], row["gold"], row["answer"]) for row in report.failed] == [
        (2, "mismatch", "5", "500"),
        (3, "no_answer", "5", None),
        (4, "no_answer", "5", None),
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_every_verdict_is_written_in_the_order_of_the_rows(
    verifier: Verifier, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / "new" / f"verdicts{suffix}"
    verified(verifier, jsonl(tmp_path / "rows.jsonl", *ROWS), out=out)
    if suffix == ".parquet":
        rows = pq.read_table(out).to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(1, 10))
    assert [row["verdict"] for row in rows] == VERDICTS
    assert [row["is_correct"] for row in rows] == [verdict == "match" for verdict in VERDICTS]
    assert (rows[0]["parsed_gold"], rows[0]["parsed_answer"]) == ("7/4", "7/4")
    assert rows[8]["answer"] == "?"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_parquet_file_in_the_verl_form_needs_no_option(verifier: Verifier, tmp_path: Path) -> None:
    rows = [
        {"response": f"\\boxed{{{n}}}", "reward_model": {"ground_truth": str(n % 3), "style": "rule"}}
        for n in range(ROWS_AT_ONCE + 10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "verl.parquet")
    out = tmp_path / "verdicts.parquet"
    report = verified(verifier, tmp_path / "verl.parquet", out=out)
    assert report.gold_column == "reward_model.ground_truth"
    # Only 0, 1 and 2 are their own remainders by 3.
    assert report.verdicts["match"] == 3
    assert pq.read_table(out).num_rows == ROWS_AT_ONCE + 10


def test_the_form_decides_where_the_answer_stands(verifier: Verifier, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", {"text": "<answer>5</answer> \\boxed{6}", "gold": "5"})
    found = {
        form: verified(verifier, file, form=form).verdicts["match"] for form in ("boxed", "answer_tags", None)
    }
    assert found == {"boxed": 0, "answer_tags": 1, None: 0}


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], {}, "has no row"),
        ([{"foo": 1}], {}, "no column 'response'.*--response-column.*its columns: foo"),
        ([{"text": "x"}], {}, "no column 'gold'.*--gold-column"),
        ([{"text": "x", "gold": "5"}], {"gold_column": "nope"}, "no column 'nope' .--gold-column"),
        ([{"text": "x", "gold": "5"}, {"text": "x"}], {}, "row 2: the column 'gold' is missing"),
        ([{"text": "x", "gold": [5, 6]}], {}, "row 1: gold is neither a text nor a number: "),
        ([{"text": "x", "gold": True}], {}, "row 1: gold is neither a text nor a number: True"),
        ([{"text": 3, "gold": "5"}], {}, "row 1: text is neither a text nor a list of messages: 3"),
    ],
)
def test_a_file_that_is_no_file_of_pairs_is_one_clear_line(
    verifier: Verifier, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ProblemsError, match=says):
        verified(verifier, jsonl(tmp_path / "rows.jsonl", *rows), **options)


def test_out_is_refused_where_it_would_be_lost_or_destroy(verifier: Verifier, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", *ROWS)
    with pytest.raises(UserError, match=r"ends in \.parquet or \.jsonl"):
        verified(verifier, file, out=tmp_path / "verdicts.csv")
    with pytest.raises(UserError, match="the file to verify"):
        verified(verifier, file, out=tmp_path / "." / "rows.jsonl")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_bad_row_leaves_an_older_file_of_verdicts_as_it_was(
    verifier: Verifier, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"verdicts{suffix}"
    out.write_text("older")
    file = jsonl(tmp_path / "rows.jsonl", *ROWS, {"completion": "x"})
    with pytest.raises(ProblemsError, match="row 10"):
        verified(verifier, file, out=out)
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", out.name]


def test_the_tables_say_what_failed(verifier: Verifier, tmp_path: Path) -> None:
    report = verified(verifier, jsonl(tmp_path / "rows.jsonl", *ROWS))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(verify_tables(report))
    text = console.export_text()
    assert "the first 6 of 6 rows that do not match" in text
    assert "33.3%" in text
    assert "500" in text


def ampo_verify(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "verify", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_gives_json_and_one_line_for_a_users_error(tmp_path: Path) -> None:
    file = str(jsonl(tmp_path / "rows.jsonl", *ROWS))
    output, errors = ampo_verify(file, "--json", "--failed", "1", "--set", "verify.workers=1").communicate(
        timeout=120
    )
    body = json.loads(output)
    assert (body["rows"], body["verdicts"]["match"], len(body["failed"])) == (9, 3, 1), errors
    wrong = ampo_verify(file, "--gold-column", "nope")
    assert wrong.communicate(timeout=120) == (
        "",
        f"error: {file} has no column 'nope' (--gold-column); its columns: completion, answer\n",
    )
    assert wrong.returncode == 2


@needs_proc
def test_ctrl_c_leaves_a_line_no_half_file_and_no_worker(tmp_path: Path) -> None:
    rows = [{"text": f"\\boxed{{9^{{9^{{9^{{{n}}}}}}}}}", "gold": "5"} for n in range(9, 200)]
    file, out = jsonl(tmp_path / "rows.jsonl", *rows), tmp_path / "verdicts.parquet"
    process = ampo_verify(str(file), "--out", str(out))
    assert wait_until(lambda: bool(list(tmp_path.glob(".tmp-*"))) and len(workers_of(process.pid)) == 2, 60.0)
    time.sleep(0.2)
    workers = workers_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == f"interrupted; {out} was not written."
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
