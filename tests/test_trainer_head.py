"""The head: exact without logits that are kept, and without a float32 copy of a frozen head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_student, tiny_model, tiny_tokenizer
from memory_watch import MemoryWatch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import StudentConfig
from trainer.student import head
from trainer.student.batches import TokenBatch, token_batch
from trainer.student.head import LogitScale, target_values
from trainer.student.load import load_policy
from trainer.student.policy import Policy

VOCABULARY = 150_000


def whole_rows(rows: int, length: int) -> TokenBatch:
    """All tokens but the first of each row are target tokens."""
    ids = torch.arange(rows * length).reshape(rows, length) * 131 % VOCABULARY
    target_mask = torch.ones_like(ids, dtype=torch.bool)
    target_mask[:, 0] = False
    return token_batch(ids, target_mask, device=torch.device("cpu"))


def test_logits_of_all_tokens_never_exist_forward_or_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.SLICE_VALUES, "cpu", 2**19)
    model = tiny_model(vocab_size=VOCABULARY, hidden_size=16, tie_word_embeddings=True, num_hidden_layers=1)
    policy = Policy(model, tiny_tokenizer(), dtype=torch.float32)
    batch = whole_rows(2, 129)
    with MemoryWatch() as watch:
        logprobs, entropy = policy.logprobs_and_entropy(batch)
        (logprobs + entropy).sum().backward()
    # 2 x 128 target tokens: 154 MB of float32 logits. A slice is 2 MiB; the gradient of the tied embedding
    # 150,000 x 16 x 4 = 9.6 MB: of the head, of the embedding, and their sum.
    assert watch.largest == VOCABULARY * 16 * 4
    assert watch.peak < 3 * watch.largest + 2**21


@pytest.mark.parametrize("entropy_trains", [True, False], ids=["entropy", "logprobs"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_values_and_gradients_are_those_of_whole_logits_in_float64(
    bias: bool,
    softcap: float | None,
    temperature: float,
    entropy_trains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(head.SLICE_VALUES, "cpu", 16 * 30)  # 101 entries: four slices, the last of 11
    torch.manual_seed(0)
    inputs = [torch.randn(9, 16), torch.randn(101, 16), *([torch.randn(101)] if bias else [])]
    targets, upstream = torch.randint(101, (9,)), torch.randn(2, 9)
    found_inputs = [each.clone().requires_grad_() for each in inputs]
    scale = LogitScale(temperature=temperature, softcap=softcap)
    hidden, weight, *shift = found_inputs
    found = target_values(hidden, weight, *(shift or [None]), targets, scale=scale, entropy=True)
    exact_inputs = [each.double().requires_grad_() for each in inputs]
    logits = torch.nn.functional.linear(*exact_inputs)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    every = (logits / temperature).log_softmax(-1)
    exact = every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)
    torch.testing.assert_close([each.double() for each in found], list(exact), rtol=1e-5, atol=1e-5)
    used = 2 if entropy_trains else 1
    of_found = torch.autograd.grad(found[:used], found_inputs, list(upstream[:used]))
    of_exact = torch.autograd.grad(exact[:used], exact_inputs, list(upstream[:used].double()))
    torch.testing.assert_close([each.double() for each in of_found], list(of_exact), rtol=1e-4, atol=1e-5)


def test_a_frozen_head_is_never_copied_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 512).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY // 10, 512).bfloat16()
    monkeypatch.setitem(head.SLICE_VALUES, "cpu", 2**20)
    with MemoryWatch() as watch:
        target_values(hidden, weight, None, torch.tensor([7, 8]), entropy=True)[0].sum().backward()
    # The copy would take 15,000 x 512 x 4 = 30.7 MB; a slice of the head takes 4 MiB, of two tokens' logits
    # 2,048 x 2 x 4 bytes.
    assert watch.largest == 4 * 2**20
    assert watch.peak < 2 * 4 * 2**20


def test_a_bfloat16_head_that_trains_gets_its_gradient() -> None:
    # Two even entries: d log p_0 / d z = (0.5, -0.5), and z_i = sum of row i.
    weight = torch.zeros(2, 4).bfloat16().requires_grad_()
    target_values(torch.ones(1, 4), weight, None, torch.tensor([0]))[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.float().tolist() == [[0.5] * 4, [-0.5] * 4]


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
    weight = policy.causal.get_output_embeddings().weight
    assert weight.dtype == torch.bfloat16
    logits = hidden.double() @ weight.double().T
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
    targets, wanted = torch.arange(7), [hidden, weight] if trained else [hidden]
    scale = LogitScale(tensor_cores=tensor_cores)
    with ProductPrecisions() as made:
        (found,) = target_values(hidden, weight, None, targets, scale=scale)
        between = torch.get_float32_matmul_precision()
        torch.autograd.grad(found.sum(), wanted)
    # A product forward, the same again backward, and one for each gradient.
    assert made.seen == ["high" if tensor_cores else "highest"] * (2 + len(wanted))
    assert between == torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("device", "dtype", "has"),
    [("cuda", torch.bfloat16, True), ("cuda", torch.float32, False), ("cpu", torch.bfloat16, False)],
)
def test_only_a_student_in_bfloat16_on_cuda_has_tensor_cores_for_its_head(
    device: str, dtype: torch.dtype, has: bool
) -> None:
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=dtype, device=torch.device(device))
    assert policy.has_tensor_cores == has
