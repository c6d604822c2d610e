"""Plans for real cards: the shipped configs fit theirs, and what does not fit is told what would."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from run_examples import PROBLEMS, write_problems, write_store
from transformers import Qwen2Config
from typer.testing import CliRunner

from cli import app
from precompute.config import load_config
from store.errors import ConfigError
from trainer.config import Config, StudentConfig
from trainer.planning.estimate import ModelShape, estimate, load_model_config, shape_of
from trainer.planning.fitting import changed, proposal
from trainer.planning.hardware import CARDS, card

CONFIGS = Path(__file__).parent.parent / "configs"

QWEN = {"1.5b": (1536, 8960, 12, 2), "7b": (3584, 18944, 28, 4)}
"""Hidden and intermediate width, heads, key-value heads."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories with Qwen2.5's real shapes, a small tokenizer, and no weights."""
    found = {}
    for size, (hidden, intermediate, heads, kv_heads) in QWEN.items():
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=28,
            vocab_size=151936 if size == "1.5b" else 152064,
            tie_word_embeddings=size == "1.5b",
            max_position_embeddings=32768,
            rope_theta=1e6,
            architectures=["Qwen2ForCausalLM"],
        )
        found[size] = tmp_path_factory.mktemp(size)
        config.save_pretrained(found[size])
        tiny_tokenizer().save_pretrained(found[size])
    return found


def shape_at(path: Path) -> ModelShape:
    return shape_of(load_model_config(StudentConfig(model=str(path))))


def test_the_shapes_are_the_published_ones(models: dict[str, Path]) -> None:
    # As the model cards give them: 1.54 B (1.31 B without the embedding) and 7.61 B (6.53 B) parameters.
    small, large = shape_at(models["1.5b"]), shape_at(models["7b"])
    assert (round(small.parameters / 1e9, 2), round(small.linear / 1e9, 2)) == (1.54, 1.31)
    assert (round(large.parameters / 1e9, 2), round(large.linear / 1e9, 2)) == (7.62, 6.53)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    problems = [type(PROBLEMS[0])(question=f"{n}+{n}", answer=str(2 * n)) for n in range(130)]
    write_problems(path / "train.jsonl", problems)
    write_store(path / "traces")
    return path


@pytest.mark.parametrize(
    ("name", "size", "gpu", "processes"),
    [
        ("qwen2.5-1.5b-full-80gb", "1.5b", "A100-80GB", 1),
        ("qwen2.5-7b-qlora-24gb", "7b", "RTX4090-24GB", 1),
        ("qwen2.5-7b-lora-80gb", "7b", "A100-80GB", 1),
        ("qwen2.5-7b-full-node", "7b", "A100-80GB", 4),
        ("qwen2.5-7b-full-node", "7b", "H100-80GB", 8),
    ],
)
def test_a_shipped_config_fits_the_card_it_is_for(
    name: str, size: str, gpu: str, processes: int, models: dict[str, Path], data: Path
) -> None:
    overrides = {
        "student.model": models[size],
        "problems.train": data / "train.jsonl",
        "problems.eval": data / "train.jsonl",
        "store.path": data / "traces",
    }
    arguments = ["train", "--dry-run", "--config", str(CONFIGS / f"{name}.toml")]
    arguments += ["--gpu", gpu, "--processes", str(processes)]
    for key, value in overrides.items():
        arguments += ["--set", f'{key}="{value}"']
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"fits {gpu}" in done.output
    assert "does not fit" not in done.output
    # In float32, all 7.62 billion weights: 4 x 7,615.6 M / 2^20.
    assert ("host memory to load: 29,051" in done.output) == (processes > 1)
    peak, room = (
        float(re.search(rf"{row} +│ +([\d,.]+)", done.output).group(1).replace(",", ""))  # type: ignore[union-attr]
        for row in (r"do not overlap\)", "tensors can have")
    )
    # It fits, and the card is not left half empty by a config that could go faster.
    assert 0.4 * room < peak <= room


