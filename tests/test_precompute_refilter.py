"""New filters for a store: from its texts, all or nothing, without sampling."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from precompute_examples import GOOD, POOR, lab_config, traces_of

from precompute.config import FiltersConfig, PrecomputeConfig
from precompute.run import pipeline, refilter
from precompute.run.refilter import filter_settings
from store.errors import RecipeChangedError, StoreError
from store.reader import TraceStore
from store.upkeep import compaction
from store.upkeep.compaction import compact

SHORT = {"max_tokens": 45, "format": True}


def config(store: Path, **filters: Any) -> PrecomputeConfig:
    return lab_config(store, GOOD | {"samples": 2}, POOR | {"samples": 2}, filters=filters)


@pytest.fixture(scope="module")
def unfiltered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 problems, two teachers, two samples each, no filter."""
    path = tmp_path_factory.mktemp("unfiltered") / "traces"
    pipeline.run(config(path), limit=12)
    return path


@pytest.fixture
def store(unfiltered: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unfiltered, tmp_path / "traces")


def reasons(store: Path) -> dict[str, str | None]:
    traces = traces_of(store)
    found = {trace.trace_id: trace.filtered for trace in traces}
    assert len(found) == len(traces)
    return found


def test_a_refiltered_store_equals_one_that_was_sampled_with_the_filters(store: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    pipeline.run(config(drawn, **SHORT), limit=12)
    before = traces_of(store)
    with pytest.raises(
        RecipeChangedError, match=r": filters\.format False -> True; filters\.max_tokens None -> 45; "
    ):
        pipeline.run(config(store, **SHORT), limit=12)
    reports = refilter.refilter(store, FiltersConfig(**SHORT))
    assert reasons(store) == reasons(drawn)
    held = sum(trace.is_correct and trace.filtered is not None for trace in traces_of(store))
    assert sum(report.filtered_now for report in reports) == held > 0
    assert [(report.traces, report.filtered_before) for report in reports] == [(24, 0), (24, 0)]
    # The run under these filters has nothing left to do; the one under the old ones is refused.
    assert [t.new_samples for t in pipeline.run(config(store, **SHORT), limit=12).teachers] == [0, 0]
    with pytest.raises(
        RecipeChangedError, match=r": filters\.format True -> False; filters\.max_tokens 45 -> None; "
    ):
        pipeline.plan(config(store), limit=12)
    # And back: nothing but the reasons ever changed.
    refilter.refilter(store, FiltersConfig())
    assert traces_of(store) == before


def test_one_teacher_alone_and_within_a_compacted_part(store: Path) -> None:
    compact(store)
    refilter.refilter(store, FiltersConfig(**SHORT), teachers=["totals"])
    assert {trace.teacher for trace in traces_of(store) if trace.filtered} == {"totals"}
    with TraceStore(store) as opened:
        settings = {name: dict(record.filters) for name, record in opened.teachers().items()}
    assert settings == {"totals": filter_settings(FiltersConfig(**SHORT)), "student": {}}
    with pytest.raises(StoreError, match=r"no teacher 'totls' in .*; its teachers: student, totals"):
        refilter.refilter(store, FiltersConfig(), teachers=["totls"])


@pytest.mark.parametrize(
    ("where", "what"), [(compaction, "change_parts"), (Path, "unlink"), (compaction, "refresh_index")]
)
def test_stopped_half_way_it_loses_nothing_and_goes_on(
    store: Path, where: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = traces_of(store)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(where, what, stop)
        with pytest.raises(KeyboardInterrupt):
            refilter.refilter(store, FiltersConfig(**SHORT))
    assert len(reasons(store)) == len(before)
    with pytest.raises(RecipeChangedError):
        pipeline.run(config(store, **SHORT), limit=12)
    # Another filter than that of the call that was stopped: nothing of the other may be left.
    refilter.refilter(store, FiltersConfig(min_tokens=40))
    for trace in traces_of(store):
        said = f"min_tokens: {trace.n_tokens} tokens, fewer than 40"
        assert trace.filtered == (said if trace.n_tokens < 40 else None)


def test_a_full_disk_is_one_line_and_leaves_the_store_as_it_was(store: Path) -> None:
    before, files = traces_of(store), set(store.rglob("part-*.parquet"))
    largest = max(path.stat().st_size for path in files)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The largest part alone is too large, so some were written before.
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        with pytest.raises(StoreError, match=r"^cannot write .*\.parquet: File too large$"):
            refilter.refilter(store, FiltersConfig(min_tokens=100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(store.rglob("part-*.parquet")) == files
    assert traces_of(store) == before


def test_where_nothing_changes_no_part_is_touched(store: Path) -> None:
    parts = {path: path.stat().st_mtime_ns for path in store.rglob("*.parquet")}
    refilter.refilter(store, FiltersConfig(max_tokens=121))
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.parquet")} == parts
    assert pipeline.plan(config(store, max_tokens=121), limit=12).teachers[0].samples_left == 0


def test_filters_that_are_all_off_are_no_settings() -> None:
    assert filter_settings(FiltersConfig(repetition_ngram=7)) == {}
    assert filter_settings(FiltersConfig(scripts=("latin",)))["max_other_letters"] == 0.05
