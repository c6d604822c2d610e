"""docs/python.md does what it says: its files, taken from the page, run from outside in the page's order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab.cli import init
from precompute.run import pipeline
from store import TraceStore
from trainer.config import read_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ampo init` writes, a store of one teacher, and the page's files."""
    folder = tmp_path_factory.mktemp("python")
    init(folder)
    for name, body in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, flags=re.DOTALL):
        (folder / name).write_text(body, encoding="utf-8")
    config = read_config(str(folder / "lab.toml"), [f"store.path={folder}/traces"])
    pipeline.run(config, teachers=["totals"], limit=64)
    return folder


def printed(folder: Path, name: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, name], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_store_is_read(folder: Path) -> None:
    lines = printed(folder, "read_store.py")
    with TraceStore(folder / "traces") as store:
        assert len(lines) == 1 + store.count(usable=True)
    assert "of 64 traces:" in lines[-1]


def test_traces_are_written_with_their_verdicts(folder: Path) -> None:
    printed(folder, "write_traces.py")
    with TraceStore(folder / "own-traces") as store:
        assert [(t.teacher, t.answer, t.verdict) for t in store.traces()] == [
            ("mine", "5", "match"),
            ("mine", "6", "mismatch"),
        ]


def test_a_student_is_trained_with_callbacks(folder: Path) -> None:
    lines = printed(folder, "train_with_callbacks.py")
    assert any(re.fullmatch(r"[12] \S+ .* -> totals", line) for line in lines)
    assert [line.split()[0] for line in lines if re.fullmatch(r"[12] \d\.\d+", line)] == ["1", "2"]
    assert lines[-1].startswith("step 2 ")


def test_a_model_is_evaluated(folder: Path) -> None:
    last = printed(folder, "evaluate.py")[-1].split()
    assert 0 <= float(last[0]) <= float(last[1]) <= 1
    assert (Path(last[2]) / "results.json").exists()
