"""The pipeline on the lab's real models: what it keeps, how it goes on, what it refuses."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from precompute_examples import GOOD, POOR, PROBLEM_FILE, jsonl, keys_of, lab_config, start_child, traces_of
from rich.console import Console

from precompute.config import PrecomputeConfig
from precompute.run import pipeline
from precompute.run.plan import PrecomputeReport
from precompute.run.progress import ConsoleReporter, Reporter, TeacherProgress
from precompute.run.solve import sample_seed
from precompute.run.tables import report_tables
from precompute.verify.verifier import verify_answer
from store.errors import ConfigError, EngineError, ProblemsError, RecipeChangedError
from store.reader import TraceStore


def files_of(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


TWICE = (GOOD | {"samples": 2}, POOR | {"samples": 2})


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PrecomputeReport]:
    """A store with 16 problems solved by two teachers, two samples each, and the run's report."""
    store = tmp_path_factory.mktemp("filled") / "traces"
    return store, pipeline.run(lab_config(store, *TWICE), limit=16)


def test_every_sample_is_kept_with_what_it_takes_to_trust_it(filled: tuple[Path, PrecomputeReport]) -> None:
    store, report = filled
    traces = traces_of(store)
    assert len(keys_of(store)) == 16 * 2 * 2
    with TraceStore(store) as opened:
        golds = {problem.problem_id: problem.answer for problem in opened.problems()}
        recipes = {name: record.generation_fingerprint for name, record in opened.teachers().items()}
    for trace in traces:
        verdict = verify_answer(response=trace.text, gold=golds[trace.problem_id])
        assert (trace.verdict, trace.answer_start) == (verdict.reason, verdict.answer_start)
        assert trace.is_correct == (verdict.is_correct and trace.finish_reason == "stop")
        assert trace.n_tokens == len(trace.token_ids) == len(trace.logprobs)
        assert trace.generation_fingerprint == recipes[trace.teacher]
        assert trace.seed == sample_seed(trace.problem_id, trace.teacher, trace.sample_index) < 2**31
    assert len({trace.seed for trace in traces}) == 64
    # With one seed for both samples of a (problem, teacher) there would be 32 texts at most.
    assert len({(trace.problem_id, trace.teacher, trace.text) for trace in traces}) > 32
    assert report.teachers[0].stored.verified > report.teachers[1].stored.verified


def test_the_report_counts_what_the_store_holds(filled: tuple[Path, PrecomputeReport]) -> None:
    store, report = filled
    traces = traces_of(store)
    for outcome in report.teachers:
        own = [trace for trace in traces if trace.teacher == outcome.stored.teacher]
        assert (outcome.stored.problems, outcome.stored.traces, outcome.new_samples) == (16, 32, 32)
        assert outcome.stored.verified == sum(trace.is_correct for trace in own)
        assert outcome.stored.tokens == outcome.new_tokens == sum(trace.n_tokens for trace in own)
    covering: dict[str, set[str]] = {trace.problem_id: set() for trace in traces}
    for trace in traces:
        covering[trace.problem_id] |= {trace.teacher} if trace.is_correct else set()
    sizes = [len(teachers) for teachers in covering.values()]
    assert report.coverage == {count: sizes.count(count) for count in range(3)}
    assert report.problems.used == sum(report.coverage.values()) == 16


def test_a_teacher_without_a_verified_sample_is_shown_with_one_response(tmp_path: Path) -> None:
    cut = GOOD | {"name": "cut", "max_tokens": 4}
    report = pipeline.run(lab_config(tmp_path / "traces", GOOD, cut), limit=4)
    console = Console(width=500, record=True, file=io.StringIO())
    console.print(report_tables(report))
    (line,) = (line for line in console.export_text().splitlines() if "none of its" in line)
    first = report.teachers[1].unverified
    assert first is not None
    assert line.startswith("cut: none of its 4 samples is verified. One, of ")
    assert f"cut at max_tokens, ends: {first[0].text!r}; answer None, gold {first[1].answer!r}" in line
    assert "verdict no_answer" in line


