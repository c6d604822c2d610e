"""Comprehension: how likely the student finds the right answer after reading a teacher's reasoning.

    s(c) = 1/|y*| * sum_i log pi_theta(y*_i | q, z_c, y*_<i)          r_p(c) = exp(s(c))

z_c is the trace up to and including the opening of its final answer, y* the gold answer. The sequence is
built by joining ids (prompt, z_c, y*), so the answer's place is known by construction.

Pure functions. Source: arXiv 2510.02227, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingSequence:
    """What the student reads to score one trace."""

    ids: tuple[int, ...]
    """[L]: prompt, z_c, y*."""
    answer_length: int
    """|y*|: the last so many ids are the gold answer."""


def reading_sequence(
    *, prompt_ids: Sequence[int], reasoning_ids: Sequence[int], answer_ids: Sequence[int]
) -> ReadingSequence:
    """Joins prompt, reasoning (z_c, its answer's opening included) and gold answer.

    Raises:
        ValueError: the gold answer has no token, so its mean log-probability does not exist.
    """
    if not answer_ids:
        raise ValueError("the gold answer has no tokens")
    return ReadingSequence(ids=(*prompt_ids, *reasoning_ids, *answer_ids), answer_length=len(answer_ids))


def bare_answer(gold: str) -> str:
    """The gold answer as it stands inside a box: `$\\frac{7}{4}$` loses its dollar signs."""
    bare = gold.strip()
    is_one_formula = len(bare) > 2 and bare[0] == bare[-1] == "$" and "$" not in bare[1:-1]
    return bare[1:-1].strip() if is_one_formula else bare


def comprehension_scores(logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """s, the mean log-probability of the gold answer's tokens.

    Args:
        logprobs: [C, T], column t is the log-probability of token t.
        answer_mask: [C, T] bool (or 0 and 1), true on the gold answer's tokens; at least one a row.

    Returns:
        [C] float32, at most 0; `exp` of it is the paper's r_p, in (0, 1].
    """
    mask = answer_mask.bool()
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a candidate has no answer token to score")
    return logprobs.float().masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)


def mean_probability_scores(logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """log of the mean probability of the answer's tokens: what the published code ranks by.

    Shapes as `comprehension_scores`; the log keeps both scores on one scale and leaves the order as it is.
    """
    mask = answer_mask.bool()
    # In logs throughout: a probability of e^-200 would underflow to 0.
    total = torch.logsumexp(logprobs.float().masked_fill(~mask, -torch.inf), dim=1)
    return total - torch.log(mask.sum(dim=1))


SCORES = {"mean_logprob": comprehension_scores, "mean_prob": mean_probability_scores}
"""`guidance.score`."""
