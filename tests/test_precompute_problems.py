"""Problem files in both forms, and what is wrong with a bad one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from precompute_examples import jsonl

from precompute.config import ProblemFiles, VerifyConfig
from precompute.problems.problem_files import LeftOut, load_problems, with_usable_golds
from precompute.verify.final_answer import answer_form_of
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, ProblemsError
from store.records import Problem

SHARED_PROBLEMS = Path(__file__).parents[2] / "shared/data/math/valid.parquet"
SUM = {"question": "What is 2 + 2?", "answer": "4"}
VERL = {
    "data_source": "aime",
    "prompt": [
        {"role": "system", "content": "Put it in <answer> </answer> tags."},
        {"role": "user", "content": "What is 2 + 2?"},
    ],
    "reward_model": {"ground_truth": "4", "style": "rule"},
}


def write_lines(folder: Path, *rows: Any) -> Path:
    return jsonl(folder / "problems.jsonl", *rows)


def table(path: Path, **columns: str) -> ProblemFiles:
    """The file with columns of its own, as the config gives them."""
    return ProblemFiles.model_validate({"files": str(path), **columns})


def parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "problems.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("write", [write_lines, parquet])
@pytest.mark.parametrize("question", ["question", "problem", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "gold"])
def test_the_usual_columns_need_no_config(tmp_path: Path, write: Any, question: str, answer: str) -> None:
    path = write(tmp_path, {question: "What is 2 + 2?", answer: "4", "source": "school"})
    (problem,) = load_problems(path).problems
    assert problem == Problem(question="What is 2 + 2?", answer="4", source="school")


@pytest.mark.parametrize("write", [write_lines, parquet])
def test_the_verl_form_brings_its_system_turn(tmp_path: Path, write: Any) -> None:
    (problem,) = load_problems(write(tmp_path, VERL)).problems
    assert (problem.question, problem.answer, problem.source) == ("What is 2 + 2?", "4", "aime")
    assert problem.system_prompt == "Put it in <answer> </answer> tags."
    # The form a problem comes in is no part of what it is.
    assert problem.problem_id == Problem(question="What is 2 + 2?", answer="4").problem_id


def test_the_last_user_message_is_the_question(tmp_path: Path) -> None:
    chat = [{"role": role, "content": text} for role, text in [("user", "hi"), ("user", "2 + 2?")]]
    (problem,) = load_problems(write_lines(tmp_path, {"prompt": chat, "answer": 4})).problems
    assert (problem.question, problem.system_prompt) == ("2 + 2?", None)


def test_columns_can_be_named_from_the_outside_in(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"q": {"text": "2 + 2?"}, "a.b": "4"})
    (problem,) = load_problems(table(path, question_column="q.text", answer_column="a.b")).problems
    assert (problem.question, problem.answer) == ("2 + 2?", "4")


@pytest.mark.parametrize(("cell", "text"), [(7, "7"), (7.0, "7.0"), (-0.5, "-0.5"), (["7"], "7")])
def test_a_number_for_an_answer_becomes_text(tmp_path: Path, cell: Any, text: str) -> None:
    (problem,) = load_problems(write_lines(tmp_path, {"question": "?", "answer": cell})).problems
    assert problem.answer == text


FORMS = """
from store.records import Problem
def gsm8k(row, columns):
    if "####" not in row["solution"]:
        return None
    return Problem(question=row["task"], answer=row["solution"].rpartition("####")[2].strip())
