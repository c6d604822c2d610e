"""What a check finds, what a repair does, and that exactly the lost samples are missing afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store_examples import JUDGE, make_store, problem, trace, wrong

from store.errors import StoreNewerError, StoreOlderError
from store.format.manifest import read_manifest
from store.reader import TraceStore
from store.upkeep.checking import check
from store.upkeep.migration import migrate
from store.writer import StoreWriter

OLD_STORE = Path(__file__).parent / "data" / "store_v1"


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


def test_an_older_store_is_refused_and_migrated(tmp_path: Path) -> None:
    root = tmp_path / "old"
    shutil.copytree(OLD_STORE, root)
    with pytest.raises(StoreOlderError, match=f"schema version 1, .*`ampo store migrate {root}`"):
        TraceStore(root)
    report = migrate(root)
    assert (report.from_version, report.to_version, report.parts, report.traces) == (1, 2, 3, 6)
    with TraceStore(root) as store:
        found = store.traces(tokens=True)
        # ada: problems 0 and 1 right, 2 wrong, 3 right; bob: problem 0 twice.
        expected = [trace(0, "ada"), trace(1, "ada"), wrong(2, "ada"), trace(3, "ada")]
        expected += [trace(0, "bob"), trace(0, "bob", 1)]
        order = sorted(expected, key=lambda each: (each.problem_id, each.teacher, each.sample_index))
        assert found == order
    assert check(root).findings == ()
    assert migrate(root).parts == 0


def test_a_migration_killed_anywhere_is_begun_again(tmp_path: Path) -> None:
    root = tmp_path / "old"
    shutil.copytree(OLD_STORE, root)
    done = tmp_path / "done"
    shutil.copytree(OLD_STORE, done)
    migrate(done)
    # Killed before the manifest: some new parts stand beside the old ones.
    for part in sorted((done / "parts" / "ada").iterdir())[:1]:
        shutil.copy(part, root / "parts" / "ada")
    assert migrate(root).traces == 6
    assert check(root).findings == ()
    # Killed behind it: some old parts are still there.
    old = sorted((OLD_STORE / "parts" / "bob").iterdir())[0]
    shutil.copy(old, root / "parts" / "bob")
    migrate(root)
    assert check(root).findings == ()
    with TraceStore(root) as store:
        assert len(store.traces()) == 6


def test_a_newer_store_cannot_be_migrated(root: Path) -> None:
    text = (root / "manifest.json").read_text().replace('"schema_version": 2', '"schema_version": 3')
    (root / "manifest.json").write_text(text)
    with pytest.raises(StoreNewerError, match="install a later ampo"):
        migrate(root)


def test_a_damaged_old_part_is_left_and_named(tmp_path: Path) -> None:
    root = tmp_path / "old"
    shutil.copytree(OLD_STORE, root)
    cut(first_part(root))
    report = migrate(root)
    assert (report.parts, report.traces, len(report.damaged)) == (2, 3, 1)
    assert [finding.fault for finding in check(root).findings] == ["foreign"]
