"""A dry run: every missing thing is named, and the memory plan is what a step allocates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from memory_watch import MemoryWatch
from rich.console import Console
from run_examples import config_of, make_world, updater_of, write_problems, write_store
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from cli import app
from precompute.config_file import load_config
from store.errors import ConfigError
from store.records import Problem
from trainer.config import Config, StudentConfig, TrainConfig
from trainer.planning import (
    MemoryPlan,
    card_memory,
    dry_run,
    plan_memory,
    read_student,
)
from trainer.student.batches import TrainSequence
from trainer.student.load import load_policy

CONFIGS = Path(__file__).parent.parent / "configs"
QWEN = {"1.5b": (1536, 8960, 12, 2), "7b": (3584, 18944, 28, 4)}
"""Hidden and intermediate width, heads, key-value heads."""
LAYERS, HIDDEN, MLP, KV, VOCABULARY = 24, 1024, 4096, 128, 100_000
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * MLP)
"""Parameters in linear layers: query and output, key and value, and the MLP's three."""
WIDTHS = LAYERS * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KV) + 3 * (HIDDEN + MLP))
"""Inputs plus outputs of them."""


def on_meta(**changes: int) -> Any:
    """A model without memory for its weights."""
    sizes = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
    }
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**sizes | changes))


MODEL = on_meta()
PARAMETERS = MODEL.num_parameters()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


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
            architectures=["Qwen2ForCausalLM"],
        )
        found[size] = tmp_path_factory.mktemp(size)
        config.save_pretrained(found[size])
        tiny_tokenizer().save_pretrained(found[size])
    return found


def printed(config: Config, gpu: str = "L4-24GB") -> tuple[str, list[str]]:
    """The report as text, and the errors."""
    report, missing = dry_run(config, gpu=gpu)
    console = Console(width=150)
    with console.capture() as capture:
        console.print(report)
    return capture.get(), [str(error) for error in missing]


