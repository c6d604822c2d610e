"""One optimizer step, by one process and by two: the same loss, the same gradient, to float noise."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_gemma, tiny_model, tiny_tokenizer
from process_steps import STUDENTS, brought, cases, read, take, unusable
from processes import ROOT, run_processes

from precompute.config_file import load_config
from store.errors import ConfigError, EngineError
from trainer.config import Config, StudentConfig
from trainer.parallel.fsdp import check_shardable
from trainer.parallel.world import ALONE, World
from trainer.student.load import load_policy


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tied weights, and of buffers that stand in no file."""
    path = tmp_path_factory.mktemp("gemma")
    tiny_gemma().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def by_two(model_dir: Path, gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found, by case."""
    out = tmp_path_factory.mktemp("steps") / "found.pt"
    done = run_processes(2, "tests/process_steps.py", str(model_dir), str(gemma_dir), str(out))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


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
        assert theirs.loss == pytest.approx(ours.loss, rel=1e-4, abs=1e-6)
        assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
        assert theirs.tokens == ours.tokens
        # Unknown (None) to both where no token is the student's own.
        for figure in ("entropy", "kl", "clip_low", "clip_high"):
            one_says, two_say = getattr(ours, figure), getattr(theirs, figure)
            assert (one_says is None) == (two_say is None)
            assert one_says is None or two_say == pytest.approx(one_says, rel=1e-4, abs=1e-6)


def test_a_loss_that_is_no_number_in_one_process_is_said_by_all(
    by_two: dict[str, Any], model_dir: Path
) -> None:
    assert by_two["unusable"] == [unusable(str(model_dir), ALONE)] * 2
    assert "not taken" in by_two["unusable"][0]


@pytest.mark.parametrize(
    ("name", "student"), [("gemma", {}), ("gemma lora", {"use_peft": True, "lora_r": 4})]
)
def test_a_student_that_one_process_has_read_is_the_same_in_all(
    name: str, student: dict[str, Any], by_two: dict[str, Any], gemma_dir: Path
) -> None:
    one = read(str(gemma_dir), ALONE, **student)
    assert "model.embed_tokens.embed_scale" in one
    for theirs in by_two[name]:
        assert theirs.keys() == one.keys()
        assert all(theirs[key].equal(one[key]) for key in one)


def test_what_makes_a_student_without_weights_comes_with_every_install(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    with pytest.raises(EngineError, match="requires `accelerate`"):
        load_policy(StudentConfig(model=str(model_dir)), temperature=1.0, initial_device=torch.device("meta"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(each.startswith("accelerate") for each in project["dependencies"])


def test_no_process_but_the_first_ever_holds_a_whole_student_to_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that what is freed is given back, and what is resident is what is held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = tiny_model(num_key_value_heads=8, **wide)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "took.json"
    done = run_processes(2, "tests/process_memory.py", str(tmp_path / "model"), str(out))
    assert done.returncode == 0, done.stderr
    size = 4 * model.num_parameters()
    first, second = json.loads(out.read_text())
    assert first["stays"] < 0.7 * size
    # Half of it for good, two layers of 12 while they compute; who loads all of it first takes 1.6 times all.
    assert second["peak"] < 0.95 * size


@pytest.mark.parametrize("name", STUDENTS)
def test_a_sampler_gets_from_two_processes_what_it_gets_from_one(
    name: str, by_two: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    student = StudentConfig(model=str(model_dir), device="cpu", **STUDENTS[name])
    one = brought(student, tmp_path, ALONE)
    for theirs in by_two[f"brought {name}"]:
        assert theirs.keys() == one.keys()
        assert all(theirs[key].dtype == one[key].dtype and theirs[key].equal(one[key]) for key in one)
    assert not list(tmp_path.iterdir())


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