"""


def test_a_form_of_the_users_reads_rows_of_any_shape(tmp_path: Path) -> None:
    (tmp_path / "forms.py").write_text(FORMS)
    form = f"{tmp_path / 'forms.py'}:gsm8k"
    rows = [{"task": "2 + 2?", "solution": "Two and two. #### 4", "source": "gsm8k"}, {"solution": "four"}]
    (problem,) = load_problems(table(write_lines(tmp_path, rows[0]), form=form)).problems
    assert (problem.question, problem.answer, problem.source) == ("2 + 2?", "4", "gsm8k")
    left_out = load_problems(table(write_lines(tmp_path, *rows), form=form)).left_out.lines
    assert left_out[0].startswith("1 left out: problems.form does not fit this row, e.g. ")
    assert left_out[0].endswith("row 2: {'solution': 'four'}")
    with pytest.raises(ProblemsError, match=r"the column 'task' is missing, e.g. .*, row 1$"):
        load_problems(table(write_lines(tmp_path, {"solution": "#### 4"}), form=form))
    with pytest.raises(
        ConfigError, match=r"problems\.form = 'gsm': give one of chat, choices, gsm8k, .*, or module"
    ):
        load_problems(table(write_lines(tmp_path, SUM), form="gsm"))


def test_equal_rows_are_one_problem_and_are_counted(tmp_path: Path) -> None:
    other = SUM | {"answer": "5"}
    loaded = load_problems(write_lines(tmp_path, SUM, other, SUM | {"source": "again"}))
    # Three rows, of which the third repeats the first.
    assert (loaded.rows, loaded.duplicates) == (3, 1)
    assert [(problem.answer, problem.source) for problem in loaded.problems] == [("4", ""), ("5", "")]
    assert [problem.repeats for problem in loaded.problems] == [2, 1]


@pytest.mark.parametrize(
    ("row", "reason", "cell"),
    [
        ({"question": "", "answer": "4"}, "question holds no text", ": ''"),
        ({"question": "?", "answer": None}, "answer holds no text", ": ''"),
        ({"question": "?", "answer": True}, "answer is neither a text nor a number", ": True"),
        ({"question": "?", "answer": float("nan")}, "answer is neither a text nor a number", ": nan"),
        ({"question": "?"}, "the column 'answer' is missing", ""),
        ({"question": 5, "answer": "4"}, "question is neither a text nor a list of messages", ": 5"),
        (
            {"question": [{"role": "system"}], "answer": "4"},
            "question has no message of the role 'user'",
            ": [",
        ),
        (5, "a row is no JSON object", ": 5"),
    ],
)
def test_a_bad_row_is_left_out_counted_and_named(tmp_path: Path, row: Any, reason: str, cell: str) -> None:
    loaded = load_problems(write_lines(tmp_path, SUM, row, row))
    assert (loaded.rows, len(loaded.problems)) == (3, 1)
    (line,) = loaded.left_out.lines
    assert line.startswith(f"2 left out: {reason}, e.g. {tmp_path / 'problems.jsonl'}, row 2{cell}")
    with pytest.raises(ProblemsError, match=r"holds no problem: 1 left out: .*, row 1"):
        load_problems(write_lines(tmp_path, row))


def test_rows_that_are_wrong_each_in_its_own_way_have_few_lines() -> None:
    """A user's form may say anything about a row."""
    left_out = LeftOut()
    for number in range(20):
        left_out.add(f"reason {number}", "x")
    assert len(left_out.lines) == 9
    assert left_out.lines[-1] == "12 left out for other reasons"


def test_a_bad_file_is_named_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("cut.jsonl").write_text('{"question": "?", "ans')
    Path("cut.parquet").write_bytes(b"PAR1 and no footer")
    Path("folder.jsonl").mkdir()
    Path("pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    Path("cut.json").write_text('[{"question": "?", "answer": 4}, {"ques')
    for name, complaint in {
        "none.jsonl": "no problem file at",
        "none.parquet": "no problem file at",
        "empty.jsonl": "holds no problem",
        "cut.jsonl": "1 left out: this line is not JSON, e.g. .*, row 1: ",
        "cut.parquet": "is not a readable Parquet file",
        "folder.jsonl": "holds no file that ends in",
        "table.xlsx": "ends in '.xlsx'",
        "pointer.parquet": "is a pointer of Git LFS, without the data: run `git lfs pull`",
        "cut.json": "is a JSON array that breaks off or is broken: ",
    }.items():
        with pytest.raises(ProblemsError, match=complaint) as error:
            load_problems(name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_unknown_columns_are_answered_with_those_that_are_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"text": "?", "label": {"value": "4"}})
    with pytest.raises(
        ProblemsError, match=r"no column 'question' or 'problem' or 'prompt' .*text, label\.val"
    ):
        load_problems(path)
    with pytest.raises(ProblemsError, match=r"no column 'label\.gold' \(problems\.answer_column\)"):
        load_problems(table(path, question_column="text", answer_column="label.gold"))


def test_problems_whose_gold_is_of_no_use_are_left_out_by_reason() -> None:
    golds = ("4", "np.arcsin(10/13)", "\\frac12", "proof", "notfound")
    problems, left_out = [Problem(question="?", answer=gold) for gold in golds], LeftOut()
    with Verifier(VerifyConfig(workers=1)) as verifier:
        usable = with_usable_golds(problems, verifier, left_out)
    assert [problem.answer for problem in usable] == ["4", "\\frac12"]
    lines = left_out.lines
    assert "2 left out: the gold answer is none, e.g. 'proof' of" in lines[0]
    assert "1 left out: a gold answer that the verifier math cannot use, e.g. 'np.arcsin(10/13)'" in lines[1]


@pytest.mark.skipif(not SHARED_PROBLEMS.exists(), reason=f"{SHARED_PROBLEMS} is not here")
def test_the_real_evaluation_file_loads() -> None:
    shared_problems = load_problems(SHARED_PROBLEMS)
    # AIME and AMC problems stand in it several times, for averages over samples.
    assert (shared_problems.rows, len(shared_problems.problems)) == (2019, 1560)
    assert shared_problems.duplicates == 459
    sources = {problem.source for problem in shared_problems.problems}
    assert sources == {"aime", "amc", "math", "minerva", "olympiad_bench"}
    assert {answer_form_of(problem.system_prompt) for problem in shared_problems.problems} == {"answer_tags"}
