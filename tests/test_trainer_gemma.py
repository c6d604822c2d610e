"""A student of another make than the lab's: Gemma 3, its embeddings tied and scaled, its logits capped, its
layers with a window, a turn that ends with another token than a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import token_logprobs
from run_examples import config_of
from safetensors.torch import load_file

from trainer.config import StudentConfig
from trainer.student import head
from trainer.student.batches import pad
from trainer.student.load import load_policy
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics
from trainer.train import train

# Longer than the window of 8, and padded.
ROWS = [(2, *range(10, 30), 1), (2, 20, 21, 22, 1)]
BATCH = pad(ROWS, [15, 3], pad_id=0, device=torch.device("cpu"))


def load(model: Path, **changes: object) -> Policy:
    settings = {"model": str(model), "device": "cpu", **changes}
    return load_policy(StudentConfig(**settings), temperature=0.7)  # type: ignore[arg-type]


@torch.no_grad()
def test_statistics_are_those_of_the_capped_logits(gemma_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(gemma_dir)
    logits = policy.model(input_ids=BATCH.input_ids).logits
    assert logits.abs().max().item() < 4.0  # the cap
    expected = token_logprobs(logits / 0.7, BATCH.input_ids).masked_fill(~BATCH.target_mask, 0.0)
    torch.testing.assert_close(policy.logprobs(BATCH), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setitem(head.SLICE_VALUES, "cpu", 1000)  # 31 entries of the vocabulary at a time
    torch.testing.assert_close(policy.logprobs(BATCH), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_row_is_the_same_alone_and_beside_a_longer_one(gemma_dir: Path) -> None:
    policy = load(gemma_dir)
    alone = policy.logprobs(pad([ROWS[1]], [3], pad_id=0, device=torch.device("cpu")))
    torch.testing.assert_close(policy.logprobs(BATCH)[1, :5], alone[0], rtol=1e-5, atol=1e-5)


def test_adapters_leave_embeddings_and_the_head_that_is_tied_to_them_alone(gemma_dir: Path) -> None:
    policy = load(gemma_dir, use_peft=True, lora_r=4)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    # Seven linear layers in each of six blocks, an A and a B each.
    assert len(trained) == 7 * 6 * 2
    assert policy.causal.lm_head.weight is policy.causal.model.embed_tokens.weight
    assert policy.eos_ids == (1, 3)


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
def test_a_run_trains_and_its_checkpoint_is_what_went_on(
    gemma_dir: Path, world: Path, tmp_path: Path, adapters: bool
) -> None:
    changes = {"student__use_peft": adapters, "student__lora_r": 4, "train__learning_rate": 3e-3}
    config = config_of(world, gemma_dir, run__dir=str(tmp_path), train__max_steps=2, **changes)
    report = train(config, reporter=TrainReporter())
    assert report.checkpoint is not None
    steps = read_metrics(report.run)
    # The sampler's cache and the trainer's plain pass agree on every token that was drawn.
    assert all(step["sampling/logp_difference"] < 1e-4 for step in steps)
    assert steps[0]["groups/all_fail"] == 1.0
    files = load_file(next(report.checkpoint.glob("*model.safetensors")))
    assert not any("lm_head" in name for name in files)
    with torch.no_grad():
        saved = load(report.checkpoint, use_peft=adapters, lora_r=4).logprobs(BATCH)
        going_on = load_policy(config.student, temperature=0.7, weights=report.checkpoint)
        torch.testing.assert_close(saved, going_on.logprobs(BATCH), rtol=1e-5, atol=1e-5)
        assert (saved - load(gemma_dir).logprobs(BATCH)).abs().max().item() > 1e-3
