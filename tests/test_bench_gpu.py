"""bench/gpu.sh and its parts, in small: what runs on a GPU has to work at the first try."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench.gpu import FIGURES, METRICS, Task, forward_flops, numbers, steps_of
from bench.head import Task as HeadTask
from bench.head import errors
from bench.train_step import Size, model_of

ROOT = Path(__file__).parent.parent


def test_flops_of_a_pass_by_hand() -> None:
    # One layer of width 4, one head, an MLP of 8: 2 x 16 (query, output) + 2 x 16 (key, value) + 3 x 32
    # = 160 weights; the head has 151,936 x 4. Two FLOPs a weight; ten tokens, three of them targets.
    size = Size(problems=1, samples=1, max_tokens=1, layers=1, hidden=4, mlp=8, heads=1)
    assert forward_flops(size, 10, 3) == 2 * (160 * 10 + 151_936 * 4 * 3)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("variant", ["all weights, AdamW", "QLoRA, paged 8-bit AdamW, checkpointing"])
def test_a_step_is_measured_on_a_random_model(variant: str, tmp_path: Path) -> None:
    row = steps_of(Task(variant=variant, size="small", model=model_of("small", tmp_path), small=True))
    assert row.keys() == METRICS.keys()
    assert all(row[name] > 0 for name in ("seconds", "sampled/s", "trained/s", "update MiB"))
    assert row["log p off"] < 1e-3  # sampler and trainer compute the same, in float32
    assert all(figure(row) for name, figure in FIGURES.items() if name != "MFU")


def test_bfloat16_is_near_float32_and_not_equal() -> None:
    found = numbers(small=True)
    assert 0 < found["log p, mean difference"] < 0.05
    assert 0.99 < found["gradient, cosine"] < 1.000001


@pytest.mark.parametrize("entropy", ["no", "yes"])
@pytest.mark.parametrize("way", ["token chunks", "ampo"])
def test_both_ways_through_the_head_are_exact(way: str, entropy: str) -> None:
    task = HeadTask(way=way, tokens=8, hidden=16, vocabulary=500, head="trained", entropy=entropy, repeats=1)
    of_hidden, of_head = errors(task)
    assert of_hidden < 1e-5
    assert of_head is not None
    assert of_head < 1e-5


@pytest.mark.slow
def test_the_script_runs_in_small(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path), "LIMIT": "900"}
    script = [str(ROOT / "bench" / "gpu.sh"), "--small"]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert found.keys() == {"card", "head", "numbers", "steps", "trl", "comprehension"}
    assert not found["steps"]["failed"]
