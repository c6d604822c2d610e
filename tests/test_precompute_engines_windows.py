"""Models whose layers look back over a window only (Gemma 3): drawn as any other, over and beyond the window.

A random Gemma 3 of six layers, every third of which sees all; its window is 8 tokens, and its logits pass
through a cap (`final_logit_softcapping`), as in Gemma 2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_gemma, tiny_tokenizer
from precompute_examples import by_id, forward_logprobs

from precompute.engines import Completion, Request, Sampling
from precompute.engines.transformers_engine import TransformersEngine

WINDOW = 8
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=24)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gemma(sliding_window=WINDOW)


def request(number: int, length: int) -> Request:
    """Two requests in a row have one prompt, where their lengths are the same."""
    generator = torch.Generator().manual_seed(number // 2)
    ids = torch.randint(5, 90, (length,), generator=generator).tolist()
    return Request(request_id=f"r{number}", prompt_ids=(2, *ids), seed=1000 + number)


def drawn(model: Any, requests: list[Request], batch_size: int) -> dict[str, Completion]:
    engine = TransformersEngine(model, tiny_tokenizer(), batch_size=batch_size)
    return by_id(engine.generate(requests, SAMPLING))


# Prompts within the window (3 to 7 tokens), beyond it (9 to 28), and both in one batch: then rows join whose
# caches hold fewer columns than the window, and padding is cut out of windows that are full.
@pytest.mark.parametrize("lengths", [range(2, 7), range(8, 28), range(2, 28)], ids=["short", "long", "both"])
def test_rows_come_and_go_and_every_token_is_drawn_from_the_models_own_distribution(
    model: Any, lengths: range
) -> None:
    requests = [request(number, lengths[number // 2 * 7 % len(lengths)]) for number in range(40)]
    found = drawn(model, requests, batch_size=8)
    assert len({len(completion.token_ids) for completion in found.values()}) > 3
    for each in requests:
        completion = found[each.request_id]
        assert completion.logprobs == pytest.approx(forward_logprobs(model, each, completion), abs=1e-4)
    for each in requests[::8]:
        alone = drawn(model, [each], batch_size=1)
        assert alone[each.request_id].token_ids == found[each.request_id].token_ids
