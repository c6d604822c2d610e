"""docs/extending.md does what it says: its functions and tables, taken from the page, run from outside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from precompute.config_file import load_config
from precompute.run import pipeline
from store import TraceStore
from trainer.config import Config
from trainer.telemetry.console import TrainReporter
from trainer.train import train

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
REST = """
[student]
model = "lab/models/student"
system_prompt = ""

[rollout]
num_generations = 4
max_completion_length = 160

[train]
max_steps = 1
problems_per_step = 4
mini_batch_problems = 4

[eval]
every = 0
"""
SUMS = {"12+3-4+5-2": 14, "40-5-6+9-7": 31, "71+8-9-9+5": 66, "33+4+4-8+9": 42}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """The page's tables in one config, its functions in files beside it."""
    folder = tmp_path_factory.mktemp("extending")
    for name, body in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, flags=re.DOTALL):
        (folder / name).write_text(body, encoding="utf-8")
    rows = (json.dumps({"sum": question, "total": total}) for question, total in SUMS.items())
    (folder / "sums.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tables = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    guidance = [table for table in tables if table.startswith("[guidance]")]
    merged = "[guidance]\n" + "".join(table.removeprefix("[guidance]\n") for table in guidance)
    others = [table for table in tables if table not in guidance]
    file = folder / "config.toml"
    file.write_text("\n".join([merged, *others, REST]), encoding="utf-8")
    (folder / "lab").symlink_to(ROOT / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield load_config(Config, str(file), ["run.name=own"])


def rows_of(config: Config, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(
        f"{config.run.dir}/own/{kind}/step-000001.parquet"
    ).to_pylist()
    return found


def test_a_form_an_engine_and_a_verifier_of_ones_own_fill_a_store(config: Config) -> None:
    pipeline.run(config)
    with TraceStore(config.store.path) as store:
        assert {p.question: p.answer for p in store.problems()} == {k: str(v) for k, v in SUMS.items()}
        assert list(store.manifest.verifiers) == ["my_verifiers.py:same_number"]
        assert [(t.teacher, t.text) for t in store.traces()] == [
            ("calculator", f"\\boxed{{{SUMS[problem.question]}}}")
            for trace in store.traces()
            for problem in store.problems()
            if problem.problem_id == trace.problem_id
        ]


def test_a_reward_a_selector_and_a_guided_loss_of_ones_own_train_a_student(config: Config) -> None:
    pipeline.run(config)
    train(config, reporter=TrainReporter())
    (metrics,) = map(json.loads, Path(f"{config.run.dir}/own/metrics.jsonl").read_text().splitlines())
    used = [row for row in rows_of(config, "rollouts") if row["origin"] == "teacher"]
    assert used, "the student, which stops after two operations, fails whole groups"
    for row in used:
        # 0.9 correct + 0.1 format + 0.05 * 1 / (1 + tokens)
        assert row["reward"] == pytest.approx(1.0 + 0.05 / (1 + row["n_tokens"]))
    assert metrics["rewards/brevity"] > 0
    assert metrics["guided/logprob"] < 0
    queries = rows_of(config, "queries")
    assert {row["problem_id"] for row in used} <= {row["problem_id"] for row in queries}
    assert all(row["score"] <= 0 for row in queries if row["trace_id"]), "the selector called the scorer"