def test_the_node_config_is_the_papers_run_but_for_what_changes_no_result() -> None:
    paper, node = Config().model_dump(), load_config(Config, str(CONFIGS / "qwen2.5-7b-full-node.toml"), [])
    differing = {
        f"{section}.{key}"
        for section in ("student", "rollout", "guidance", "train", "warmup", "eval")
        for key, value in getattr(node, section).model_dump().items()
        if value != paper[section][key]
    }
    assert differing == {
        "student.model",
        "student.gradient_checkpointing",
        "rollout.batch_size",
        "train.max_tokens_per_microbatch",
    }
    assert len(node.teachers) == 4


def plan(models: dict[str, Path], gpu: str, processes: int = 1, **changes: Any) -> Any:
    config = changed(Config(), {key.replace("__", "."): value for key, value in changes.items()})
    return proposal(config, shape_at(models["7b"]), card(gpu), bytes_per_value=2, processes=processes)


def test_a_7b_model_on_a_small_card_is_told_to_take_adapters_and_four_bits(models: dict[str, Path]) -> None:
    # 15 GB in bf16 and the logits fit 24 GB, by a hair; of 12 GB nothing but four bits is left.
    found = plan(models, "RTX4090-24GB")
    assert found.changes["student.use_peft"] is True
    assert "student.load_in_4bit" not in found.changes
    tiny = dataclasses.replace(card("RTX4090-24GB"), memory=12 * 10**9)
    smaller = proposal(Config(), shape_at(models["7b"]), tiny, bytes_per_value=2)
    assert smaller is not None
    assert smaller.changes["student.load_in_4bit"] is True
    again = estimate(changed(Config(), smaller.changes), shape_at(models["7b"]), tiny, bytes_per_value=2)
    assert again == smaller.estimate
    assert again.peak <= 12 * 10**9


@pytest.mark.parametrize("gpu", ["H100-80GB", "RTX4090-24GB"])
def test_no_proposed_change_is_superfluous(gpu: str, models: dict[str, Path]) -> None:
    found, room = plan(models, gpu), card(gpu)
    assert found.changes
    for dotted in found.changes:
        fewer = changed(Config(), {key: value for key, value in found.changes.items() if key != dotted})
        needed = estimate(fewer, shape_at(models["7b"]), room, bytes_per_value=2)
        assert needed.peak > room.memory, dotted  # type: ignore[operator]


def test_what_fits_needs_no_change(models: dict[str, Path]) -> None:
    shape = shape_at(models["1.5b"])
    config = load_config(Config, str(CONFIGS / "qwen2.5-1.5b-full-80gb.toml"), [])
    found = proposal(config, shape, card("B200-180GB"), bytes_per_value=2)
    assert found is not None
    assert (found.changes, found.processes) == ({}, 1)


def test_many_processes_are_only_told_what_works_in_many(models: dict[str, Path]) -> None:
    found = plan(models, "A100-80GB", processes=4)
    assert found.changes
    assert "student.load_in_4bit" not in found.changes
    assert "train.optim" not in found.changes


def test_a_model_that_no_setting_makes_fit_gets_no_proposal(models: dict[str, Path]) -> None:
    # 100 times the layers of a 7B model do not fit 24 GB even in four bits.
    shape = shape_at(models["7b"])
    huge = dataclasses.replace(shape, parameters=100 * shape.parameters, linear=100 * shape.linear)
    assert proposal(Config(), huge, card("RTX4090-24GB"), bytes_per_value=2) is None


def test_an_unknown_card_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'H100' is not known: .*A100-80GB.*; did you mean H100-80GB\?"):
        card("H100")


def test_every_card_can_be_planned_for(models: dict[str, Path]) -> None:
    seconds = {}
    for name in CARDS:
        found = estimate(Config(), shape_at(models["1.5b"]), card(name), bytes_per_value=2)
        seconds[name] = found.seconds
    assert min(seconds, key=seconds.__getitem__) == "B200-180GB"
    assert seconds["H200-141GB"] < seconds["H100-80GB"] < seconds["A100-80GB"] < seconds["RTX3090-24GB"]


def test_planning_options_go_with_a_dry_run_alone() -> None:
    done = CliRunner().invoke(app, ["train", "--gpu", "H100-80GB"], catch_exceptions=True)
    assert "--dry-run alone" in str(done.exception)
