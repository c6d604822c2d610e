"""`ampo store reverify`: other verdicts on stored texts, without sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
from precompute_examples import jsonl

from precompute.config import StoreConfig, VerifyConfig
from precompute.imports.foreign_rows import ImportColumns, ImportForm, TeacherNames
from precompute.imports.import_traces import import_traces
from precompute.problems.problem_files import load_problems
from precompute.run.reverify import check_verdicts, reverify
from precompute.verify.verifier import Verifier
from store import TraceStore
from store.errors import StoreError

ROWS = [
    {"question": "29+7+8?", "answer": "44", "teacher": "ada", "text": "It is \\boxed{44}"},
    {"question": "29+7+8?", "answer": "44", "teacher": "ben", "text": "It is \\boxed{30 + 14}"},
    {"question": "2+2?", "answer": "5", "teacher": "ada", "text": "<answer>4</answer>"},
    {"question": "2+2?", "answer": "5", "teacher": "ben", "text": "No idea."},
]
MATH = VerifyConfig(workers=1, timeout=20.0)
NUMERIC = MATH.model_copy(update={"default": "numeric"})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    form = ImportForm([jsonl(tmp_path / "traces.jsonl", *ROWS)], ImportColumns(), TeacherNames(renames={}))
    with Verifier(MATH) as verifier:
        import_traces(form, store=StoreConfig(path=str(tmp_path / "traces")), verifier=verifier)
    return tmp_path / "traces"


def verdicts(store: Path) -> dict[tuple[str, str], str]:
    with TraceStore(store) as opened:
        questions = {problem.problem_id: problem.question for problem in opened.problems()}
        return {(questions[t.problem_id], t.teacher): t.verdict for t in opened.traces()}


def test_another_verifier_is_refused_until_the_texts_are_verified_again(store: Path) -> None:
    problems = load_problems(store.parent / "traces.jsonl").problems
    with Verifier(MATH) as verifier:
        check_verdicts(store, problems, verifier)
    with Verifier(NUMERIC) as verifier:
        with pytest.raises(
            StoreError, match=r"verdicts of math-verify .*numeric ampo\.1 now; `ampo store rev"
        ):
            check_verdicts(store, problems, verifier)
        reports = {report.teacher: report for report in reverify(store, verifier)}
        check_verdicts(store, problems, verifier)
    # 30 + 14 is 44 to math; numeric wants it written out.
    assert verdicts(store) == {
        ("29+7+8?", "ada"): "match",
        ("29+7+8?", "ben"): "mismatch",
        ("2+2?", "ada"): "mismatch",
        ("2+2?", "ben"): "no_answer",
    }
    assert (reports["ben"].verified_before, reports["ben"].verified_now, reports["ben"].changed) == (1, 0, 1)
    with TraceStore(store) as opened:
        assert dict(opened.manifest.verifiers) == {"numeric": "ampo.1"}


def test_a_corrected_gold_answer_keeps_the_traces(store: Path) -> None:
    corrected = [row | {"answer": "4"} if row["answer"] == "5" else row for row in ROWS]
    problems = load_problems(jsonl(store.parent / "train.jsonl", *corrected)).problems
    with Verifier(MATH) as verifier:
        reverify(store, verifier, problems)
    assert verdicts(store)["2+2?", "ada"] == "match"
    with TraceStore(store) as opened:
        assert [problem.problem_id for problem in opened.problems()] == [p.problem_id for p in problems]
        assert [len(found) for found in opened.candidates([p.problem_id for p in problems]).values()] == [
            2,
            1,
        ]
