"""One optimizer step, by one process and by two: the same loss, the same gradient, to float noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_student, tiny_model
from process_steps import STUDENTS, cases, read, synced, take, unusable
from processes import run_processes

from precompute.config_file import load_config
from store.errors import ConfigError
from trainer.config import Config, StudentConfig
from trainer.parallel.fsdp import check_shardable
from trainer.parallel.world import ALONE, World

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""A student large enough to measure."""


@pytest.fixture(scope="module")
def by_two(model_dir: Path, gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of two ranks by case, and their stderr."""
    path = tmp_path_factory.mktemp("steps")
    out, wide = path / "found.pt", save_student(path / "wide", **WIDE)
    with pytest.MonkeyPatch.context() as environment:
        # Freed memory is returned at once, so that resident memory is what is held.
        environment.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
        done = run_processes(2, "tests/process_steps.py", str(model_dir), str(gemma_dir), str(wide), str(out))
    assert out.exists(), done.stderr
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return {**found, "returncode": done.returncode, "stderr": done.stderr}


@pytest.mark.parametrize("name", cases())
def test_two_processes_take_the_optimizer_step_of_one(
    name: str, by_two: dict[str, Any], model_dir: Path
) -> None:
    one, two = take(cases()[name], str(model_dir), ALONE), by_two[name]
    assert one["gradient"].norm() > 1e-3
    difference = (two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()
    if name.startswith("bfloat16"):
        assert difference.item() < 2e-2
        return
    assert difference.item() < 1e-5
    for ours, theirs in zip(one["reports"], two["reports"], strict=True):
        assert theirs.keys() == ours.keys()
        for key, value in ours.items():  # None where no token is the student's own
            assert theirs[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), key


def test_a_non_finite_loss_in_one_rank_is_the_same_error_in_all(
    by_two: dict[str, Any], model_dir: Path
) -> None:
    assert by_two["unusable"] == [unusable(str(model_dir), ALONE)] * 2
    assert "not taken" in by_two["unusable"][0]


@pytest.mark.parametrize(
    ("name", "student"), [("gemma", {}), ("gemma lora", {"use_peft": True, "lora_r": 4})]
)
def test_a_student_that_rank_0_has_read_is_the_same_in_all_ranks(
    name: str, student: dict[str, Any], by_two: dict[str, Any], gemma_dir: Path
) -> None:
    one = read(str(gemma_dir), ALONE, **student)
    assert "model.embed_tokens.embed_scale" in one
    for theirs in by_two[name]:
        assert theirs.keys() == one.keys()
        assert all(theirs[key].equal(one[key]) for key in one)


def test_no_rank_but_0_ever_holds_an_unsharded_student(by_two: dict[str, Any]) -> None:
    size = 4 * tiny_model(**WIDE).num_parameters()
    first, second = by_two["memory"]
    assert first["stays"] < 0.7 * size
    # Half of it stays, two layers of 12 while they compute; loading all of it first takes 1.6 times its size.
    assert second["peak"] < 0.95 * size


def test_an_error_of_one_rank_alone_is_printed_once_and_ends_the_others(by_two: dict[str, Any]) -> None:
    assert by_two["returncode"] != 0
    assert by_two["stderr"].count("StoreError: rank 1 alone has seen it") == 1
    assert "RuntimeError" not in by_two["stderr"]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_sampler_gets_from_two_processes_what_it_gets_from_one(
    name: str, by_two: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    student = StudentConfig(model=str(model_dir), device="cpu", **STUDENTS[name])
    one = synced(student, tmp_path, ALONE)
    for theirs in by_two[f"synced {name}"]:
        assert theirs.keys() == one.keys()
        assert all(theirs[key].dtype == one[key].dtype and theirs[key].equal(one[key]) for key in one)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["student.use_peft=true", "student.load_in_4bit=true"], "student.load_in_4bit"),
        (["train.optim=paged_adamw_8bit"], r'train.optim = "paged_adamw_8bit" .* set it to "adamw"'),
    ],
)
def test_settings_for_one_process_only_are_refused_by_name(changes: list[str], key: str) -> None:
    config = load_config(Config, None, changes)
    check_shardable(config, ALONE)
    with pytest.raises(ConfigError, match=key):
        check_shardable(config, World(rank=1, size=4))
