"""What a step will need: parts by hand, and the laws that a person plans with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from memory_watch import MemoryWatch

from store.errors import EngineError
from trainer.config import Config, GuidanceConfig, StudentConfig, TrainConfig
from trainer.method.update import Updater
from trainer.planning.estimate import Estimate, ModelShape, estimate, layer_bytes, load_model_config, shape_of
from trainer.planning.hardware import Device, at_hand
from trainer.student.batches import TrainSequence
from trainer.student.optimizer import make_optimizer
from trainer.student.policy import load_policy


def shape_at(path: Path) -> ModelShape:
    return shape_of(load_model_config(StudentConfig(model=str(path))))


@pytest.fixture(scope="module")
def shape(model_dir: Path) -> ModelShape:
    return shape_at(model_dir)


@pytest.fixture(scope="module")
def large(shape: ModelShape) -> ModelShape:
    """About a model of half a billion parameters."""
    return dataclasses.replace(
        shape,
        parameters=500_000_000,
        linear=400_000_000,
        layers=24,
        hidden=1024,
        kv_width=128,
        intermediate=4096,
        vocabulary=100_000,
    )


def estimated(
    shape: ModelShape,
    *,
    flops: float = 1e12,
    bandwidth: float = 1e15,
    bytes_per_value: int = 2,
    processes: int = 1,
    **changes: Any,
) -> Estimate:
    """`section__key=value` over 2 problems of 3 samples, prompts of 10 tokens and responses of 90."""
    values = {
        "rollout__num_generations": 3,
        "rollout__max_prompt_length": 10,
        "rollout__max_completion_length": 90,
        "train__problems_per_step": 2,
        "train__mini_batch_problems": 1,
        "train__max_tokens_per_microbatch": 1000,
        **changes,
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    device = Device(name="a card", memory=9 * 10**9, card_memory=10**10, flops=flops, bandwidth=bandwidth)
    return estimate(
        Config(**sections),  # type: ignore[arg-type]
        shape,
        device,
        bytes_per_value=bytes_per_value,
        processes=processes,
    )


def test_the_shape_counts_the_models_parameters_exactly(shape: ModelShape) -> None:
    assert shape.parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert (shape.layers, shape.hidden, shape.kv_width) == (2, 32, 32)  # one head of 32


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_counts_once_and_shared_key_heads_count_as_few(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        tie_word_embeddings=tied,
    )
    model.save_pretrained(tmp_path)
    found = shape_at(tmp_path)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.layers, found.hidden, found.kv_width) == (3, 64, 32)  # 2 heads of 64 / 4 = 16


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=str(tmp_path / "none")):
        shape_at(tmp_path / "none")


def test_what_hangs_on_the_parameters_alone(large: ModelShape) -> None:
    found = estimated(large).memory
    # float32 weights and gradients: 4 bytes each. AdamW: two float32 values for each weight.
    assert found["weights"] == found["gradients"] == 2_000_000_000
    assert found["optimizer"] == 4_000_000_000


def test_a_reference_is_a_second_set_of_weights_where_beta_asks_for_one(large: ModelShape) -> None:
    assert estimated(large).memory["reference"] == 0
    assert estimated(large, train__beta=0.1).memory["reference"] == 2_000_000_000


def test_several_processes_share_a_reference_but_for_what_stays_gathered(large: ModelShape) -> None:
    # 4 bytes a weight: the linear layers' in 4 shares, all else whole.
    shared = estimated(large, train__beta=0.1, processes=4).memory["reference"]
    assert shared == large.linear + 4 * (large.parameters - large.linear)


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        # 500 M weights: 8 bytes each for AdamW, 2 in 8 bits, none that has to stay where pages can go.
        ({"train__optim": "adamw_8bit"}, 3_000_000_000),
        ({"train__optim": "paged_adamw_8bit"}, 4_000_000_000),
    ],
)
def test_smaller_or_absent_optimizer_state_lowers_the_peak(
    large: ModelShape, changes: dict[str, Any], saved: int
) -> None:
    assert estimated(large).peak - estimated(large, **changes).peak == saved


def test_the_cache_by_hand(shape: ModelShape) -> None:
    # 2 problems x 3 samples = 6 rows of 10 + 90 tokens; keys and values, 2 layers of 32 values of 4 bytes:
    # 6 * 100 * 2 * 2 * 32 * 4 = 307,200.
    assert estimated(shape, bytes_per_value=4).memory["kv cache"] == 307_200
    # No more rows than are sampled at once: 4 of the 6.
    assert estimated(shape, bytes_per_value=4, rollout__batch_size=4).memory["kv cache"] == 204_800


def test_sampling_and_updating_share_their_memory(shape: ModelShape) -> None:
    # Six rows sample in less than an update needs; 10,000 rows need more than it.
    few = estimated(shape, bytes_per_value=4)
    many = estimated(shape, bytes_per_value=4, train__problems_per_step=10_000, rollout__batch_size=10_000)
    stays = few.memory["weights"] + few.memory["optimizer"]
    update = few.memory["gradients"] + few.memory["activations"] + few.memory["logits"]
    assert few.peak == stays + update
    assert many.peak == stays + many.memory["kv cache"] + many.memory["drawing"] > few.peak
    assert (few.dominant, many.dominant) == ("activations", "kv cache")


def test_seconds_are_the_work_over_what_the_device_does(large: ModelShape) -> None:
    slow, fast = estimated(large, flops=1e12), estimated(large, flops=4e12)
    assert slow.seconds == pytest.approx(4 * fast.seconds)
    # 600 tokens at 2 operations a weight to sample: 600 * 2 * 5e8 / 1e12 = 0.6 s. To update 2 + 4, and 2 for
    # the old log-probabilities of the second of two optimizer steps: 600 * 7 * 5e8 / 1e12 = 2.1 s.
    assert (slow.sampling_seconds, slow.update_seconds) == pytest.approx((0.6, 2.1))
    # Checkpointing runs the forward pass once more; a frozen model needs no gradient of its weights.
    assert estimated(large, student__gradient_checkpointing=True).update_seconds == pytest.approx(2.7)
    assert estimated(large, student__use_peft=True).update_seconds == pytest.approx(1.5)


def test_decoding_is_bound_by_bandwidth(large: ModelShape) -> None:
    # Six rows of at most 100 tokens: 90 times all weights in bf16, 1e9 bytes, and the cache, half full with
    # 10 + 45 tokens of 2 * 24 * 128 * 4 bytes a row: 6 * 55 * 24,576 = 8,110,080. Over 1e10 bytes a second.
    assert estimated(large, bandwidth=1e10).sampling_seconds == pytest.approx(90 * 1_008_110_080 / 1e10)
    # Half the rows at once read the weights twice as often.
    halves = estimated(large, bandwidth=1e10, rollout__batch_size=3)
    assert halves.sampling_seconds == pytest.approx(2 * 90 * 1_004_055_040 / 1e10)


def test_processes_divide_what_is_dealt_out(large: ModelShape) -> None:
    one, four = estimated(large), estimated(large, processes=4)
    for part in ("weights", "gradients", "optimizer"):
        assert one.memory[part] == 4 * four.memory[part]
    # 6 samples over 4 processes are 2 rows at most.
    assert one.memory["kv cache"] == 3 * four.memory["kv cache"]
    # While it samples each has all weights: 400 M of layers in bf16, the rest in float32.
    assert four.memory["gathered weights"] == 2 * 400_000_000 + 4 * 100_000_000
    assert one.update_seconds == pytest.approx(4 * four.update_seconds)


def test_vllm_takes_its_share_of_the_card_and_servers_none(large: ModelShape) -> None:
    own = estimated(large, rollout__engine="vllm", rollout__vllm_gpu_memory_utilization=0.5)
    assert (own.memory["vllm"], own.memory["kv cache"]) == (5 * 10**9, 0)
    served = estimated(large, rollout__engine="vllm", rollout__base_urls=["http://h/v1"])
    assert served.memory["vllm"] == 0


def test_several_processes_have_all_weights_to_score_with_while_their_vllm_sleeps(large: ModelShape) -> None:
    servers: dict[str, Any] = {"rollout__engine": "vllm", "rollout__base_urls": ["http://h/v1"]}
    alone, four = estimated(large, **servers), estimated(large, processes=4, **servers)
    # 400 M weights of layers in bf16, 100 M outside of them in float32.
    assert (alone.memory["weights to score with"], four.memory["weights to score with"]) == (0, 1_200_000_000)
    small = {"train__max_tokens_per_microbatch": 1, "student__gradient_checkpointing": True}
    slim = estimated(large, processes=64, **servers, **small)
    update = slim.peak - slim.memory["weights"] - slim.memory["optimizer"]
    assert update == max(
        1_200_000_000,
        slim.memory["gathered layers"]
        + slim.memory["gradients"]
        + slim.memory["logits"]
        + slim.memory["activations"],
    )


@given(tokens=st.integers(100, 50_000), more=st.integers(1, 50_000))
def test_a_larger_micro_batch_needs_more(shape: ModelShape, tokens: int, more: int) -> None:
    small = estimated(shape, train__max_tokens_per_microbatch=tokens)
    big = estimated(shape, train__max_tokens_per_microbatch=tokens + more)
    assert big.memory["activations"] > small.memory["activations"]
    assert big.peak >= small.peak


def test_a_micro_batch_holds_the_longest_sequence_whatever_its_budget(large: ModelShape) -> None:
    # A prompt of 10 and a response of 90 tokens are never cut apart: a budget of 1 is one of 100.
    one, hundred, more = (
        estimated(large, train__max_tokens_per_microbatch=tokens).memory["activations"]
        for tokens in (1, 100, 200)
    )
    assert one == hundred
    assert more == 2 * hundred


@pytest.mark.parametrize("layers", [2, 24, 80])
def test_gradient_checkpointing_shrinks_activations_and_nothing_else(large: ModelShape, layers: int) -> None:
    shape = dataclasses.replace(large, layers=layers)
    plain, thrifty = estimated(shape), estimated(shape, student__gradient_checkpointing=True)
    assert thrifty.memory["activations"] < plain.memory["activations"]
    # Narrow copies of the weights are made layer by layer too.
    less = {"activations": 0, "narrow weights in the graph": 0}
    assert thrifty.memory | less == plain.memory | less
    assert thrifty.peak < plain.peak


def test_activations_by_hand(large: ModelShape) -> None:
    # A layer keeps 34 bytes a hidden unit and, in 16 bits, four of the MLP's width, a key and a value:
    # 34 * 1024 + 2 * (4 * 4096 + 2 * 128) = 68,096 a token; 1,000 tokens, 24 layers.
    assert layer_bytes(StudentConfig(), large, 2) == 68_096
    assert estimated(large).memory["activations"] == 1000 * 24 * 68_096
    # Checkpointed: the float32 input of each layer; a whole layer, 68 MB, is less than the logits were.
    thrifty = estimated(large, student__gradient_checkpointing=True)
    assert thrifty.memory["activations"] == 1000 * 24 * 4 * 1024
    small = dataclasses.replace(large, vocabulary=1000)  # logits of 7 * 4 * 1000 * 1000 = 28 MB
    thrifty = estimated(small, student__gradient_checkpointing=True)
    assert thrifty.memory["activations"] == 1000 * (24 * 4 * 1024 + 68_096) - 28_000_000


def test_logits_never_pile_up(large: ModelShape) -> None:
    # Logits of a chunk of tokens exist at once, however long the micro-batch and large the vocabulary.
    shape = dataclasses.replace(large, vocabulary=150_000)
    short, long = (
        estimated(shape, train__max_tokens_per_microbatch=tokens).memory["logits"]
        for tokens in (100_000, 1_000_000)
    )
    assert short == long


def test_a_small_vocabulary_needs_no_whole_chunk(shape: ModelShape) -> None:
    # 1,000 tokens of 94 logits, far below a chunk of 2^27: growing with the vocabulary.
    wide = dataclasses.replace(shape, vocabulary=2 * shape.vocabulary)
    assert estimated(wide).memory["logits"] == 2 * estimated(shape).memory["logits"] > 0


def test_the_device_is_measured() -> None:
    here = at_hand("cpu", torch.float32)
    assert (here.name, here.memory) == ("cpu", None)
    assert here.flops > 1e6
    assert here.bandwidth > 1e6


@pytest.mark.parametrize(
    "student",
    [
        {},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True, "dtype": "bfloat16"},
        {"use_peft": True, "dtype": "bfloat16"},
        {"use_peft": True, "dtype": "bfloat16", "gradient_checkpointing": True},
    ],
    ids=lambda student: "+".join(student) or "plain",
)
def test_the_estimate_is_what_a_step_allocates(student: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4000,
        max_position_embeddings=1024,
        initializer_range=0.02,
    )
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = StudentConfig(model=str(tmp_path), device="cpu", **student)
    policy = load_policy(settings, temperature=1.0)
    train = TrainConfig(max_tokens_per_microbatch=1024)
    updater = Updater(
        policy, make_optimizer(policy.model, train), train, GuidanceConfig(), max_completion_length=500
    )
    ids = tuple(5 + i % 90 for i in range(500))
    rows = [
        TrainSequence(prompt_ids=ids[:12], response_ids=ids, advantage=1.0, is_teacher=False)
        for _ in range(4)  # two micro-batches of 1,024 tokens
    ]
    updater.optimizer_step(rows)  # makes the optimizer's state
    with MemoryWatch() as watch:
        updater.optimizer_step(rows)
    found = estimated(
        shape_at(tmp_path),
        bytes_per_value=2 if "dtype" in student else 4,
        rollout__max_prompt_length=12,
        rollout__max_completion_length=500,
        train__max_tokens_per_microbatch=1024,
        **{f"student__{key}": value for key, value in student.items() if key != "dtype"},
    )
    made = found.peak - found.memory["weights"] - found.memory["optimizer"]
    assert made / watch.peak == pytest.approx(1.0, abs=0.15)