def planned(
    model: Any, *, width: int = 2, processes: int = 1, card_bytes: int = 0, **changes: Any
) -> MemoryPlan:
    """`section__key=value` over 2 problems of 3 samples, prompts of 10 tokens and responses of 90."""
    sections: dict[str, dict[str, Any]] = {
        "rollout": {"num_generations": 3, "max_prompt_length": 10, "max_completion_length": 90},
        "train": {"problems_per_step": 2, "mini_batch_problems": 1, "max_tokens_per_microbatch": 1000},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    config = Config.model_validate(sections)
    return plan_memory(config, model, width=width, processes=processes, card_bytes=card_bytes)


def test_memory_that_depends_on_the_parameters_alone() -> None:
    update = planned(MODEL, width=4)["update"]
    # float32 weights and gradients: 4 bytes each. AdamW: two float32 values per weight.
    found = update["weights"], update["optimizer"], update["gradients"]
    assert found == (4 * PARAMETERS, 8 * PARAMETERS, 4 * PARAMETERS)
    # Autocast keeps a copy of all weights in 16 bits.
    assert planned(MODEL)["update"]["weights"] == 6 * PARAMETERS
    assert planned(MODEL, train__beta=0.1)["update"]["reference"] == 4 * PARAMETERS
    # In 8 bits 2 bytes per weight; none that has to stay where pages can move.
    assert planned(MODEL, train__optim="adamw_8bit")["update"]["optimizer"] == 2 * PARAMETERS
    assert planned(MODEL, train__optim="paged_adamw_8bit")["update"]["optimizer"] == 0


def test_adapters_and_four_bits() -> None:
    # Rank 16 of each input and output, in float32; frozen weights of 2 bytes.
    lora = planned(MODEL, student__use_peft=True)["sampling"]
    assert lora["weights"] == 2 * PARAMETERS + 4 * 16 * WIDTHS
    assert lora["optimizer"] == 8 * 16 * WIDTHS
    # The linear layers in 4.127 bits.
    four = planned(MODEL, student__use_peft=True, student__load_in_4bit=True)["sampling"]
    expected = LINEAR * 4.127 / 8 + 2 * (PARAMETERS - LINEAR) + 4 * 16 * WIDTHS
    assert four["weights"] == pytest.approx(expected, abs=1)


def test_the_kv_cache_by_hand() -> None:
    model = on_meta(num_hidden_layers=2, num_attention_heads=32)
    # 2 problems x 3 samples = 6 rows of 10 + 90 tokens; keys and values, 2 layers of 32 values of 4 bytes:
    # 6 * 100 * 2 * 2 * 32 * 4 = 307,200. At most batch_size rows at once: 4 of the 6.
    assert planned(model)["sampling"]["KV cache"] == 307_200
    assert planned(model, rollout__batch_size=4)["sampling"]["KV cache"] == 204_800


def test_activations_by_hand() -> None:
    # A layer keeps 34 bytes per hidden unit and, in 16 bits, four of the MLP's width, a key and a value:
    # 34 * 1024 + 2 * (4 * 4096 + 2 * 128) = 68,096 per token; 1,000 tokens, 24 layers.
    assert planned(MODEL)["update"]["activations"] == 1000 * 24 * 68_096
    # Checkpointed: the float32 input of each layer.
    checkpointed = planned(MODEL, student__gradient_checkpointing=True)["update"]
    assert checkpointed["activations"] == 1000 * 24 * 4 * 1024
    # A prompt of 10 and a response of 90 tokens are never cut: a budget of 1 is one of 100.
    least = planned(MODEL, train__max_tokens_per_microbatch=1)["update"]
    assert least["activations"] == 100 * 24 * 68_096


def test_ranks_share_weights_gradients_optimizer_state_and_samples() -> None:
    one, four = planned(MODEL, width=4), planned(MODEL, width=4, processes=4)
    for part in ("weights", "optimizer", "gradients"):
        assert one["update"][part] == 4 * four["update"][part]
    # 6 samples over 4 ranks are 2 rows at most.
    assert one["sampling"]["KV cache"] == 3 * four["sampling"]["KV cache"]
    # While it samples each rank has all weights: layers in bf16, the rest in float32.
    bf16 = planned(MODEL, processes=4)["sampling"]
    assert bf16["gathered weights"] == 2 * LINEAR + 4 * (PARAMETERS - LINEAR)


def test_vllm_takes_its_share_of_the_card_and_servers_nothing() -> None:
    vllm: dict[str, Any] = {"rollout__engine": "vllm", "rollout__vllm_gpu_memory_utilization": 0.5}
    own = planned(MODEL, card_bytes=10**10, **vllm)
    assert own["sampling"]["vLLM"] == 5 * 10**9
    served = planned(MODEL, card_bytes=10**10, **vllm, rollout__base_urls=["http://h/v1"])
    assert "vLLM" not in served["sampling"]


@pytest.mark.parametrize(
    "student",
    [{}, {"use_peft": True, "gradient_checkpointing": True, "dtype": "bfloat16"}],
    ids=lambda student: "+".join(student) or "plain",
)
def test_the_plan_is_what_a_step_allocates(student: dict[str, Any], tmp_path: Path) -> None:
    tiny_model(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2000,
        max_position_embeddings=1024,
        initializer_range=0.02,
    ).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = StudentConfig(model=str(tmp_path), device="cpu", **student)
    policy = load_policy(settings, temperature=1.0)
    train = TrainConfig(max_tokens_per_microbatch=512)
    updater = updater_of(policy, train, max_completion_length=500)
    ids = tuple(5 + i % 90 for i in range(500))
    rows = [
        TrainSequence(prompt_ids=ids[:12], response_ids=ids, advantage=1.0, is_teacher=False)
        for _ in range(2)  # two micro-batches of 512 tokens
    ]
    updater.optimizer_step(rows)  # makes the optimizer's state
    with MemoryWatch() as watch:
        updater.optimizer_step(rows)
    plan = planned(
        read_student(settings)[1],
        width=2 if "dtype" in student else 4,
        rollout__max_prompt_length=12,
        rollout__max_completion_length=500,
        train__max_tokens_per_microbatch=512,
        **{f"student__{key}": value for key, value in student.items() if key != "dtype"},
    )
    always = sum(plan["update"][part] for part in ("weights", "optimizer"))
    assert (sum(plan["update"].values()) - always) / watch.peak == pytest.approx(1.0, abs=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_problems(
        path / "train.jsonl", [Problem(question=f"{n}+{n}", answer=str(2 * n)) for n in range(130)]
    )
    write_store(path / "traces")
    return path


@pytest.mark.parametrize(
    ("name", "size", "gpu", "processes"),
    [
        ("qwen2.5-1.5b-full-80gb", "1.5b", "A100-80GB", 1),
        ("qwen2.5-7b-qlora-24gb", "7b", "RTX4090-24GB", 1),
        ("qwen2.5-7b-lora-80gb", "7b", "A100-80GB", 1),
        ("qwen2.5-7b-full-node", "7b", "H100-80GB", 4),
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
    # As the model cards give them: 1.54 B and 7.61 B parameters.
    assert {"1.5b": "1,543,714,304", "7b": "7,615,616,512"}[size] in done.output
    found = re.search(r"peak ([\d,]+) MiB of ([\d,]+) MiB usable: fits\n", done.output)
    assert found is not None, done.output
    needed, room = (int(number.replace(",", "")) for number in found.groups())
    # The card is not left half empty by a config that could go faster.
    assert 0.4 * room < needed


def test_the_node_config_is_the_papers_run_but_for_what_changes_no_result() -> None:
    paper, node = Config().model_dump(), load_config(Config, str(CONFIGS / "qwen2.5-7b-full-node.toml"), [])
    differing = {
        f"{section}.{key}"
        for section in ("student", "rollout", "guidance", "train", "sft", "eval")
        for key, value in getattr(node, section).model_dump().items()
        if value != paper[section][key]
    }
    assert differing == {
        "student.model",
        "student.gradient_checkpointing",
        "rollout.engine",
        "train.max_tokens_per_microbatch",
        "eval.every",
    }
    assert len(node.teachers) == 4


def test_a_run_that_does_not_fit_is_told_which_keys_to_change(world: Path, models: dict[str, Path]) -> None:
    report, _ = printed(config_of(world, models["7b"]), gpu="RTX4090-24GB")
    peak_line, *lines = report.splitlines()[-5:]
    assert peak_line.endswith("MiB usable: does not fit")
    assert lines[:3] == [
        "to reduce the largest parts:",
        "  activations: student.gradient_checkpointing=true, train.max_tokens_per_microbatch",
        "  optimizer: train.optim=adamw_8bit, paged_adamw_8bit (one GPU), torchrun (more), "
        "student.use_peft=true",
    ]


def test_a_cards_name_ends_with_its_size() -> None:
    assert card_memory("A100-40GB", StudentConfig()) == 40 * 10**9
    with pytest.raises(ConfigError, match=r"--gpu 'H100': end the name with .* e\.g\. H100-80GB"):
        card_memory("H100", StudentConfig())


def test_planning_options_need_a_dry_run() -> None:
    done = CliRunner().invoke(app, ["train", "--gpu", "H100"], catch_exceptions=True)
    assert "they need --dry-run" in str(done.exception)


def test_everything_that_is_missing_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file = CONFIGS / "qwen2.5-7b-qlora-24gb.toml"
    done = CliRunner().invoke(app, ["train", "--config", str(file), "--dry-run"])
    assert done.exit_code == 2
    assert "no memory plan" in done.stdout
    data, store = tmp_path / "data", tmp_path / "traces"
    beginnings = [
        f"error: problems.train: no problem file at {data / 'train.parquet'}",
        f"error: problems.eval: no problem file at {data / 'valid.parquet'}",
        f"error: no trace store at {store}; make one with `ampo precompute teachers`",
        "error: student.model = 'Qwen/Qwen2.5-7B-Instruct': there is no such directory",
    ]
    for line, beginning in zip(done.stderr.splitlines(), beginnings, strict=True):
        assert line.startswith(beginning)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_with_brackets_is_shown_as_it_is(tmp_path: Path, model_dir: Path) -> None:
    world = make_world(tmp_path)
    (world / "train.jsonl").write_text('{"question": "[b]1[/b]+1", "answer": "2"}\n' * 4)
    report, _ = printed(config_of(world, model_dir, train__problems_per_step=1, train__mini_batch_problems=1))
    assert "<user>[b]1[/b]+1<assistant>" in report


def test_a_sampler_that_biases_training_is_warned_of(world: Path, model_dir: Path) -> None:
    assert "rollout.top_p below 1" in printed(config_of(world, model_dir, rollout__top_p=0.9))[0]
    assert "warning" not in printed(config_of(world, model_dir))[0]
