"""What the trainer asks and what it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store_examples import make_store, problem, trace, wrong

from store.errors import StoreDamagedError, StoreForeignError, StoreMissingError, StoreVersionError
from store.reader import TraceStore

IDS = [problem(number).problem_id for number in range(4)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_store(
        tmp_path / "traces",
        [trace(0, "bob", 1, text="later"), wrong(1, "bob"), trace(3, "bob")],
        [wrong(0, "ada", 0), trace(0, "ada", 2), trace(0, "ada", 1, text="first")],
        [trace(0, "bob", 0, text="earlier")],
    )


def keys(store: TraceStore, number: int, **options: object) -> list[tuple[str, int]]:
    found = store.candidates(IDS, **options)  # type: ignore[arg-type]
    return [(candidate.teacher, candidate.sample_index) for candidate in found[IDS[number]]]


def test_candidates_are_the_verified_traces_in_a_fixed_order(root: Path) -> None:
    with TraceStore(root) as store:
        assert keys(store, 0) == [("ada", 1), ("ada", 2), ("bob", 0), ("bob", 1)]
        assert keys(store, 1) == []
        assert keys(store, 3) == [("bob", 0)]
        assert all(t.is_correct for ts in store.candidates(IDS).values() for t in ts)


def test_every_asked_problem_is_a_key_also_an_unknown_one(root: Path) -> None:
    with TraceStore(root) as store:
        assert list(store.candidates([IDS[3], "unknown", IDS[3], IDS[2]])) == [IDS[3], "unknown", IDS[2]]
        assert store.candidates([]) == {}


def test_candidates_of_chosen_teachers(root: Path) -> None:
    with TraceStore(root) as store:
        assert keys(store, 0, teachers=["ada"]) == [("ada", 1), ("ada", 2)]
        assert keys(store, 0, teachers=["eve", "bob"]) == [("bob", 0), ("bob", 1)]
        assert keys(store, 0, teachers=[]) == []


def test_all_traces_of_problems_are_the_wrong_and_the_filtered_too(tmp_path: Path) -> None:
    held = trace(0, "ada", 1, filtered="max_tokens: 9 tokens, more than 8")
    root = make_store(tmp_path / "traces", [wrong(0, "ada"), held], [trace(0, "bob"), wrong(2, "bob")])
    with TraceStore(root) as store:
        found = store.candidates(IDS[:2], teachers=["ada"], usable=False)
        assert {key: [t.sample_index for t in traces] for key, traces in found.items()} == {
            IDS[0]: [0, 1],
            IDS[1]: [],
        }
        assert [t.teacher for t in store.candidates([IDS[2]], usable=False)[IDS[2]]] == ["bob"]
        assert store.candidates([IDS[2]]) == {IDS[2]: []}


def test_tokens_come_on_request_only(root: Path) -> None:
    with TraceStore(root) as store:
        (bare,) = store.candidates([IDS[3]])[IDS[3]]
        (full,) = store.candidates([IDS[3]], tokens=True)[IDS[3]]
    assert (bare.token_ids, bare.logprobs, bare.n_tokens) == ((), (), 3)
    assert full == trace(3, "bob")
    assert bare.text == full.text


def test_more_parts_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.format.reading.OPEN_PARTS", 2)
    root = make_store(tmp_path / "traces", *[[trace(number, "ada")] for number in range(4)])
    with TraceStore(root) as store:
        for _ in range(2):
            assert [len(traces) for traces in store.candidates(IDS).values()] == [1, 1, 1, 1]


def test_many_row_groups_and_any_order(tmp_path: Path) -> None:
    batch = [trace(number, "ada", text=f"text {number}") for number in range(50)]
    root = make_store(tmp_path / "traces", batch, problems=50)
    asked = [problem(number).problem_id for number in (49, 3, 17, 0, 30)]
    with TraceStore(root) as store:
        found = store.candidates(asked)
    assert [found[problem_id][0].text for problem_id in asked] == [f"text {n}" for n in (49, 3, 17, 0, 30)]


def test_traces_filters_and_limits(root: Path) -> None:
    with TraceStore(root) as store:
        assert len(store.traces()) == 7
        assert [t.sample_index for t in store.traces(problem_id=IDS[0], teacher="ada")] == [0, 1, 2]
        assert {t.teacher for t in store.traces(verdict="mismatch")} == {"ada", "bob"}
        assert len(store.traces(limit=2)) == 2
        assert store.traces(teacher="eve") == []


def test_an_empty_store_answers(tmp_path: Path) -> None:
    with TraceStore(make_store(tmp_path / "traces", problems=0)) as store:
        assert store.candidates(IDS) == {problem_id: [] for problem_id in IDS}
        assert (store.traces(), store.problems(), store.teachers(), store.damaged) == ([], [], {}, ())


def test_a_missing_store_is_named_with_the_way_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty"):
        with pytest.raises(StoreMissingError) as error:
            TraceStore(path)
        assert str(error.value) == (
            f"no trace store at {tmp_path / path}; make one with `ampo precompute teachers`, "
            "or with `ampo store import` from existing traces"
        )


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreForeignError, match=r"thesis\.tex"):
        TraceStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(StoreForeignError, match="schema_version"):
        TraceStore(tmp_path)


def test_a_newer_store_is_refused_and_a_broken_manifest_named(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(StoreVersionError, match="schema version 99, this ampo reads 3; install"):
        TraceStore(root)
    (root / "manifest.json").write_text("{")
    with pytest.raises(StoreDamagedError, match=r"manifest\.json cannot be read"):
        TraceStore(root)
    (root / "manifest.json").write_text('{"schema_version": 3}')
    with pytest.raises(StoreDamagedError, match="is broken: 'parts'"):
        TraceStore(root)


def test_broken_small_files_are_named(root: Path) -> None:
    (root / "teachers" / "ada.json").write_text('{"name": "ada"}')
    (root / "problems.parquet").write_bytes(b"PAR1")
    with TraceStore(root) as store:
        with pytest.raises(StoreDamagedError, match=r"ada\.json cannot be read"):
            store.teachers()
        with pytest.raises(StoreDamagedError, match=r"problems\.parquet cannot be read"):
            store.problems()
