"""The public data sets' forms, the kinds of files, and prompts that go whole from a row to the model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer
from precompute_examples import GOOD, LAB, jsonl, lab_config, traces_of

from precompute.config import ProblemFiles, ProblemsConfig, TeacherConfig, VerifyConfig
from precompute.config_file import load_config
from precompute.problems.data_files import data_rows
from precompute.problems.problem_files import configured_problems, load_problems, with_usable_golds
from precompute.problems.prompts import demanded_form, render_prompt
from precompute.run import pipeline
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, ProblemsError
from store.export.export_forms import EXPORT_FORMS, Solved
from store.reader import TraceStore
from store.records import Problem
from store.writer import StoreWriter
from trainer.config import Config, StudentConfig
from trainer.planning import dry_run
from trainer.telemetry.console import TrainReporter
from trainer.train import train

FORMS = Path(__file__).parent / "forms"
STUDENT = LAB / "models" / "student"
SUMS = {"12+3-4+5-2": "14", "40-5-6+9-7": "31", "71+8-9-9+5": "66"}
FEW = (("user", "1+1"), ("assistant", "\\boxed{2}"))
LETTERED = {"mmlu_pro.parquet": "C", "mmlu.jsonl": "B", "arc.jsonl": "A"}
UNUSABLE = {
    "numina_cot.jsonl": "the solution has no \\boxed{} answer",
    "numina_1_5.jsonl": "the gold answer is",
}


def table(path: Path, **columns: str) -> ProblemFiles:
    return ProblemFiles.model_validate({"files": str(path), **columns})


def question_of(problem: Problem) -> str:
    """The sum in a question, with whatever the form puts around it."""
    return next(text for text in SUMS if text in problem.question)


@pytest.fixture(scope="module")
def verifier() -> Any:
    with Verifier(VerifyConfig(workers=1)) as verifier:
        yield verifier


@pytest.mark.parametrize("file", sorted(FORMS.iterdir()), ids=lambda file: file.name)
def test_a_public_form_has_its_gold_answers(file: Path, verifier: Verifier) -> None:
    loaded = load_problems(file)
    usable = with_usable_golds(loaded.problems, verifier, loaded.left_out)
    assert [question_of(problem) for problem in usable] == list(SUMS)
    golds = [LETTERED[file.name]] * 3 if file.name in LETTERED else list(SUMS.values())
    # TRL's own golds are math in dollars.
    assert [problem.answer.strip("$") for problem in usable] == golds
    (reason,) = loaded.left_out.counts if file.name in UNUSABLE else ("",)
    assert reason.startswith(UNUSABLE.get(file.name, ""))
    by_letter = {verifier.name_for(problem) for problem in usable}
    assert by_letter == ({"choice"} if file.name in LETTERED else {"math"})


def test_options_are_shown_as_lettered_lines_and_verified_by_letter(verifier: Verifier) -> None:
    first = load_problems(FORMS / "mmlu_pro.parquet").problems[0]
    assert first.question == "12+3-4+5-2\n\nA. 13\nB. 16\nC. 14\nD. 0"
    verdicts = [verifier.submit(f"\\boxed{{{each}}}", first).result() for each in ("C", "(C) 14", "14", "B")]
    assert [verdict.is_correct for verdict in verdicts] == [True, True, True, False]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"options": ["1", "2"], "answer": "C"}, "the answer fits none of the options, e.g. {rows}: 'C'"),
        (
            {"options": ["1", "2"], "answer": "A", "answer_index": 1},
            "answer and answer_index disagree, e.g. {rows}: 'A' and 1",
        ),
        ({"choices": ["1", "2"], "answer": 2}, "the answer fits none of the options, e.g. {rows}: 2"),
        ({"answer": "\ud800"}, "a text with lone surrogates, e.g. {rows}: 'q'"),
    ],
)
def test_a_row_that_contradicts_itself_is_left_out(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProblemsError) as error:
        load_problems(jsonl(tmp_path / "rows.jsonl", {"question": "q", **row}))
    assert reason.format(rows=f"{tmp_path / 'rows.jsonl'}, row 1") in str(error.value)


def test_prompts_of_several_turns_go_through_the_template_whole(tmp_path: Path) -> None:
    (first, *_) = load_problems(FORMS / "messages_text.jsonl").problems
    assert (first.system_prompt, first.turns) == ("You add.", (*FEW, ("user", "12+3-4+5-2")))
    # Other examples, another problem.
    assert first.problem_id != Problem(question="12+3-4+5-2", answer="14").problem_id
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    options: dict[str, Any] = {"system_prompt": None, "chat_template_kwargs": {}}
    text = render_prompt(tokenizer, first, **options).text
    assert text == "<system>You add.<user>1+1<assistant>\\boxed{2}<user>12+3-4+5-2"
    shown = render_prompt(tokenizer, first, **options, user_template="{{ question }} = ?").text
    assert shown.endswith("<assistant>\\boxed{2}<user>12+3-4+5-2 = ?")
    rows = [
        {
            "prompt": [{"role": "developer", "content": "Add."}, {"role": "user", "content": "1+1"}],
            "answer": 2,
        }
    ]
    (problem,) = load_problems(jsonl(tmp_path / "chat.jsonl", *rows)).problems
    assert render_prompt(tokenizer, problem, **options).text == "<developer>Add.<user>1+1"
    with StoreWriter.open(tmp_path / "traces", verifiers={}) as writer:
        writer.write_problems([first, problem])
        writer.write_problems([first])
    with TraceStore(tmp_path / "traces") as store:
        assert store.problems() == [first, problem]


@pytest.mark.parametrize(("to", "columns"), [("verl", {}), ("trl", {"answer_column": "solution"})])
def test_an_export_keeps_all_turns_and_is_the_same_problem_again(
    tmp_path: Path, to: str, columns: dict[str, str]
) -> None:
    problem = load_problems(FORMS / "messages_text.jsonl").problems[0]
    trace = SimpleNamespace(text="\\boxed{14}", teacher="t", is_correct=True, finish_reason="stop")
    solved = Solved(index=0, problem=problem, traces=[trace], teachers={}, system_prompt=None)  # type: ignore[list-item]
    rows = list(EXPORT_FORMS[to](solved))
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["system", "user", "assistant", "user"]
    (again,) = load_problems(table(jsonl(tmp_path / "rows.jsonl", *rows), **columns)).problems
    assert (again.problem_id, again.turns) == (problem.problem_id, problem.turns)


def test_the_answers_form_is_read_off_the_user_template_too() -> None:
    student = StudentConfig(system_prompt="", user_template="{{ question }} End with #### and the number.")
    assert demanded_form(student, Problem(question="1+1", answer="2")) == "hashes"


def test_a_response_behind_the_prompt_is_no_part_of_it(tmp_path: Path) -> None:
    first = load_problems(FORMS / "sharegpt.jsonl.gz").problems[0]
    assert (first.question, first.system_prompt, first.turns) == ("12+3-4+5-2", "You add.", ())
    ends = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "It is"}]
    with pytest.raises(ProblemsError, match="prompt ends with a turn of the role 'assistant', not 'user'"):
        load_problems(jsonl(tmp_path / "rows.jsonl", {"prompt": ends, "answer": "2"}))


ROW = {"question": "1+1", "answer": "2", "a": 1, "b": {"c": 5}, "kind": "school", "facts": {"unit": "m"}}


def test_a_template_makes_the_user_turn_from_the_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROW, {**ROW, "b": None})
    files = table(path, template="{{ a }} plus {{ b.c + 1 }}?", source_column="kind", metadata_column="facts")
    loaded = load_problems(files)
    (problem,) = loaded.problems
    assert (problem.question, problem.source, problem.metadata) == ("1 plus 6?", "school", {"unit": "m"})
    reason = "the template '{{ a }} plus {{ b.c + 1 }}?' does not fit"
    assert loaded.left_out.lines[0].startswith(f"1 left out: {reason}, e.g. {path}, row 2: ")
    prompt = {"system_prompt": "", "chat_template_kwargs": {}}
    text = render_prompt(
        tiny_tokenizer(), problem, **prompt, user_template="{{ question }} In {{ unit }}."
    ).text
    assert "1 plus 6? In m." in text
    with pytest.raises(ConfigError, match=r"user_template: problem \w+: the template .* 'uint' is undefined"):
        render_prompt(tiny_tokenizer(), problem, **prompt, user_template="{{ uint }}")


def test_columns_of_a_set_win_over_those_of_problems(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"q": "1+1", "text": "2+2", "answer": "4"})
    config = ProblemsConfig.model_validate(
        {"question_column": "q", "train": str(path), "eval": {"files": str(path), "question_column": "text"}}
    )
    train, held_out = (
        configured_problems(config, each, key="k").problems[0] for each in (config.train, config.eval)
    )
    assert (train.question, held_out.question) == ("1+1", "2+2")


def compressed(path: Path, kind: str) -> Path:
    with pa.output_stream(str(path), compression=kind) as stream:
        stream.write(json.dumps({"question": path.name, "answer": "1"}).encode())
    return path


@pytest.mark.slow
def test_a_row_group_may_hold_more_than_two_gigabytes(tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": "x" * (1 << 20)}]] * 100
    batch = pa.record_batch({"prompt": pa.array(chat), "answer": pa.array(["4"] * 100)})
    path = tmp_path / "big.parquet"
    pq.write_table(pa.Table.from_batches([batch] * 22), path, compression="zstd", row_group_size=1 << 20)
    assert pq.read_metadata(path).row_group(0).total_byte_size > 2**31
    assert sum(1 for _ in data_rows(path)) == 2200


def test_files_are_named_by_path_directory_glob_or_list(tmp_path: Path) -> None:
    (tmp_path / "shards" / "deep").mkdir(parents=True)
    one = compressed(tmp_path / "shards" / "b.jsonl.gz", "gzip")
    two = compressed(tmp_path / "shards" / "deep" / "a.jsonl.zst", "zstd")
    table = tmp_path / "c.csv"
    table.write_text('question,answer\n"1,\n+1",2\nbroken\n', encoding="utf-8")
    folder, listed = tmp_path / "shards", [str(two), str(table)]
    names = [p.question for p in load_problems(folder).problems]
    assert names == [one.name, two.name]
    assert [p.question for p in load_problems(f"{folder}/*.gz").problems] == [one.name]
    loaded = load_problems(ProblemFiles.model_validate(listed))
    assert [p.question for p in loaded.problems] == [two.name, "1,\n+1"]
    (line,) = loaded.left_out.lines
    assert line.startswith(
        f"1 left out: this line has another number of cells than the header, e.g. {table}, row 2:"
    )
    with pytest.raises(ProblemsError, match=r"no problem file matches .*/\*\.json$"):
        load_problems(f"{folder}/*.json")


def test_a_data_set_of_the_hub_has_config_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "sums"
    data.mkdir()
    for split, question in {"train": "1+1", "test": "2+2"}.items():
        jsonl(data / f"{split}.jsonl", {"question": question, "answer": "4"})
    (problem,) = load_problems(f"hf:{data}[test]").problems
    assert problem.question == "2+2"
    with pytest.raises(ProblemsError, match=rf"^hf:{data} has the splits train, test: name one"):
        load_problems(f"hf:{data}")
    with pytest.raises(ProblemsError, match=r"^hf:nobody/nothing:main\[train\] cannot be loaded: ") as error:
        load_problems("hf:nobody/nothing:main[train]")
    assert "\n" not in str(error.value)


def test_only_problems_in_the_range_of_pass_rates_are_solved(tmp_path: Path) -> None:
    """The rates are those of a store that a first teacher filled."""
    file = jsonl(tmp_path / "rows.jsonl", *({"question": q, "answer": a} for q, a in SUMS.items()))
    problems = {"train": str(file)}
    pipeline.run(lab_config(tmp_path / "rates", GOOD, problems=problems), limit=2)
    right = {trace.problem_id for trace in traces_of(tmp_path / "rates") if trace.is_correct}
    assert right, "the lab's best teacher solves some"
    limits = {"pass_rates": str(tmp_path / "rates"), "min_pass_rate": 0.5}
    report = pipeline.run(lab_config(tmp_path / "traces", GOOD, problems=problems | limits))
    assert (report.problems.used, report.problems.left_out) == (len(right), 3 - len(right))
    assert {trace.problem_id for trace in traces_of(tmp_path / "traces")} == right
    with pytest.raises(Exception, match="min_pass_rate and max_pass_rate need pass_rates"):
        ProblemsConfig(max_pass_rate=0.9)


def test_gsm8k_golds_need_no_warning_and_other_texts_behind_hashes_are_no_golds(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "Two.\n#### 1,234"}, {"question": "r", "answer": "#### \n1"}]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_problems(tmp_path / "rows.jsonl.gz")
    assert [problem.answer for problem in loaded.problems] == ["1,234", "#### \n1"]


RUN = """
problems.train="{file}" store.path="{out}/traces" run.dir="{out}" run.name="run" verify.workers=1
train.max_steps=1 train.problems_per_step=3 train.mini_batch_problems=3 eval.every=0
rollout.num_generations=2 rollout.max_completion_length=32 rollout.max_prompt_length=400
student.model="{student}" student.system_prompt="none" student.device="cpu"
"""


@pytest.mark.parametrize("file", sorted(FORMS.iterdir()), ids=lambda file: file.name)
def test_a_public_form_goes_from_the_dry_run_through_precompute_to_a_training_step(
    file: Path, tmp_path: Path
) -> None:
    teacher = GOOD | {"system_prompt": None, "max_tokens": 32}
    given = RUN.format(file=file, out=tmp_path, student=STUDENT).split()
    config = load_config(Config, None, given).model_copy(
        update={"teachers": (TeacherConfig.model_validate(teacher),)}
    )
    plan = pipeline.plan(config)
    assert (plan.problems.used, plan.problems.left_out) == (3, int(file.name in UNUSABLE))
    assert next(iter(SUMS)) in plan.teachers[0].first_prompt
    report = pipeline.run(config)
    assert report.teachers[0].new_samples == 3
    shown, missing = dry_run(config)
    assert not missing
    assert "3 training problems" in str(shown.renderables[0])
    outcome = train(config, reporter=TrainReporter())
    assert outcome.done.step == 1
    rows = pq.read_table(outcome.run / "rollouts" / "step-000001.parquet").to_pylist()
    with TraceStore(tmp_path / "traces") as store:
        assert {row["problem_id"] for row in rows} == {problem.problem_id for problem in store.problems()}
