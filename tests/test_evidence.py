"""bench.evidence: every experiment's arms load, and the figures of its page by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bench.evidence import EXPERIMENTS, Job, published
from bench.evidence_page import MEASURES, difference
from bench.measure import bootstrap

ROOT = Path(__file__).parent.parent


def run(curve: list[float], tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"curve": curve, "tokens": tokens, "eval_steps": [0, 5, 10, 15], "heldout": curve[-1], **more}


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_arm_of_an_experiment_loads_and_has_a_hypothesis_and_a_metric(file: Path) -> None:
    experiment = tomllib.loads(file.read_text())
    assert all(experiment[name] for name in ("title", "hypothesis", "measured"))
    assert experiment["seeds"] >= 5
    named = {*experiment["columns"], *experiment["metrics"], *experiment.get("costs", ())}
    assert named <= set(MEASURES)
    references = {experiment["reference"], *experiment.get("references", {}).values()}
    assert references <= set(experiment["arms"])
    for layers in experiment["arms"].values():
        config = Job(layers=tuple(layers), seed=3, steps=experiment["steps"]).config()
        assert (config.train.seed, config.train.loss_type) == (3, "dr_grpo")


def test_measures_are_those_of_the_page() -> None:
    one = run([0.1, 0.2, 0.4, 0.6], [0, 100, 300, 700], many=[0, 2], many_samples=4)
    other = run([0.1, 0.1, 0.2, 0.2], [0, 100, 200, 400])
    # The area leaves out step 0: (0.2 + 0.4 + 0.6) / 3.
    assert MEASURES["area"][1](one, other) == pytest.approx(0.4)
    # At 400 tokens: a quarter of the way from (300, 0.4) to (700, 0.6).
    assert MEASURES["at_tokens"][1](one, other) == pytest.approx(0.45)
    assert MEASURES["at_tokens"][1](other, one) is None
    # pass@8 needs eight samples; with k = 2 of 4 samples: 1 - C(4, 2) / C(4, 2) = 0, 1 - C(2, 2) / 6 = 5/6.
    from bench.evidence_page import pass_at

    assert pass_at(2)(one, other) == pytest.approx(5 / 12)


def test_a_difference_is_paired_over_seeds_and_bold_where_five_exclude_zero() -> None:
    def runs(values: list[float]) -> dict[str, Any]:
        flat = {"tokens": [0], "eval_steps": [0], "curve": [0.0]}
        return {str(seed): flat | {"heldout": value} for seed, value in enumerate(values)}

    arms = {
        "base": runs([0.1, 0.1, 0.1, 0.5, 0.5]),
        "better": runs([0.3, 0.3, 0.3, 0.7, 0.7, 0.0]),
        "level": runs([0.0, 0.2, 0.0, 0.6, 0.5]),
        "few": runs([0.3, 0.4]),
    }
    experiment = {"runs": arms, "reference": "base"}
    # 0.2 on each of the five seeds that both have; the sixth has no partner.
    assert difference(experiment, "better", "heldout") == "**+0.20** [+0.20 +0.20]"
    # -0.1, 0.1, -0.1, 0.1 and 0: both signs are in reach of resampling.
    assert difference(experiment, "level", "heldout").startswith("+0.00 [-")
    # 0.2 and 0.3: above zero, but of two seeds only.
    assert difference(experiment, "few", "heldout") == "+0.25 [+0.20 +0.30]"
    assert difference(experiment, "base", "heldout") == ""
    assert bootstrap([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_kept_runs_are_those_that_have_all_that_is_asked_for(tmp_path: Path) -> None:
    jobs = {
        "curve": Job(layers=("guidance.k=1",), seed=0, steps=5, final=False),
        "final": Job(layers=("guidance.k=2",), seed=0, steps=5),
        "short": Job(layers=("guidance.k=3",), seed=0, steps=5),  # was measured without the sets at the end
        "many": Job(layers=("guidance.k=4",), seed=0, steps=5, many=True),  # ...and without 64 samples
        "absent": Job(layers=("guidance.k=4",), seed=1, steps=5),
    }
    whole = {"curve": [0.5], "heldout": 0.5}
    runs = {"curve": {"curve": [0.5]}, "final": whole, "short": {"curve": [0.5]}, "many": whole}
    file = tmp_path / "evidence.json"
    file.write_text(json.dumps({"runs": {jobs[name].key: run for name, run in runs.items()}}))
    assert set(published(list(jobs.values()), file)) == {jobs["curve"].key, jobs["final"].key}


@pytest.mark.slow
def test_the_quick_form_trains_compares_and_writes_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.evidence", "configs/evidence/1-methods.toml", "--seeds", "1"]
    command += ["--arms", "grpo", "ampo", "hpt", "sft", "--steps", "8", "--out", str(tmp_path / "evidence")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {"bench": "evidence", "runs": 4, "steps": 8}
    page = (tmp_path / "evidence.md").read_text()
    assert "| ampo |" in page
    assert (tmp_path / "evidence-1-methods.png").stat().st_size > 10_000
