"""Variants beyond the paper: rewards, objectives, guided losses with their schedule, selectors.

Importing this module enters them into the registries of `trainer.method`. docs/methods.md has the formulas,
their sources, and the files in configs/methods that use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from random import Random

import torch
from torch import Tensor

from precompute.run.filters import other_letters, repetition, script_of
from precompute.verify.verifier import Verdict
from store.records import Problem
from trainer.config import GuidanceConfig, TrainConfig
from trainer.method.groups import REWARDS, Group, Sample
from trainer.method.guidance import (
    SELECTORS,
    Scorer,
    answer_scores,
    best_first,
    comprehension,
    shortest,
)
from trainer.method.loss import (
    GUIDED_LOSSES,
    OBJECTIVES,
    GuidedLoss,
    GuidedTerms,
    LossInputs,
    StepCounts,
    Terms,
    clipped_surrogate,
    shaped,
)
from trainer.method.teacher_traces import Candidate


def overlong(problem: Problem, completion: Sample, verdict: Verdict | None) -> float:
    """0 up to 80 % of the longest response, then falling to -1 (DAPO, arXiv 2503.14476, equation 13)."""
    return -min(max((completion.length_share - 0.8) / 0.2, 0.0), 1.0)


def language(problem: Problem, completion: Sample, verdict: Verdict | None) -> float:
    """Share of letters that come from the writing systems of the question."""
    scripts = {script_of(letter) for letter in problem.question if letter.isalpha()} or {"latin"}
    return 1.0 - other_letters(completion.text, scripts)


def cispo(inputs: LossInputs, train: TrainConfig) -> Terms:
    """sg(min(rho, 1 + eps_high)) * A * log pi_theta (MiniMax-M1, arXiv 2506.13585): clipping takes no token's
    gradient."""
    ratio = torch.exp(inputs.logprobs.detach() - inputs.old_logprobs)
    terms = ratio.clamp(max=1.0 + train.eps_high) * inputs.advantages * inputs.logprobs
    return terms, {"clip_ratio/high_mean": ratio > 1 + train.eps_high}


def _nll(factor: Callable[[Tensor, LossInputs], Tensor]) -> GuidedLoss:
    """Returns the loss sg(factor(p, inputs)) * -log p, a mean over the guided tokens of the step."""

    def loss(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
        weights = factor(torch.exp(inputs.logprobs.detach()), inputs)
        return weights * inputs.logprobs, 1.0 / max(counts.guided_tokens, 1), {"guided/nll": -inputs.logprobs}

    return loss


def mean_entropy(inputs: LossInputs) -> Tensor:
    """Returns H [B, 1], the student's mean entropy over each response, without gradient."""
    mask = inputs.response_mask
    total = inputs.entropy.detach().masked_fill(~mask, 0.0).sum(dim=1, keepdim=True)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


nll_entropy = _nll(lambda p, inputs: 0.5 * torch.exp(-mean_entropy(inputs)))


