"""LoRA and QLoRA: the model stays frozen, and its adapters train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import save_student
from run_examples import updater_of

from precompute.config_file import load_config
from store.errors import ConfigError, EngineError
from trainer.config import Config, StudentConfig, TrainConfig
from trainer.student.batches import TrainSequence, pad
from trainer.student.load import load_policy
from trainer.student.policy import Policy

BATCH = pad([(2, 10, 11, 12, 1), (2, 20, 1)], [3, 1], pad_id=0, device=torch.device("cpu"))
ROW = TrainSequence(prompt_ids=(2, 40), response_ids=(9, 1), advantage=0.5, is_teacher=False)


def student(model: Path, **changes: object) -> Policy:
    settings = StudentConfig(model=str(model), device="cpu", use_peft=True, lora_r=4, **changes)  # type: ignore[arg-type]
    return load_policy(settings, temperature=1.0)


def one_step(policy: Policy) -> None:
    config = TrainConfig(learning_rate=1e-2)
    updater_of(policy, config).optimizer_step([ROW])


def test_new_adapters_change_nothing_and_train_alone(model_dir: Path) -> None:
    plain = load_policy(StudentConfig(model=str(model_dir), device="cpu"), temperature=1.0)
    policy = student(model_dir)
    with torch.no_grad():
        assert policy.logprobs(BATCH).equal(plain.logprobs(BATCH))
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    # Seven linear layers (q k v o gate up down) in each of two blocks, an A and a B each.
    assert len(trained) == 7 * 2 * 2
    assert all("lora_" in name for name in trained)
    one_step(policy)
    assert all(frozen[n].equal(p) for n, p in policy.model.named_parameters() if n in frozen)
    with torch.no_grad():
        assert not policy.logprobs(BATCH).equal(plain.logprobs(BATCH))


def test_qlora_keeps_four_bits_and_trains_its_adapters(tmp_path: Path) -> None:
    # bitsandbytes' CPU kernel takes no layer narrower than its blocks of 64.
    save_student(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    policy = student(tmp_path, load_in_4bit=True)
    kinds = {type(module).__name__ for module in policy.causal.modules()}
    assert "Linear4bit" in kinds
    q_proj = policy.causal.model.layers[0].self_attn.q_proj.base_layer
    assert q_proj.weight.dtype == torch.uint8
    before = policy.logprobs(BATCH).detach()
    exact = load_policy(StudentConfig(model=str(tmp_path), device="cpu"), temperature=1.0)
    with torch.no_grad():
        rounding = (before - exact.logprobs(BATCH)).abs().max().item()
    assert 0 < rounding < 3  # four bits round, and the random model is still recognisable
    one_step(policy)
    with torch.no_grad():
        assert not policy.logprobs(BATCH).equal(before)
    # A rollout-like pass came first; the gradient must still reach every adapter (B begins at 0).
    moved = {name for name, p in policy.model.named_parameters() if "lora_B" in name and bool(p.any())}
    assert len(moved) == 7 * 2


def test_four_bits_at_a_width_that_bitsandbytes_computes_wrongly_are_refused(tmp_path: Path) -> None:
    save_student(tmp_path, hidden_size=64, intermediate_size=96)
    with pytest.raises(EngineError) as error:
        student(tmp_path, load_in_4bit=True)
    assert str(error.value) == (
        f"student.model = '{tmp_path}': on the CPU bitsandbytes needs layers whose width is a multiple "
        f"of 64; model.layers.0.mlp.down_proj has 96: set load_in_4bit = false"
    )


def test_four_bits_without_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match="set use_peft = true"):
        load_config(Config, None, ["student.load_in_4bit=true"])


def test_adapters_over_bfloat16_weights_train_in_float32(tmp_path: Path) -> None:
    save_student(tmp_path)
    policy = student(tmp_path, dtype="bfloat16")
    dtypes = {p.requires_grad: p.dtype for p in policy.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    one_step(policy)
