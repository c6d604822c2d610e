"""Supervised training of one lab model from scratch: sample rows, pad to the longest, one AdamW loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from lab.problems import draw_unseen
from lab.recipes import Habit, ModelRecipe
from lab.solutions import STYLES, slipping
from lab.tokenizer import END, END_ID, MAX_POSITIONS, PAD_ID, prompt_text

IGNORED = -100
"""Label of a position that carries no loss."""

CHUNKS = 4
"""Number of pieces in which a step's rows go through the model; the gradient is that of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One supervised batch, right-padded."""

    input_ids: Tensor
    """[B, T] int64"""
    labels: Tensor
    """[B, T] int64; the id of the next token where it belongs to the solution, IGNORED elsewhere."""


def new_model(recipe: ModelRecipe, tokenizer: Qwen2Tokenizer, *, seed: int) -> Qwen2ForCausalLM:
    """Returns a randomly initialised Qwen2 in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=recipe.width**-0.5 / 2,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]


def draw_rows(
    rng: Random, recipe: ModelRecipe, tokenizer: Qwen2Tokenizer, seen: AbstractSet[str]
) -> list[Rows]:
    """Samples one step's rows of the recipe's mixture, in chunks of similar length (half the padding).

    No question is in `seen`.
    """
    habits = rng.choices(recipe.mixture, weights=[habit.share for habit in recipe.mixture], k=recipe.rows)
    rows = sorted((_draw_row(rng, habit, seen) for habit in habits), key=lambda row: len(row[0] + row[1]))
    size = -(-len(rows) // CHUNKS)
    return [collate(rows[first : first + size], tokenizer) for first in range(0, len(rows), size)]


def _draw_row(rng: Random, habit: Habit, seen: AbstractSet[str]) -> tuple[str, str]:
    chain = draw_unseen(rng, rng.choice(habit.operations), seen, habit.family)
    solved = chain if habit.stop_after is None else chain.cut(habit.stop_after)
    solution = STYLES[habit.style](solved, slipping(rng, habit.slips))
    return prompt_text(chain.question, habit.mark), solution


def collate(rows: Sequence[tuple[str, str]], tokenizer: Qwen2Tokenizer) -> Rows:
    """Returns (prompt, solution) pairs as one batch; the end-of-turn token is part of the solution."""
    prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
    solutions = tokenizer([solution + END for _, solution in rows])["input_ids"]
    longest = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True)) - 1
    input_ids = torch.full((len(rows), longest), PAD_ID)
    labels = torch.full((len(rows), longest), IGNORED)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        joined = torch.tensor(prompt + solution)
        input_ids[row, : len(joined) - 1] = joined[:-1]
        labels[row, len(prompt) - 1 : len(joined) - 1] = joined[len(prompt) :]
    return Rows(input_ids=input_ids, labels=labels)


def solution_loss(model: Qwen2ForCausalLM, rows: Rows) -> Tensor:
    """Returns the summed cross-entropy of the batch's solution tokens, a scalar.

    Padding is on the right, so causal attention never sees it and no mask is needed.
    """
    hidden = model.model(input_ids=rows.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
    counted = rows.labels != IGNORED
    logits = model.lm_head(hidden[counted])  # [solution tokens, V]
    return F.cross_entropy(logits, rows.labels[counted], reduction="sum")


def learning_rate_at(step: int, recipe: ModelRecipe) -> float:
    """Returns the learning rate: linear warm-up, then half a cosine down to 0; `step` counts from 0."""
    warm = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def pretrain(
    recipe: ModelRecipe,
    tokenizer: Qwen2Tokenizer,
    *,
    seen: AbstractSet[str],
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Qwen2ForCausalLM:
    """Trains one model from scratch. The same recipe, seed and thread count give the same bits.

    `seen` are the questions that no training row may contain; `on_step(step, loss)` is called after each
    of the recipe's steps, counted from 1.
    """
    rng = Random(f"{recipe.name} {seed}")
    model = new_model(recipe, tokenizer, seed=rng.getrandbits(31))
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        loss = _backward(model, draw_rows(rng, recipe, tokenizer, seen))
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, loss)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _backward(model: Qwen2ForCausalLM, chunks: Sequence[Rows]) -> float:
    """Adds the gradient of the mean loss over all solution tokens of the chunks; returns that mean."""
    n_tokens = sum(int((rows.labels != IGNORED).sum()) for rows in chunks)
    mean = 0.0
    for rows in chunks:
        loss = solution_loss(model, rows) / n_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        mean += loss.item()
    return mean
