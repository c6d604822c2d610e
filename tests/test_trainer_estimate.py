"""What a step will need: parts by hand, and the laws that a person plans with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from store.errors import EngineError
from trainer.config import Config, StudentConfig
from trainer.estimate import (
    Estimate,
    ModelShape,
    estimate,
    load_model_config,
    measured_flops,
    shape_of,
)


def shape_at(path: Path) -> ModelShape:
    return shape_of(load_model_config(StudentConfig(model=str(path))))


@pytest.fixture(scope="module")
def shape(model_dir: Path) -> ModelShape:
    return shape_at(model_dir)


@pytest.fixture(scope="module")
def large(shape: ModelShape) -> ModelShape:
    """About a model of half a billion parameters."""
    return dataclasses.replace(shape, parameters=500_000_000, layers=24, hidden=1024, kv_width=128)


def estimated(
    shape: ModelShape, *, flops: float = 1e12, bytes_per_value: int = 2, **changes: Any
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
    return estimate(Config(**sections), shape, flops=flops, bytes_per_value=bytes_per_value)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizer_state_is_a_quarter_of_32_bit_state(large: ModelShape, optim: str) -> None:
    whole, eighth = estimated(large), estimated(large, train__optim=optim)
    assert 4 * eighth.memory["optimizer"] == whole.memory["optimizer"]
    # 3 of 4 GB less, whichever of sampling and updating is the peak.
    assert whole.peak - eighth.peak == 3_000_000_000


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
    assert many.peak == stays + many.memory["kv cache"] > few.peak


def test_seconds_are_the_work_over_what_the_device_does(large: ModelShape) -> None:
    slow, fast = estimated(large, flops=1e12), estimated(large, flops=4e12)
    assert slow.seconds == pytest.approx(4 * fast.seconds)
    # 600 tokens at 2 operations a weight to sample, 2 + 4 to update: 600 * 8 * 5e8 / 1e12 = 2.4 s.
    assert slow.seconds == pytest.approx(2.4)
    # Checkpointing runs the forward pass once more: 600 * 10 * 5e8 / 1e12.
    assert estimated(large, student__gradient_checkpointing=True).seconds == pytest.approx(3.0)


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
    assert thrifty.memory | {"activations": 0} == plain.memory | {"activations": 0}
    assert thrifty.peak < plain.peak


def test_activations_by_hand(large: ModelShape) -> None:
    # 34 bytes a token, hidden unit and layer in 16 bits: 1000 * 1024 * 24 * 34 = 835,584,000.
    assert estimated(large).memory["activations"] == 835_584_000


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
    assert measured_flops("cpu", torch.float32) > 1e6
