"""Models with dropout or router noise train on the log-probabilities that they sample with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHARACTERS, SPECIAL, tiny_tokenizer
from run_examples import updater_of
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import StudentConfig, TrainConfig
from trainer.student.batches import TrainSequence, train_batch
from trainer.student.load import load_policy

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = WIDTHS | {"num_key_value_heads": 1, "intermediate_size": 64}
MIXED = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}
WAYS: dict[str, dict[str, Any]] = {
    "qwen2": LLAMA | {"attention_dropout": 0.5},
    "starcoder2": LLAMA | {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    "opt": WIDTHS | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.5},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "falcon": WIDTHS | {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64, "dropout": 0.3},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "mixtral": MIXED,
    "phimoe": MIXED | {"input_jitter_noise": 0.3},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "resid_pdrop": 0.3, "emb_pdrop": 0.3},
    "biogpt": WIDTHS | {"intermediate_size": 64, "hidden_dropout_prob": 0.3, "activation_dropout": 0.3},
}
ROWS = [
    TrainSequence(prompt_ids=(2, 40), response_ids=(9, 30, 31, 1), advantage=1.0, is_teacher=False),
    TrainSequence(prompt_ids=(2, 40), response_ids=(12, 1), advantage=-1.0, is_teacher=False),
]


def saved(path: Path, kind: str) -> Path:
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    shape = {"vocab_size": len(SPECIAL) + len(CHARACTERS), "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, **shape, **special, **WAYS[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_update_computes_what_sampling_computed(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    student = StudentConfig(
        model=str(saved(tmp_path, kind)), device="cpu", gradient_checkpointing=checkpointing
    )
    policy = load_policy(student, temperature=1.0)
    batch = train_batch(ROWS, pad_id=0, device=policy.device)
    policy.model.eval()
    with torch.no_grad():
        sampled = policy.logprobs(batch)
    rows = [
        TrainSequence(
            prompt_ids=row.prompt_ids,
            response_ids=row.response_ids,
            advantage=row.advantage,
            is_teacher=False,
            sampler_logprobs=tuple(values[mask].tolist()),
        )
        for row, values, mask in zip(ROWS, sampled, batch.target_mask, strict=True)
    ]
    metrics = updater_of(policy, TrainConfig(learning_rate=1e-3)).optimizer_step(rows)
    assert metrics["sampling/logp_difference"] < 1e-5
    assert metrics["grad_norm"] > 0
