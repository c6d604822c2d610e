"""What a check finds, what a repair does, and that exactly the lost samples are missing afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store_examples import JUDGE, make_store, problem, trace, wrong

from store.format.manifest import read_manifest
from store.reader import TraceStore
from store.upkeep.checking import check
from store.writer import StoreWriter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_store(
        tmp_path / "traces", [trace(0, "ada"), wrong(1, "ada")], [trace(2, "ada")], [trace(0, "bob")]
    )


def first_part(root: Path) -> Path:
    return sorted((root / "parts" / "ada").glob("part-*"))[0]


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-7])


def flip(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)


def test_a_whole_store_has_nothing_to_report(root: Path) -> None:
    report = check(root)
    assert (report.parts, report.findings, report.lost) == (3, (), {})
    assert report.bytes == sum(part.stat().st_size for part in root.rglob("part-*"))


@pytest.mark.parametrize(("harm", "fault"), [(cut, "truncated"), (flip, "altered"), (Path.unlink, "missing")])
def test_a_harmed_part_is_named_with_what_is_lost(
    root: Path, harm: Callable[[Path], None], fault: str
) -> None:
    victim = first_part(root)
    harm(victim)
    report = check(root)
    (finding,) = report.findings
    assert (finding.part, finding.fault) == (f"ada/{victim.name}", fault)
    # The part held one verified and one wrong trace of ada.
    assert (report.lost, report.lost_verified) == ({"ada": 2}, {"ada": 1})
    with TraceStore(root) as store:  # the rest is there as ever
        assert store.candidates([problem(2).problem_id])[problem(2).problem_id] == [
            trace(2, "ada", token_ids=(), logprobs=())
        ]


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
def test_after_a_repair_exactly_the_lost_samples_are_missing(
    root: Path, harm: Callable[[Path], None]
) -> None:
    victim = first_part(root)
    harm(victim)
    report = check(root, repair=True)
    assert check(root).findings == ()
    assert [(root / moved).exists() for moved in report.moved] == ([True] if report.moved else [])
    with StoreWriter.open(root, **JUDGE) as writer:
        assert writer.done("ada") == {problem(2).problem_id: {0: True}}
        writer.append([trace(0, "ada"), wrong(1, "ada")])
    with TraceStore(root) as store:
        assert len(store.traces()) == 4


def test_foreign_files_are_told_from_parts(root: Path) -> None:
    (root / "parts" / "ada" / "notes.txt").write_text("not mine")
    shutil.copy(first_part(root), root / "parts" / "ada" / "part-000009-0123456789abcdef.parquet")
    found = {finding.part: finding for finding in check(root).findings}
    assert {name: finding.fault for name, finding in found.items()} == {
        "ada/notes.txt": "foreign",
        "ada/part-000009-0123456789abcdef.parquet": "foreign",
    }
    assert "another checksum" in found["ada/part-000009-0123456789abcdef.parquet"].detail
    check(root, repair=True)
    assert (root / "quarantine" / "ada" / "notes.txt").read_text() == "not mine"
    assert check(root).findings == ()


def test_a_part_whose_writer_died_before_the_entry_is_entered(root: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", [trace(3, "ada")])
    arrived = first_part(other)
    shutil.copy(arrived, root / "parts" / "ada" / arrived.name)
    assert check(root).findings == ()
    report = check(root, repair=True)
    assert report.entered == (f"ada/{arrived.name}",)
    assert read_manifest(root).parts[f"ada/{arrived.name}"].traces == {"ada": 1}
    with TraceStore(root) as store:
        assert len(store.traces(problem_id=problem(3).problem_id)) == 1
