"""Logits: never all at once, never from a float32 copy of a frozen narrow head, and exact all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_student, tiny_model, tiny_tokenizer
from memory_watch import MemoryWatch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import StudentConfig
from trainer.student import head as narrow_head
from trainer.student.batches import TokenBatch, token_batch
from trainer.student.head import head_logits
from trainer.student.load import load_policy
from trainer.student.policy import Policy

VOCABULARY = 150_000


def whole_rows(rows: int, length: int) -> TokenBatch:
    """All tokens but the first of each row are target tokens."""
    ids = torch.arange(rows * length).reshape(rows, length) * 131 % VOCABULARY
    target_mask = torch.ones_like(ids, dtype=torch.bool)
    target_mask[:, 0] = False
    return token_batch(ids, target_mask, device=torch.device("cpu"))


def test_logits_of_all_tokens_never_exist_forward_or_backward() -> None:
    model = tiny_model(vocab_size=VOCABULARY, hidden_size=16, tie_word_embeddings=True, num_hidden_layers=1)
    policy = Policy(model, tiny_tokenizer(), dtype=torch.float32, logits_chunk_tokens=27)
    batch = whole_rows(2, 129)
    with MemoryWatch() as watch:
        logprobs, entropy = policy.logprobs_and_entropy(batch)
        (logprobs + entropy).sum().backward()
    # 2 x 128 target tokens: 154 MB of float32 logits. A chunk is 27 tokens: 16.2 MB; the
    # gradient of the tied embedding 150,000 x 16 x 4 = 9.6 MB.
    assert watch.largest == 27 * VOCABULARY * 4
    # At once: a handful of chunks of arithmetic, far from all logits.
    assert watch.peak < 2 * 128 * VOCABULARY * 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_narrow_head_gives_what_its_float32_copy_gives(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 32, dtype=torch.bfloat16).requires_grad_()
    weight, shift = torch.randn(1000, 32).bfloat16(), torch.randn(1000).bfloat16() if bias else None
    monkeypatch.setattr(narrow_head, "VALUES_PER_SLICE", 32 * 300)  # four slices, the last of 100 rows
    found = head_logits(hidden, weight, shift)
    expected = torch.nn.functional.linear(
        hidden.float(), weight.float(), None if shift is None else shift.float()
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    upstream = torch.randn(7, 1000)
    (gradient,) = torch.autograd.grad(found, hidden, upstream)
    (exact,) = torch.autograd.grad(expected, hidden, upstream)
    # Both are rounded to bfloat16 at the end: at most one step of 2^-8 apart.
    torch.testing.assert_close(gradient, exact, rtol=2**-8, atol=1e-3)


def test_the_frozen_head_is_never_copied_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 512).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY // 10, 512).bfloat16()
    monkeypatch.setattr(narrow_head, "VALUES_PER_SLICE", 2**20)
    with MemoryWatch() as watch:
        head_logits(hidden, weight, None).sum().backward()
    # The copy would take 15,000 x 512 x 4 = 30.7 MB; a slice takes 4 MiB, logits 2 x 15,000 x 4 = 0.12 MB.
    assert watch.largest == 4 * 2**20
    assert watch.peak < 2 * 4 * 2**20 + 1e6


def test_a_narrow_head_that_trains_gets_its_gradient() -> None:
    weight = torch.randn(10, 4).bfloat16().requires_grad_()
    head_logits(torch.ones(1, 4), weight, None).sum().backward()
    assert weight.grad is not None
    assert weight.grad.float().tolist() == [[1.0] * 4] * 10


@torch.no_grad()
def test_scores_of_a_bfloat16_student_come_from_float32_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_student(tmp_path)
    config = StudentConfig(model=str(tmp_path), device="cpu", dtype="bfloat16", use_peft=True)
    policy = load_policy(config, temperature=1.0)
    ids = torch.tensor([[2, 10, 11, 12, 13, 1]])
    target_mask = torch.ones_like(ids, dtype=torch.bool)
    target_mask[:, 0] = False
    batch = token_batch(ids, target_mask, device=torch.device("cpu"))
    with policy.computing():
        hidden = policy.causal.base_model(input_ids=ids).last_hidden_state
    head = policy.causal.get_output_embeddings().weight
    assert head.dtype == torch.bfloat16
    logits = hidden.double() @ head.double().T
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(policy.logprobs(batch)[:, 1:].double(), expected, rtol=0, atol=1e-5)


class ProductPrecisions(TorchDispatchMode):
    """What float32 products may read, each time that one is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tensor_cores", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_the_heads_products_alone_read_fewer_bits_forward_and_backward(
    trained: bool, tensor_cores: bool
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 32, requires_grad=True)
    weight = torch.randn(50, 32, dtype=torch.float32 if trained else torch.bfloat16, requires_grad=trained)
    shift, upstream = torch.randn(50), torch.randn(7, 50)
    wanted = [hidden, weight] if trained else [hidden]
    with ProductPrecisions() as made:
        found = head_logits(hidden, weight, shift, tensor_cores=tensor_cores)
        between = torch.get_float32_matmul_precision()
        gradients = torch.autograd.grad(found, wanted, upstream)
    # A product forward and one for each gradient.
    assert made.seen == ["high" if tensor_cores else "highest"] * (1 + len(wanted))
    assert between == torch.get_float32_matmul_precision() == "highest"
    expected = torch.nn.functional.linear(hidden, weight.float(), shift)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    exact = torch.autograd.grad(expected, wanted, upstream)
    torch.testing.assert_close(gradients, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype", "has"),
    [("cuda", torch.bfloat16, True), ("cuda", torch.float32, False), ("cpu", torch.bfloat16, False)],
)
def test_only_a_student_in_bfloat16_on_cuda_has_tensor_cores_for_its_head(
    device: str, dtype: torch.dtype, has: bool
) -> None:
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=dtype, device=torch.device(device))
    assert policy.has_tensor_cores == has