def test_a_second_run_samples_nothing_and_adds_no_part(filled: tuple[Path, PrecomputeReport]) -> None:
    store, report = filled
    before = files_of(store / "parts")
    again = pipeline.run(lab_config(store, *TWICE), limit=16)
    assert files_of(store / "parts") == before
    nothing = {"new_samples": 0, "new_tokens": 0, "seconds": 0.0}
    assert [replace(now, **nothing) for now in again.teachers] == [
        replace(then, **nothing) for then in report.teachers
    ]
    assert again.coverage == report.coverage


def test_a_plan_says_what_is_left_and_touches_nothing(filled: tuple[Path, PrecomputeReport]) -> None:
    store, _ = filled
    before = files_of(store)
    plan = pipeline.plan(lab_config(store, GOOD | {"samples": 3}), limit=20)
    (teacher,) = plan.teachers
    # 20 problems x 3 samples, of which 16 x 2 are there: 28 are left, of 120 tokens at most.
    assert (teacher.samples_stored, teacher.samples_left) == (32, 28)
    assert teacher.most_tokens == 28 * 120
    assert teacher.engine == "transformers"
    assert teacher.first_prompt == "<|user|>30-7+9-5+1-8-5<|end|><|assistant|>"
    assert files_of(store) == before
    fresh = store.parent / "not-there"
    plan = pipeline.plan(lab_config(fresh, GOOD), limit=4)
    assert (plan.store, plan.store_exists, plan.teachers[0].samples_left) == (str(fresh), False, 4)
    assert not fresh.exists()


def test_another_recipe_under_the_same_name_is_refused(filled: tuple[Path, PrecomputeReport]) -> None:
    store, _ = filled
    before = files_of(store / "parts")
    changed = lab_config(store, GOOD | {"temperature": 0.5, "answer_form": "answer_tags"})
    said = r"'totals'.*answer_form None -> 'answer_tags'; sampling\.temperature 1\.0 -> 0\.5"
    for command in (pipeline.plan, pipeline.run):
        with pytest.raises(RecipeChangedError, match=said):
            command(changed, limit=2)
    assert files_of(store / "parts") == before


def test_a_damaged_part_costs_its_own_samples_alone(
    filled: tuple[Path, PrecomputeReport], tmp_path: Path
) -> None:
    store = shutil.copytree(filled[0], tmp_path / "traces")
    before = traces_of(store)
    part = next((store / "parts" / "totals").glob("*.parquet"))
    rows = pq.read_metadata(part).num_rows
    part.write_bytes(part.read_bytes()[:-20])
    report = pipeline.run(lab_config(store, GOOD | {"samples": 2}), limit=16)
    assert report.teachers[0].new_samples == rows
    assert {trace.trace_id for trace in traces_of(store)} == {trace.trace_id for trace in before}


def test_a_filtered_trace_is_kept_counted_and_no_candidate(tmp_path: Path) -> None:
    plan = GOOD | {"until_verified": 1, "max_samples": 3}
    settings = lab_config(tmp_path / "traces", plan, filters={"max_tokens": 45})
    report = pipeline.run(settings, limit=16)
    traces = traces_of(tmp_path / "traces")
    for trace in traces:
        said = f"max_tokens: {trace.n_tokens} tokens, more than 45"
        assert trace.filtered == (said if trace.n_tokens > 45 else None)
    held = [trace for trace in traces if trace.is_correct and trace.filtered]
    usable = {trace.problem_id for trace in traces if trace.is_usable}
    assert held
    assert report.teachers[0].stored.filtered == len(held)
    assert report.teachers[0].stored.verified == sum(trace.is_correct for trace in traces)
    assert report.coverage == {0: 16 - len(usable), 1: len(usable)}
    with TraceStore(tmp_path / "traces") as store:
        candidates = store.candidates([trace.problem_id for trace in held])
    assert all(trace.filtered is None for found in candidates.values() for trace in found)
    # It is a try without a usable trace: another one follows, as long as tries are left.
    for trace in held:
        tries = [other for other in traces if other.problem_id == trace.problem_id]
        assert trace.sample_index == 2 or len(tries) > trace.sample_index + 1
    assert pipeline.run(settings, limit=16).teachers[0].new_samples == 0


