"""LoRA and QLoRA: the model stays frozen, and its adapters train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import save_student, tiny_tokenizer
from run_examples import metrics_of, run, updater_of
from transformers import AutoModelForCausalLM

from precompute.config import TeacherConfig
from precompute.config_file import load_config
from precompute.engines import Request, Sampling
from precompute.engines.checks import check_options
from precompute.engines.transformers_engine import TransformersEngine
from store.errors import ConfigError, EngineError
from trainer.config import Config, StudentConfig, TrainConfig
from trainer.merge import merge
from trainer.run.saved_model import as_saved
from trainer.student.adapters import dropping_out
from trainer.student.batches import TrainSequence, pad
from trainer.student.load import load_policy
from trainer.student.policy import Policy

BATCH = pad([(2, 10, 11, 12, 1), (2, 20, 1)], [3, 1], pad_id=0, device=torch.device("cpu"))
ROW = TrainSequence(prompt_ids=(2, 40), response_ids=(9, 1), advantage=0.5, is_teacher=False)


def student(model: Path, **changes: Any) -> Policy:
    settings = StudentConfig(
        **{"model": str(model), "device": "cpu", "use_peft": True, "lora_r": 4, **changes}
    )
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


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.logprobs(BATCH)


def moved_adapters(model: Path, out: Path, **lora: Any) -> tuple[Path, torch.Tensor]:
    """Adapters as peft and TRL write them, and the log-probabilities of the model with them."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    settings = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3}
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **(settings | lora)))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(out)
    return out, logprobs(Policy(adapted.eval(), tiny_tokenizer(), dtype=torch.float32))


def test_adapters_as_a_model_train_on_from_where_they_are(model_dir: Path, tmp_path: Path) -> None:
    adapters, expected = moved_adapters(model_dir, tmp_path / "sft")
    policy = student(adapters)
    torch.testing.assert_close(logprobs(policy), expected)
    assert not torch.allclose(logprobs(student(model_dir)), expected, atol=1e-3)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # the adapters' own layers, whatever lora_targets would be
    one_step(policy)
    assert not logprobs(policy).equal(expected)


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"use_peft": False}, "set student.use_peft = true to train them further, or merge them"),
        ({"lora_r": 8}, "set student.lora_r = 4 to train them further"),
        ({"lora_alpha": 64, "lora_r": 8}, "set student.lora_r = 4, student.lora_alpha = 32 to train"),
        ({"lora_targets": ("k_proj",)}, 'set student.lora_targets = ["q_proj", "v_proj"] to train'),
    ],
)
def test_adapters_of_other_settings_are_one_line_with_the_way_out(
    changes: dict[str, Any], way_out: str, model_dir: Path, tmp_path: Path
) -> None:
    adapters, _ = moved_adapters(model_dir, tmp_path / "sft")
    with pytest.raises(EngineError) as error:
        student(adapters, **changes)
    assert way_out in str(error.value)
    assert str(error.value).startswith(f"student.model = '{adapters}' holds LoRA adapters")
    assert "\n" not in str(error.value)


def test_targets_and_dropout_are_the_configs(model_dir: Path) -> None:
    policy = student(model_dir, lora_targets=("q_proj",), lora_dropout=0.5)
    assert len([p for p in policy.model.parameters() if p.requires_grad]) == 2 * 2
    one_step(policy)
    first = logprobs(policy)
    assert first.equal(logprobs(policy))  # sampling and scores are without dropout
    with dropping_out(policy.model):
        assert not logprobs(policy).equal(first)
    assert logprobs(policy).equal(first)


def test_runs_follow_one_another_over_adapters_and_merged_models(
    world: Path, model_dir: Path, tmp_path: Path
) -> None:
    lora = {"student__use_peft": True, "student__lora_r": 4, "train__learning_rate": 3e-2}
    first = run(world, model_dir, run__name="first", train__max_steps=1, **lora).checkpoint
    assert first is not None
    going_on = {"run__name": "second", "train__beta": 0.1, "train__max_steps": 1}
    going_on["train__mini_batch_problems"] = 4
    second = run(world, first, **lora, **going_on).checkpoint
    assert second is not None
    # The KL of the first update is to the adapters that training began from, not to their base.
    assert metrics_of(second.parents[1])[-1]["kl"] == pytest.approx(0, abs=1e-5)
    merge(first, tmp_path / "merged")
    third = run(world, tmp_path / "merged", run__name="third", train__max_steps=1, **lora).checkpoint
    assert third is not None
    moved_adapters(model_dir, tmp_path / "below")
    stacked, expected = stacked_adapters(model_dir, tmp_path / "below", tmp_path / "stacked")
    for number, checkpoint in enumerate((second, third, stacked)):
        settings = as_saved(StudentConfig(model=str(checkpoint), device="cpu"))
        ours = logprobs(load_policy(settings, temperature=1.0))
        merge(checkpoint, tmp_path / str(number))
        plain = load_policy(StudentConfig(model=str(tmp_path / str(number)), device="cpu"), temperature=1.0)
        torch.testing.assert_close(ours, logprobs(plain), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def stacked_adapters(model: Path, below: Path, out: Path) -> tuple[Path, torch.Tensor]:
    """Adapters whose base is a directory of adapters, and the log-probabilities with both."""
    moved_adapters(model, out, r=2)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(below)}))
    base = peft.AutoPeftModelForCausalLM.from_pretrained(below).merge_and_unload()
    whole = peft.PeftModel.from_pretrained(base, out).eval()
    return out, logprobs(Policy(whole, tiny_tokenizer(), dtype=torch.float32))


def test_adapters_as_a_teacher_are_loaded_by_transformers_and_refused_for_vllm(
    model_dir: Path, tmp_path: Path
) -> None:
    adapters, _ = moved_adapters(model_dir, tmp_path / "sft")
    engine = TransformersEngine.load(str(adapters), tiny_tokenizer(), dtype="float32", device="cpu")
    request = Request(request_id="0", prompt_ids=(2, 10), seed=0)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4)
    (found,) = engine.generate([request], sampling)
    policy = student(adapters)
    batch = pad([(2, 10, *found.token_ids)], [len(found.token_ids)], pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        ours = policy.logprobs(batch)[0, 2:]
    torch.testing.assert_close(ours, torch.tensor(found.logprobs), atol=1e-4, rtol=0)
    teacher = TeacherConfig(name="sft", model=str(adapters))
    with pytest.raises(EngineError, match=f"merge them first: ampo model merge {adapters} OUT"):
        check_options(teacher, "vllm")
