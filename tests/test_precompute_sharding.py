"""Shards: processes that share a store, each with its own part of the problems."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from precompute_examples import GOOD, jsonl, keys_of, lab_config, parts_of, rows_in_parts, start_child

from precompute.config import PrecomputeConfig
from precompute.run import pipeline
from precompute.run.plan import PrecomputeReport
from precompute.run.shard import Shard
from precompute.run.tables import problems_line
from store.errors import ConfigError, ProblemsError
from store.records import Problem

PROBLEMS = 16
SAMPLES = 2


def config(store: Path, **sections: Any) -> PrecomputeConfig:
    teacher = GOOD | {"samples": SAMPLES, "max_tokens": 60, "batch_size": 4}
    return lab_config(store, teacher, part_traces=3, **sections)


def run_shard(store: str, shard: str | None) -> PrecomputeReport:
    part = Shard.parse(shard) if shard else None
    return pipeline.run(config(Path(store)), limit=PROBLEMS, shard=part)


def finished(*processes: Any) -> None:
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_a_shard_is_read_from_what_users_write() -> None:
    assert Shard.parse("3/16") == Shard(number=3, count=16)
    assert (Shard.parse("3/16").name, str(Shard.parse("3/16"))) == ("3-of-16", "3/16")
    # 0xff = 255 = 63 * 4 + 3: the fourth of four.
    assert [Shard(number=n, count=4).holds("00000000000000ff") for n in (1, 2, 3, 4)] == [False] * 3 + [True]


@pytest.mark.parametrize("text", ["0/4", "5/4", "a/b", "", "-1/4", "1/4/2", "²/4"])
def test_a_bad_shard_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--shard '.*': write i/n, .* e\.g\. --shard 3/16$") as error:
        Shard.parse(text)
    assert repr(text) in str(error.value)


@given(
    questions=st.lists(st.text(min_size=1), min_size=1, max_size=40, unique=True),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_every_problem_is_in_exactly_one_shard_wherever_it_stands(
    questions: list[str], count: int, data: st.DataObject
) -> None:
    problems = [Problem(question=question, answer="1", source="x") for question in questions]
    mixed = data.draw(st.permutations(problems))
    shards = [Shard(number=number, count=count) for number in range(1, count + 1)]
    ids = [problem.problem_id for shard in shards for problem in shard.of(problems)]
    assert sorted(ids) == sorted(problem.problem_id for problem in problems)
    for shard in shards:
        assert set(shard.of(mixed)) == set(shard.of(problems))


def test_two_shards_at_once_make_what_one_process_makes_also_when_one_is_killed(tmp_path: Path) -> None:
    whole, store = tmp_path / "whole", tmp_path / "traces"
    finished(start_child(run_shard, str(whole), None))
    killed, other = (start_child(run_shard, str(store), shard) for shard in ("1/2", "2/2"))
    while not parts_of(store):
        time.sleep(0.01)
    killed.kill()
    killed.join()
    kept = rows_in_parts(store)
    finished(other, start_child(run_shard, str(store), "1/2"))
    assert 0 < kept < PROBLEMS * SAMPLES
    assert keys_of(store) == keys_of(whole)
    assert len(keys_of(whole)) == PROBLEMS * SAMPLES
    # A second run has nothing to do, and a report counts the problems of its own shard.
    reports = [pipeline.run(config(store), limit=PROBLEMS, shard=Shard.parse(f"{n}/2")) for n in (1, 2)]
    assert [report.teachers[0].new_samples for report in reports] == [0, 0]
    sizes = [report.problems.used for report in reports]
    assert sum(sizes) == PROBLEMS
    assert min(sizes) > 0
    assert [report.teachers[0].stored.traces for report in reports] == [size * SAMPLES for size in sizes]
    assert [sum(report.coverage.values()) for report in reports] == sizes
    assert problems_line(reports[0].problems).endswith(f"{sizes[0]} problems used (shard 1/2)")


def test_a_shard_without_a_problem_has_nothing_to_do(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "problems.jsonl", {"question": "12+3-4", "answer": "11"})
    settings = config(tmp_path / "traces", problems={"train": str(file)})
    only = Problem(question="12+3-4", answer="11").problem_id
    empty = next(Shard(number=n, count=2) for n in (1, 2) if not Shard(number=n, count=2).holds(only))
    report = pipeline.run(settings, shard=empty)
    assert (report.problems.used, report.teachers[0].new_samples, sum(report.coverage.values())) == (0, 0, 0)
    with pytest.raises(ProblemsError, match=f"shard {empty} holds none of the problems"):
        pipeline.plan(settings, shard=empty)
