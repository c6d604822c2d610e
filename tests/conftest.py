"""Tiny real models for tests, made in a moment: random weights, a real tokenizer, a real chat template."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trainer.student.policy import Policy

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-=*/.,;:?!'\"()[]{}\\<>_ \nABCDEFGHIJKLMNOPQRSTUVWXYZ$^"
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] != 'assistant' else '<assistant>' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


# Models this small only wait for their other threads; a process that a test starts has one, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A shell without job control starts what it puts into the background deaf to Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] of full logits [B, T, V]: column t is the log-probability of token t, column 0 is 0."""
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(chosen, (1, 0))


def tiny_tokenizer() -> Any:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """A random Qwen2 of about 60,000 parameters, its head not near uniform, so that scores differ."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": len(SPECIAL) + len(CHARACTERS),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **changes,
        }
    )
    return Qwen2ForCausalLM(config).eval()


def save_student(path: Path, **changes: Any) -> Path:
    """A tiny Qwen2 and its tokenizer as an ordinary transformers directory; returns `path`."""
    tiny_model(**changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_tied_student(path: Path) -> Path:
    """One whose head is its embedding, in widths that vllm takes."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    return save_student(path, tie_word_embeddings=True, **wide)


def tiny_gemma(seed: int = 0, **changes: Any) -> Any:
    """A random Gemma 3: layers with a sliding window, tied and scaled embeddings, capped logits, two EOS."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        **{
            "vocab_size": len(SPECIAL) + len(CHARACTERS),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 512,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 4.0,
            "initializer_range": 0.5,
            "bos_token_id": 2,
            "eos_token_id": [1, 3],
            "pad_token_id": 0,
            **changes,
        }
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture
def policy() -> Policy:
    """A student of random weights."""
    return Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student saved as an ordinary transformers directory."""
    return save_student(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied weights, and with buffers that are in no file."""
    path = tmp_path_factory.mktemp("gemma")
    tiny_gemma().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, and a store with traces for most of them, as `make_world` writes them."""
    from run_examples import make_world

    return make_world(tmp_path_factory.mktemp("world"))
