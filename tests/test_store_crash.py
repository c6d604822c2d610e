"""A kill or a failing disk at any system call of any operation: nothing lost, nothing half, nothing doubled.

pytest tests/test_store_crash.py               calls drawn by chance
pytest tests/test_store_crash.py -m slow       every call in turn
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_faults import (
    BEGINNINGS,
    ERRORS,
    EVERYTHING,
    Contents,
    Outcome,
    Work,
    assert_in_order,
    contents,
    run,
)

from store.format.files import TMP_MARK
from store.upkeep.compaction import forget

OPERATIONS = st.sampled_from(sorted(BEGINNINGS))
FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Case:
    """An operation, the store that it begins with, and what holds before and after it."""

    template: Path
    work: Work
    before: Contents
    after: Contents
    calls: list[str]


class Cases(dict[str, Case]):
    """What each operation comes to when nothing interrupts it; made once each."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self._place = place

    def __missing__(self, name: str) -> Case:
        begin, work = BEGINNINGS[name]
        template, whole = self._place / name / "before", self._place / name / "after"
        template.parent.mkdir()
        begin(template)
        if template.exists():
            shutil.copytree(template, whole)
        before = contents(template)
        outcome = run(work, whole)
        assert outcome.finished, outcome
        self[name] = Case(template, work, before, contents(whole), outcome.calls)
        return self[name]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("cases"))


@contextmanager
def store_of(case: Case) -> Iterator[Path]:
    """A copy of the store that the case begins with."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "traces"
        if case.template.exists():
            shutil.copytree(case.template, root)
        yield root


def assert_nothing_hurt(case: Case, root: Path, outcome: Outcome) -> None:
    """What held before and after holds meanwhile, as does what was acknowledged; nothing else is there."""
    there = contents(root)
    kept = {key for key in case.before if case.after.get(key) == case.before[key]}
    assert kept <= there.keys()
    assert set(outcome.acknowledged) <= {str(key) for key in there}
    possible = case.before | case.after
    assert {key: possible.get(key) for key in there} == there


def assert_same_end(case: Case, root: Path) -> None:
    """The same operation again, and all is as if nothing had happened."""
    outcome = run(case.work, root)
    assert outcome.finished, outcome
    assert contents(root) == case.after
    assert_in_order(root)


def assert_survives(case: Case, at: int) -> None:
    with store_of(case) as root:
        outcome = run(case.work, root, at=at)
        assert outcome.killed, outcome
        assert_nothing_hurt(case, root, outcome)
        assert_same_end(case, root)


def assert_refuses(case: Case, at: int, fault: int) -> None:
    """An error of the disk is one line of StoreError, and the same process can go on afterwards."""
    with store_of(case) as root:
        outcome = run(case.work, root, at=at, fault=fault, retry=True)
        assert outcome.finished, f"at {case.calls[at - 1]}: {outcome}"
        assert contents(root) == case.after
        assert_same_end(case, root)


def test_the_operations_do_what_they_should(cases: Cases) -> None:
    assert cases["write"].after == EVERYTHING
    assert cases["compact"].before == cases["compact"].after == EVERYTHING
    # ada's four of seven go; bob's three stay.
    assert sorted(key[1] for key in cases["forget"].after) == ["bob"] * 3
    assert cases["repair"].after == EVERYTHING


@FEW
@given(name=OPERATIONS, data=st.data())
def test_a_kill_at_any_call_hurts_nothing(cases: Cases, name: str, data: st.DataObject) -> None:
    assert_survives(cases[name], data.draw(st.integers(1, len(cases[name].calls)), "call"))


@FEW
@given(name=OPERATIONS, data=st.data())
def test_a_second_kill_while_recovering_hurts_nothing(cases: Cases, name: str, data: st.DataObject) -> None:
    case = cases[name]
    with store_of(case) as root:
        first = run(case.work, root, at=data.draw(st.integers(1, len(case.calls)), "first"))
        assert first.killed, first
        second = run(case.work, root, at=data.draw(st.integers(1, len(case.calls)), "second"))
        assert second.killed or second.finished, second
        second.acknowledged.extend(first.acknowledged)
        assert_nothing_hurt(case, root, second)
        assert_same_end(case, root)


@FEW
@given(name=OPERATIONS, fault=st.sampled_from(ERRORS), data=st.data())
def test_a_failing_disk_is_one_line_and_hurts_nothing(
    cases: Cases, name: str, fault: int, data: st.DataObject
) -> None:
    assert_refuses(cases[name], data.draw(st.integers(1, len(cases[name].calls)), "call"), fault)


def test_a_teacher_forgotten_after_a_killed_compaction_stays_forgotten(cases: Cases) -> None:
    case = cases["compact"]
    # Killed with the new parts in the manifest and the old ones still there: every trace stands in two parts.
    at = next(
        n
        for n, call in enumerate(case.calls, 1)
        if call.startswith("unlink") and "/part-" in call and TMP_MARK not in call
    )
    with store_of(case) as root:
        assert run(case.work, root, at=at).killed
        forget(root, "ada")
        assert {key[1] for key in contents(root)} == {"bob"}
        assert len(contents(root)) == 3
        assert_in_order(root)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_kill_at_every_call_hurts_nothing(cases: Cases, name: str) -> None:
    for at in range(1, len(cases[name].calls) + 1):
        assert_survives(cases[name], at)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_disk_that_fails_at_every_call_hurts_nothing(cases: Cases, name: str) -> None:
    for at in range(1, len(cases[name].calls) + 1):
        assert_refuses(cases[name], at, ERRORS[at % len(ERRORS)])


@pytest.mark.parametrize("name", BEGINNINGS)
def test_what_is_named_is_on_the_disk_first(cases: Cases, name: str) -> None:
    """The order that decides what a power cut leaves, and that no kill can show."""
    calls = [call.split(" ") for call in cases[name].calls if "index.duckdb" not in call]
    manifest_durable = False
    for number, call in enumerate(calls):
        later = calls[number + 1 :]
        if call[0] == "replace" and ".tmp-" in call[1]:
            own = [each[0] for each in calls[:number] if each[1] == call[1]]
            assert own[-1] == "fsync", f"{call[2]} was renamed before its content was durable"
            assert_synced(os.path.dirname(call[2]), later)
            manifest_durable = call[2].endswith("manifest.json")
        if call[0] == "mkdir":
            assert_synced(os.path.dirname(call[1]), later)
        if call[0] == "unlink" and "/part-" in call[1] and ".tmp-" not in call[1]:
            assert manifest_durable, f"{call[1]} went before the manifest said so"


def assert_synced(directory: str, later: list[list[str]]) -> None:
    """The directory becomes durable before anything else is renamed."""
    for call in later:
        if call == ["fsync", directory]:
            return
        assert call[0] != "replace", f"{call[2]} came before {directory} was durable"
    raise AssertionError(f"{directory} was never made durable")
