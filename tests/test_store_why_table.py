"""`ampo inspect store traces --why`."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from run_examples import PROBLEMS, teacher, trace

from precompute.verify.verifier import VERIFIER_NAME, VERIFIER_VERSION
from store.reader import TraceStore
from store.reports.report import trace_rows
from store.reports.why_table import why_table, with_golds
from store.writer import StoreWriter


def test_gold_and_answer_stand_beside_what_was_read_and_why(tmp_path: Path) -> None:
    record, problem = teacher("ada"), PROBLEMS[1]
    right = trace(problem, "ada", "\\boxed{2}", record)
    wrong = replace(
        trace(problem, "ada", "\\boxed{4/2x}", record),
        sample_index=1,
        answer="4/2x",
        verdict="mismatch",
        is_correct=False,
        parsed_answer="2*x",
        parsed_gold="2",
        verdict_detail="for a reason",
    )
    cut = replace(
        trace(problem, "ada", "\\boxed{2} and", record),
        sample_index=2,
        is_correct=False,
        finish_reason="length",
    )
    with StoreWriter.open(tmp_path, verifier=VERIFIER_NAME, verifier_version=VERIFIER_VERSION) as writer:
        writer.write_problems([problem])
        writer.register_teacher(record)
        writer.append([right, wrong, cut])
    with TraceStore(tmp_path) as store:
        rows = with_golds(store, trace_rows(store))
    assert [row["gold"] for row in rows] == ["2", "2", "2"]
    by_sample = {row["sample_index"]: row for row in rows}
    assert (by_sample[1]["parsed_gold"], by_sample[1]["parsed_answer"]) == ("2", "2*x")

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(why_table(rows))
    lines = console.export_text().splitlines()
    (said,) = [line for line in lines if "ada/1" in line]
    assert re.split(r" {2,}", said.strip())[2:] == [
        "mismatch",
        "2",
        "2",
        "4/2x",
        "2*x",
        "for a reason",
    ]
    assert any("ada/2" in line and "not correct all the same: the response was cut" in line for line in lines)
