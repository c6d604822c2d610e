"""A byte altered anywhere: the right trace or an error that names the part, never another text."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_examples import JUDGE, make_store, problem, trace, wrong
from store_faults import append_lacking, contents, keyed, keys_in

from store.errors import StoreDamagedError
from store.format.parts import file_digest
from store.reader import TraceStore
from store.upkeep.checking import check
from store.upkeep.compaction import compact
from store.writer import StoreWriter

ADA = [
    trace(
        number,
        "ada",
        text=f"{number} é " * (number % 5 + 1),
        token_ids=tuple(range(number % 4)),
        logprobs=tuple(-0.5 * place for place in range(number % 4)),
    )
    for number in range(21)
]  # two row groups, of 16 and 5
BOB = [trace(0, "bob"), wrong(1, "bob", 3), trace(2, "bob", text="")]
EVERYTHING = keyed([*ADA, *BOB])
ASKED = [problem(number).problem_id for number in range(0, 21, 3)]


@pytest.fixture(scope="module", params=["as written", "compacted"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts, or one of both teachers."""
    root = make_store(tmp_path_factory.mktemp("sound") / "traces", ADA[:20], ADA[20:], BOB, problems=21)
    if request.param == "compacted":
        compact(root)
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "traces"))


def parts_of(root: Path) -> list[Path]:
    return sorted((root / "parts").rglob("part-*.parquet"))


def flip(part: Path, place: int, bit: int, *, silently: bool) -> None:
    """Alters one bit; `silently`: as a failing disk does, without a new time of change."""
    stat = part.stat()
    with part.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))
    if silently:
        os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_bit_that_turned_after_indexing_gives_no_other_trace(root: Path, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(parts_of(root)), "part")
    place, bit = (
        data.draw(st.integers(0, part.stat().st_size - 1), "place"),
        data.draw(st.integers(0, 7), "bit"),
    )
    flip(part, place, bit, silently=True)
    try:
        with TraceStore(root) as store:
            for problem_id in ASKED:
                try:
                    found = store.traces(problem_id=problem_id, tokens=True)
                except StoreDamagedError as error:
                    complaint = str(error)
                else:
                    complaint = f"{part} cannot be read"
                    assert keyed(found) == {key: t for key, t in EVERYTHING.items() if key[0] == problem_id}
                assert f"{part} cannot be read" in complaint
    finally:
        flip(part, place, bit, silently=True)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_altered_part_is_left_out_found_and_made_again(
    sound: Path, tmp_path: Path, data: st.DataObject
) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "traces"))
    try:
        part = data.draw(st.sampled_from(parts_of(root)), "part")
        lost = keys_in(part)
        place = data.draw(st.integers(0, part.stat().st_size - 1), "place")
        flip(part, place, data.draw(st.integers(0, 7), "bit"), silently=False)
        rest = {key: each for key, each in EVERYTHING.items() if key not in lost}
        assert contents(root) == rest
        with TraceStore(root) as store:
            assert [broken.part for broken in store.damaged] == [str(part.relative_to(root / "parts"))]
        (finding,) = check(root).findings
        assert (finding.fault, sum(finding.traces.values())) == ("altered", len(lost))
        check(root, repair=True)
        assert check(root).findings == ()
        assert contents(root) == rest
        with StoreWriter.open(root, **JUDGE) as writer:
            assert append_lacking(writer, ADA) | append_lacking(writer, BOB) == {
                key: each for key, each in EVERYTHING.items() if key in lost
            }
        assert contents(root) == EVERYTHING
    finally:
        shutil.rmtree(root)


def test_what_is_set_aside_is_never_written_over(root: Path) -> None:
    foreign = root / "parts" / "ada" / "notes.txt"
    foreign.parent.mkdir(exist_ok=True)
    for content in ("first", "second"):
        foreign.write_text(content)
        check(root, repair=True)
    assert (root / "quarantine" / "ada" / "notes.txt").read_text() == "first"
    assert (root / "quarantine" / "ada" / "notes.txt.2").read_text() == "second"


def test_a_part_that_goes_while_it_is_checked_is_no_finding(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compacted = Path(shutil.copytree(root, root.with_name("compacted")))
    compact(compacted, part_traces=2)

    def digest(path: Path) -> str:
        if path.exists() and "compacted" not in path.parts:
            shutil.rmtree(root)
            shutil.copytree(compacted, root)
        return file_digest(path)

    monkeypatch.setattr("store.upkeep.checking.file_digest", digest)
    assert check(root).findings == ()
