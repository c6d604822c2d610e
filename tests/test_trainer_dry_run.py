"""A dry run tells the plan whatever is missing, and every single thing that a run would miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_examples import config_of, make_world
from transformers import AutoConfig
from typer.testing import CliRunner

from cli import app
from store.errors import StoreError, UserError
from trainer.config import Config
from trainer.planning.dry_run import dry_run_of
from trainer.planning.estimate import estimate, shape_of
from trainer.planning.fitting import changed
from trainer.planning.hardware import card
from trainer.planning.known_shapes import known_config

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def told(config: Config) -> tuple[str, list[str]]:
    """What is printed, and the errors."""
    found = dry_run_of(config, gpu="L4-24GB")
    console = Console(width=150)
    with console.capture() as printed:
        console.print(found.report)
    return printed.get(), [str(error) for error in found.missing]


def test_without_anything_there_a_shipped_config_is_planned_and_all_that_is_missing_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file = CONFIGS / "qwen2.5-7b-qlora-24gb.toml"
    options = ["--config", str(file), "--dry-run", "--gpu", "RTX4090-24GB"]
    done = CliRunner().invoke(app, ["train", *options])
    assert done.exit_code == 2
    assert "one step of 7,615,616,512 parameters" in done.stdout
    assert "fits RTX4090-24GB" in done.stdout
    lines = done.stderr.splitlines()
    data, store = tmp_path / "data", tmp_path / "traces"
    assert lines[0] == f"error: problems.train: no problem file at {data / 'train.parquet'}"
    assert lines[1] == f"error: problems.eval: no problem file at {data / 'valid.parquet'}"
    assert lines[2].startswith(
        f"error: no trace store at {store}; make one with `ampo precompute teachers --config {file}`, or "
        "with `ampo store import`"
    )
    assert lines[3].startswith(
        "error: student.model = 'Qwen/Qwen2.5-7B-Instruct': there is no such directory"
    )
    assert len(lines) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_run_names_the_config_in_what_makes_a_store(world: Path, model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(f'[problems]\ntrain = "{world}/train.jsonl"\n[student]\nmodel = "{model_dir}"\n')
    gone = ["--set", f"store.path={tmp_path}/gone", "--set", f"run.dir={tmp_path}/runs"]
    done = CliRunner().invoke(app, ["train", "--config", str(file), *gone])
    assert isinstance(done.exception, UserError)
    assert f"`ampo precompute teachers --config {file}`" in str(done.exception)


def test_a_student_of_unknown_shape_gets_no_plan(world: Path) -> None:
    printed, missing = told(config_of(world, world / "gone"))
    assert "no plan of memory and time" in printed
    assert "12 training problems" in printed
    assert len(missing) == 1


@pytest.mark.parametrize(
    ("size", "parameters", "without_embeddings"),
    # As the model cards give them, in billions.
    [("0.5B", 0.49, 0.36), ("1.5B", 1.54, 1.31), ("3B", 3.09, 2.77), ("7B", 7.61, 6.53), ("14B", 14.7, 13.1),
     ("32B", 32.5, 31.0)],
)  # fmt: skip
def test_known_shapes_are_the_published_ones(size: str, parameters: float, without_embeddings: float) -> None:
    shape = shape_of(known_config(f"Qwen/Qwen2.5-{size}-Instruct"))
    assert shape.parameters / 1e9 == pytest.approx(parameters, rel=0.01)
    assert shape.linear / 1e9 == pytest.approx(without_embeddings, rel=0.02)
    assert known_config(f"Qwen/Qwen3-{size}") is None


def test_a_supervised_step_takes_its_share_of_an_updates_time(model_dir: Path) -> None:
    # The update: 128 x 8 sequences, 6 passes and, in the second of its two optimizer steps, old
    # log-probabilities, 2 more: 7 on the average. A supervised step: 64 sequences, 6.
    shape = shape_of(AutoConfig.from_pretrained(model_dir))
    found = estimate(Config(), shape, card("L4-24GB"), bytes_per_value=2)
    assert found.supervised_seconds == pytest.approx(found.update_seconds * 64 * 6 / (1024 * 7))


def hours(printed: str) -> float:
    return float(printed.split(" h in all")[0].split()[-1])


def test_the_time_in_all_counts_the_warm_up(world: Path, model_dir: Path) -> None:
    sizes: dict[str, Any] = {"warmup__traces_per_step": 16, "train__max_steps": 0}
    few, missing = told(config_of(world, model_dir, warmup__sft_steps=10**6, **sizes))
    many, _ = told(config_of(world, model_dir, warmup__sft_steps=10**7, **sizes))
    assert missing == []
    assert "s a supervised step" in few
    assert hours(many) == pytest.approx(10 * hours(few), rel=0.1)
    assert "supervised step" not in told(config_of(world, model_dir))[0]


def test_too_few_lessons_for_a_supervised_step_are_told_by_a_dry_run(world: Path, model_dir: Path) -> None:
    # 8 problems with a trace of each of two teachers.
    config = config_of(world, model_dir, warmup__sft_steps=1, warmup__traces_per_step=17)
    printed, missing = told(config)
    assert len(missing) == 1
    assert missing[0].startswith("warmup.traces_per_step = 17, but the store has 16 traces")
    assert "peak" in printed
    assert isinstance(dry_run_of(config, gpu="L4-24GB").missing[0], StoreError)
    assert told(changed(config, {"warmup.traces_per_step": 16}))[1] == []


def test_a_prompt_with_brackets_is_shown_as_it_is(tmp_path: Path, model_dir: Path) -> None:
    world = make_world(tmp_path)
    (world / "train.jsonl").write_text('{"question": "[b]1[/b]+1", "answer": "2"}\n' * 4)
    printed, _ = told(config_of(world, model_dir, train__problems_per_step=1, train__mini_batch_problems=1))
    assert "<user>[b]1[/b]+1<assistant>" in printed


def test_a_key_that_nothing_reads_and_a_k_that_no_group_has_room_for_are_warned_of(
    world: Path, model_dir: Path
) -> None:
    changes = {"rollout__vllm_gpu_memory_utilization": 0.3, "guidance__k": 4, "rollout__num_generations": 4}
    printed = told(config_of(world, model_dir, **changes))[0]
    assert 'rollout.vllm_gpu_memory_utilization = 0.3 is not read: rollout.engine = "transformers"' in printed
    assert "guidance.k = 4: one sample" in printed
    assert "rollout.num_generations - 1 = 3 traces" in printed
    assert "warning" not in told(config_of(world, model_dir, guidance__k=3))[0]
    assert "warning" not in told(config_of(world, model_dir, guidance__k=4, guidance__trigger="never"))[0]