def srft(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
    """nll_entropy and shaped together, as a mean over the guided tokens (SRFT, arXiv 2506.19767)."""
    supervised, weight, metrics = nll_entropy(inputs, counts, guidance)
    return supervised + shaped(inputs, counts, guidance)[0], weight, metrics


def srft_own(inputs: LossInputs, train: TrainConfig) -> Terms:
    """SRFT's terms of the student's tokens: 0.1 exp(H) log p where the advantage is positive, -log p where it
    is negative; without ratio and clipping."""
    up = 0.1 * torch.exp(mean_entropy(inputs))
    return torch.where(inputs.advantages > 0, up, inputs.advantages.sign()) * inputs.logprobs, {}


def mixture(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
    """RL-PLUS: 2p / (p_old + (p_old + 1) / 2) * A * sg(1 - p)^0.5, unclipped: importance sampling against the
    mixture of the old policy and one that writes the trace, and more weight for what is unlikely."""
    p, old = torch.exp(inputs.logprobs), torch.exp(inputs.old_logprobs)
    ratio = 2 * p / (old + 0.5 * (old + 1))
    return ratio * inputs.advantages * (1 - p.detach()).clamp(min=0).sqrt(), None, {}


def policy(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
    """The clipped surrogate, as if the student had written the trace."""
    ratio = {"eps_low": 0.2, "eps_high": 0.2}
    return clipped_surrogate(inputs.logprobs, inputs.old_logprobs, inputs.advantages, **ratio), None, {}


def policy_uncertain(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
    """`policy` on the fifth of a response's guided tokens with the highest entropy (Prefix-RFT)."""
    mask = inputs.response_mask
    entropy = inputs.entropy.detach().masked_fill(~mask, -torch.inf)
    rank = entropy.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = rank < torch.ceil(0.2 * mask.sum(dim=1, keepdim=True))
    return policy(inputs, counts, guidance)[0].masked_fill(~kept, 0.0), None, {}


def self_kl(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
    """KL(p || p_context) by the sampled tokens: sg(log p_context - log p) * log p (SDFT)."""
    gap = inputs.teacher_logprobs - inputs.logprobs.detach()
    return gap * inputs.logprobs, 1.0 / max(counts.guided_tokens, 1), {"guided/kl": -gap}


SUPERVISED = ("nll", "nll_p", "nll_phi", "nll_entropy", "srft", "self_kl")
"""Guided losses without advantages: their traces train in every group."""


def guided_weight(step: int, steps: int, guidance: GuidanceConfig) -> float:
    """Returns mu of a 1-based step of `steps`, a pure function of both."""
    peak, end, warmup = guidance.weight, guidance.weight_end, guidance.weight_warmup
    if guidance.weight_schedule == "constant":
        return peak
    if step <= warmup:
        return 0.0 if guidance.weight_schedule == "after" else peak * step / warmup
    done = (step - 1 - warmup) / max(steps - 1 - warmup, 1)
    share = {"after": 0.0, "linear": done, "cosine": 0.5 * (1 - math.cos(math.pi * done))}
    return peak + (end - peak) * share[guidance.weight_schedule]


def worst(group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random) -> list[Candidate]:
    """Lowest comprehension score first: the control of `comprehension`."""
    return comprehension(group, candidates, scorer, rng)[::-1]


def likelihood(group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random) -> list[Candidate]:
    """The trace first whose own tokens the student finds likeliest, by their mean log-probability."""
    sequences = [
        ((*group.prompt.ids, *candidate.token_ids), len(candidate.token_ids)) for candidate in candidates
    ]
    guide = scorer.guide
    max_tokens = guide.config.train.max_tokens_per_microbatch
    scores = answer_scores(guide.policy, sequences, score="mean_logprob", max_tokens=max_tokens)
    return best_first(candidates, scores)


def round_robin(
    group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random
) -> list[Candidate]:
    """One trace of each teacher before the second of any; the teachers in random order."""
    by_teacher: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: c.trace.trace_id):
        by_teacher.setdefault(candidate.trace.teacher, []).append(candidate)
    teachers = rng.sample(sorted(by_teacher), len(by_teacher))
    rounds = zip_longest(*(by_teacher[teacher] for teacher in teachers))
    return [candidate for each in rounds for candidate in each if candidate is not None]


REWARDS.update(
    length=lambda problem, completion, verdict: 1.0 - completion.length_share,
    overlong=overlong,
    # Minus the share of 20-grams, in words and symbols, that occur earlier in the response.
    repetition=lambda problem, completion, verdict: -repetition(completion.text, 20),
    language=language,
)
SELECTORS.update(
    longest=lambda *arguments: shortest(*arguments)[::-1],
    likelihood=likelihood,
    round_robin=round_robin,
    worst=worst,
)
OBJECTIVES.update(cispo=cispo, srft=srft_own)
GUIDED_LOSSES.update(
    nll=_nll(lambda p, inputs: torch.ones_like(p)),
    nll_p=_nll(lambda p, inputs: p),
    nll_phi=_nll(lambda p, inputs: p * (1 - p)),
    nll_entropy=nll_entropy,
    srft=srft,
    mixture=mixture,
    policy=policy,
    policy_uncertain=policy_uncertain,
    self_kl=self_kl,
)
