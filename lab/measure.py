"""Measures a finished model: sample a group of each problem, compare the boxed number.

All questions of n operations have the same length, so a batch of them needs no padding before the prompt.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM, Qwen2Tokenizer

from lab.problems import Chain
from lab.recipes import Evaluation
from lab.tokenizer import ASSISTANT, END_ID, prompt_text

BOXED_NUMBER = re.compile(r"\\boxed\{(-?\d+)\}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Accuracy of a model at temperature 1."""

    correct: dict[int, float]
    """Share of correct samples for each number of operations n."""
    all_fail: dict[int, float]
    """Share of groups without a correct sample, for each n."""
    correct_share: float
    """Share of correct samples over all."""
    all_fail_share: float
    """Share of groups without a correct sample over all."""
    mean_tokens: float
    """Tokens of a solution without its end-of-turn token."""


@torch.inference_mode()
def sample(
    model: Qwen2ForCausalLM,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    generator: torch.Generator,
) -> Tensor:
    """Samples one solution per row of prompt_ids [B, P] at temperature 1: [B, T], END_ID after its end."""
    cache = DynamicCache(config=model.config)
    tokens = prompt_ids
    sampled: list[Tensor] = []
    running = torch.ones(len(prompt_ids), dtype=torch.bool)
    while len(sampled) < max_new_tokens and bool(running.any()):
        step = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = torch.multinomial(step.logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = tokens.masked_fill(~running[:, None], END_ID)
        running &= tokens[:, 0] != END_ID
        sampled.append(tokens)
    return torch.cat(sampled, dim=1)


def is_correct(text: str, chain: Chain) -> bool:
    """Returns True if the solution ends with the right number in a box."""
    found = BOXED_NUMBER.search(text)
    return found is not None and int(found[1]) == chain.answer


def measure(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    chains: Sequence[Chain],
    plan: Evaluation,
    *,
    seed: int,
    mark: str = ASSISTANT,
) -> Measurement:
    """Samples `plan.samples` solutions of each chain after `mark` and counts the correct ones."""
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[Chain]] = defaultdict(list)
    for chain in chains:
        by_length[len(chain.terms)].append(chain)
    verdicts: dict[int, Tensor] = {}
    lengths: list[int] = []
    for n, alike in sorted(by_length.items()):
        rows = [chain for chain in alike for _ in range(plan.samples)]
        texts = solve(model, tokenizer, rows, plan, generator, mark)
        marks = [is_correct(text, chain) for text, chain in zip(texts, rows, strict=True)]
        verdicts[n] = torch.tensor(marks).view(len(alike), plan.samples)
        lengths += map(len, texts)
    return _summarise(verdicts, sum(lengths) / len(lengths))


def solve(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    chains: Sequence[Chain],
    plan: Evaluation,
    generator: torch.Generator,
    mark: str = ASSISTANT,
) -> list[str]:
    """Returns a sampled solution of each chain; all questions must have the same length."""
    prompts = tokenizer([prompt_text(chain.question, mark) for chain in chains])["input_ids"]
    ids = sample(
        model,
        torch.tensor(prompts),
        max_new_tokens=plan.max_new_tokens,
        generator=generator,
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _summarise(verdicts: dict[int, Tensor], mean_tokens: float) -> Measurement:
    """Returns shares from `verdicts`: for each n, [problems, samples] booleans."""
    together = torch.cat(list(verdicts.values()))
    return Measurement(
        correct={n: _share(marks) for n, marks in verdicts.items()},
        all_fail={n: _share(~marks.any(dim=1)) for n, marks in verdicts.items()},
        correct_share=_share(together),
        all_fail_share=_share(~together.any(dim=1)),
        mean_tokens=round(mean_tokens, 1),
    )


def _share(marks: Tensor) -> float:
    return round(marks.double().mean().item(), 4)