def test_answers_are_read_in_the_form_that_the_config_names(tmp_path: Path) -> None:
    # The lab's models box their answers: read as tags, there is none.
    pipeline.run(lab_config(tmp_path / "traces", GOOD | {"answer_form": "answer_tags"}), limit=2)
    assert {trace.verdict for trace in traces_of(tmp_path / "traces")} == {"no_answer"}


def test_a_response_that_was_cut_is_never_correct(
    filled: tuple[Path, PrecomputeReport], tmp_path: Path
) -> None:
    whole = next(trace for trace in traces_of(filled[0]) if trace.is_correct and trace.teacher == "totals")
    # The same seed draws the same tokens; one token less leaves the answer and cuts the EOS.
    shorter = GOOD | {"max_tokens": whole.n_tokens - 1, "samples": 2}
    pipeline.run(lab_config(tmp_path / "traces", shorter), limit=16)
    key = (whole.problem_id, whole.sample_index)
    cut = next(t for t in traces_of(tmp_path / "traces") if (t.problem_id, t.sample_index) == key)
    assert cut.text == whole.text
    assert (cut.finish_reason, cut.verdict, cut.is_correct) == ("length", "match", False)


def run_and_die(store: str, samples: int, limit: int, die_at: int | None) -> None:
    """In a process of its own. With `die_at` the user presses Ctrl-C when that many samples are verified."""
    teachers = (GOOD | {"samples": samples, "batch_size": 8}, POOR | {"batch_size": 8})
    reporter = Interrupting(die_at) if die_at else Reporter()
    try:
        pipeline.run(lab_config(Path(store), *teachers, part_traces=3), limit=limit, reporter=reporter)
    except KeyboardInterrupt:
        os._exit(130)


class Interrupting(Reporter):
    def __init__(self, at: int) -> None:
        self._at = at

    def progress(self, progress: TeacherProgress) -> None:
        if progress.new == self._at:
            os.kill(os.getpid(), signal.SIGINT)


