"""The five tasks of configs/gallery run by their configs alone: traces, a step of training, guidance."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from precompute.imports.foreign_rows import ImportColumns, ImportForm, TeacherNames
from precompute.imports.import_traces import import_traces
from precompute.run import pipeline
from precompute.verify.verifier import Verifier
from store import TraceStore
from trainer.config import read_config
from trainer.telemetry.console import TrainReporter
from trainer.train import train

GALLERY = Path(__file__).parents[1] / "configs" / "gallery"


@pytest.mark.parametrize(
    ("task", "verifier", "verified"),
    [
        ("boxed", "math-verify", None),
        ("hashes", "numeric", None),
        # Of two teachers one is always right and one sometimes.
        ("choice", "choice", {"steps": 12}),
        ("reasoning_gym", "reasoning-gym", {"solver": 12}),
        ("own", "own.py:compute_score", {"speller": 12, "hasty": 0}),
    ],
)
def test_a_task_of_the_gallery_runs_end_to_end(
    task: str,
    verifier: str,
    verified: dict[str, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(GALLERY.parents[1])
    own = [f'store.path="{tmp_path}/traces"', f'run.dir="{tmp_path}"', "train.max_steps=1", "eval.every=0"]
    config = read_config(str(GALLERY / f"{task}.toml"), own)
    if verified is None:
        pipeline.run(config, limit=32, teachers=["totals"])
    else:
        form = ImportForm([GALLERY / f"{task}.jsonl"], ImportColumns(), TeacherNames(renames={}))
        with Verifier(config.verify) as opened:
            import_traces(form, store=config.store, verifier=opened)
    with TraceStore(tmp_path / "traces") as store:
        assert list(store.manifest.verifiers) == [verifier]
        usable = store.usable([problem.problem_id for problem in store.problems()])
    for teacher, traces in (verified or {}).items():
        assert (usable[teacher].traces if teacher in usable else 0) == traces
    config = read_config(str(GALLERY / f"{task}.toml"), [*own, "guidance.trigger=always"])
    train(config, reporter=TrainReporter())
    (file,) = tmp_path.glob("*/queries/step-000001.parquet")
    assert any(row["selected"] for row in pq.read_table(file).to_pylist())