def test_killed_again_and_again_it_ends_with_the_same_traces(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    start_child(run_and_die, str(whole), 2, 12, None).join()
    lacking = []
    for parts in (1, 2, 4):
        process = start_child(run_and_die, str(torn), 2, 12, None)
        while process.is_alive() and len(list(torn.rglob("part-*.parquet"))) < parts:
            time.sleep(0.005)
        process.kill()
        process.join()
        lacking.append(12 * 3 - len(keys_of(torn)))
    start_child(run_and_die, str(torn), 2, 12, None).join()
    assert keys_of(torn) == keys_of(whole)
    assert len(keys_of(torn)) == 12 * 3
    # The first kill hit a run that had written something and not yet all.
    assert 0 < lacking[0] < 12 * 3


def test_ctrl_c_keeps_what_is_verified_and_the_next_run_goes_on(tmp_path: Path) -> None:
    process = start_child(run_and_die, str(tmp_path / "traces"), 2, 12, 5)
    process.join()
    assert process.exitcode == 130
    kept = keys_of(tmp_path / "traces")
    assert 5 <= len(kept) < 36
    run_and_die(str(tmp_path / "traces"), 2, 12, None)
    ended = keys_of(tmp_path / "traces")
    assert len(ended) == 36
    assert kept.items() <= ended.items()


def test_user_errors_name_what_is_wrong(tmp_path: Path) -> None:
    store = tmp_path / "traces"
    with pytest.raises(ConfigError, match=r"no teacher 'totls' in the config; its teachers: totals, student"):
        pipeline.run(lab_config(store, GOOD, POOR), teachers=["totls"])
    with pytest.raises(ConfigError, match=r"\[\[teachers\]\]"):
        pipeline.run(PrecomputeConfig())
    with pytest.raises(ConfigError, match=r"problems\.train is empty"):
        pipeline.run(lab_config(store, GOOD, problems={}))
    with pytest.raises(EngineError, match=r"teacher 'x': model '.*absent': there is no directory"):
        pipeline.run(lab_config(store, {"name": "x", "model": str(tmp_path / "absent")}))
    with pytest.raises(EngineError, match=r"teacher 'totals': max_tokens = 9999 .* may be \d+ at most"):
        pipeline.plan(lab_config(store, GOOD | {"max_tokens": 9999}), limit=2)
    with pytest.raises(
        ConfigError, match=r"engine = 'vlm': give one of auto, openai, transformers, vllm, or"
    ):
        pipeline.run(lab_config(store, GOOD), engine="vlm")
    with pytest.raises(ConfigError, match=r"engine = 'json:laod': json has no 'laod'"):
        pipeline.plan(lab_config(store, GOOD | {"engine": "json:laod"}), limit=2)
    assert not store.exists()


def test_golds_that_do_not_parse_are_left_out_and_reported(tmp_path: Path) -> None:
    rows = [{"question": "12+3-4", "answer": "11"}, {"question": "what?", "answer": "\\frac{"}]
    file = jsonl(tmp_path / "problems.jsonl", *rows)
    settings = lab_config(tmp_path / "traces", GOOD, problems={"train": str(file)})
    report = pipeline.run(settings)
    assert (report.problems.rows, report.problems.left_out, report.problems.used) == (2, 1, 1)
    assert {trace.problem_id for trace in traces_of(tmp_path / "traces")} == {
        problem.problem_id for problem in TraceStore(tmp_path / "traces").problems()
    }
    jsonl(file, rows[1])
    with pytest.raises(
        ProblemsError,
        match="no problem can be used: 1 left out: a gold answer that",
    ):
        pipeline.run(settings)


PROGRESS = TeacherProgress(teacher="totals", done=70, total=100, verified=5, new=20, tokens=800, seconds=10.0)


def test_without_a_terminal_progress_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleReporter(Console(width=200)) as reporter:
        reporter.message("totals: loading [model]")
        reporter.progress(PROGRESS)
        # 5 of 20 verified; 800 tokens in 10 s.
        reporter.progress(replace(PROGRESS, filtered=2), last=True)
        reporter.progress(TeacherProgress(teacher="words", done=7, total=7), last=True)
    assert capsys.readouterr().out.splitlines() == [
        "totals: loading [model]",
        "totals: 70/100  verified 25%  filtered 2  80 tokens/s",
        "words: 7/7  nothing left to do",
    ]


def test_on_a_terminal_progress_is_a_bar() -> None:
    console = Console(width=120, force_terminal=True, record=True)
    with ConsoleReporter(console) as reporter:
        reporter.show("checking gold answers", 1, 2)
        reporter.progress(PROGRESS)
    text = console.export_text()
    assert "70/100" in text
    assert "verified 25%  80 tokens/s" in text


def test_a_question_that_is_too_long_is_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in PROBLEM_FILE.read_text().splitlines()[:4]]
    rows[2]["question"] += " + 1" * 40
    problems = {"train": str(jsonl(tmp_path / "problems.jsonl", *rows))}

    class Lines(Reporter):
        def message(self, text: str) -> None:
            lines.append(text)

    for new in (3, 0):
        lines: list[str] = []
        config = lab_config(tmp_path / "traces", GOOD | {"max_model_len": 160}, problems=problems)
        report = pipeline.run(config, reporter=Lines())
        assert report.teachers[0].new_samples == new
        (line,) = (line for line in lines if "left out" in line)
        assert "problems are left out: prompt and max_tokens = 120 exceed max_model_len = 160" in line
    with pytest.raises(EngineError, match=r"shortest prompt of \d+ tokens exceed max_model_len = 110"):
        pipeline.run(lab_config(tmp_path / "none", GOOD | {"max_model_len": 110}, problems=problems))
