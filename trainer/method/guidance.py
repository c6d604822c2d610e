"""Guidance: query the store for groups whose samples all failed, rank the candidates, replace failed samples.

    groups --trigger--> queried --store--> candidates --selector--> the k best --> replace failed samples

Comprehension (arXiv 2510.02227, section 3.3) is how likely the student finds the right answer after reading
a teacher's reasoning. With z_c the trace up to and including the opening of its final answer, y* the gold
answer:

    s(c) = 1/|y*| * sum_i log pi_theta(y*_i | q, z_c, y*_<i)          r_p(c) = exp(s(c))

The sequence joins ids (prompt, z_c, y*), so the answer's position is known by construction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from precompute.verify.plain_numbers import plain_gold
from store.registry import lookup
from trainer.config import Config, GuidanceConfig
from trainer.method.groups import Group, Rewarder, Sample
from trainer.method.rollouts import Timer, seed_of
from trainer.method.teacher_traces import Candidate, TraceReader
from trainer.student.batches import fill, pad
from trainer.student.policy import Policy

Trigger = Callable[[Group, GuidanceConfig, Random], bool]
TRIGGERS: dict[str, Trigger] = {
    "all_fail": lambda group, config, rng: group.n_correct == 0,
    "never": lambda group, config, rng: False,
    "always": lambda group, config, rng: True,
    "solved_at_most": lambda group, config, rng: group.n_correct <= config.solved_at_most,
    "hybrid": lambda group, config, rng: group.n_correct == 0 or rng.random() < config.rate,
}
"""`guidance.trigger`: (group, `[guidance]`, generator) -> True if the store is queried for the group."""


def comprehension_scores(logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """Returns s [C] float32, the mean log-probability of the gold answer's tokens; `exp` of it is the
    paper's r_p.

    Args:
        logprobs: [C, T], column t is the log-probability of token t.
        answer_mask: [C, T] bool (or 0 and 1), true on the gold answer's tokens; at least one a row.
    """
    mask = answer_mask.bool()
    return logprobs.float().masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)


def mean_probability_scores(logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """Returns [C], the log of the mean probability of the answer's tokens, which the published code ranks by.

    Shapes as `comprehension_scores`; the log keeps both scores on one scale and the order as it is.
    """
    mask = answer_mask.bool()
    # In logs throughout: a probability of e^-200 would underflow to 0.
    total = torch.logsumexp(logprobs.float().masked_fill(~mask, -torch.inf), dim=1)
    return total - torch.log(mask.sum(dim=1))


SCORES = {"mean_logprob": comprehension_scores, "mean_prob": mean_probability_scores}
"""`guidance.score`."""


@torch.no_grad()
def answer_scores(
    policy: Policy, sequences: Sequence[tuple[Sequence[int], int]], *, score: str, max_tokens: int
) -> list[float]:
    """Returns the score of each (ids, number of answer ids at their end), in few forward passes of at most
    `max_tokens`."""
    if not all(answer_tokens for _, answer_tokens in sequences):
        raise ValueError("a candidate has no answer token to score")
    order, found = list[int](), [torch.empty(0, device=policy.device)]
    for indices in fill([len(ids) for ids, _ in sequences], max_tokens):
        rows, answers = zip(*(sequences[index] for index in indices), strict=True)
        batch = pad(rows, answers, pad_id=policy.pad_id, device=policy.device)
        found.append(SCORES[score](policy.logprobs(batch), batch.target_mask))
        order += indices
    # One copy off the device for all passes.
    scores = dict(zip(order, torch.cat(found).tolist(), strict=True))
    return [scores[index] for index in range(len(sequences))]


class Scorer:
    """Comprehension scores, computed when a selector first calls it: then for all groups of the step that
    have to choose, in few forward passes."""

    def __init__(
        self, guide: Guide, groups: Sequence[Group], candidates: Mapping[str, Sequence[Candidate]]
    ) -> None:
        self.guide = guide
        self._prompts = {group.problem_id: group.prompt for group in groups}
        self.choosing: dict[str, Sequence[Candidate]] = {}
        """problem_id -> candidates, of the groups that use some of theirs and leave others out."""
        for group in groups:
            found = candidates[group.problem_id]
            if 0 < guidance_size(group, len(found), guide.config.guidance) < len(found):
                self.choosing[group.problem_id] = found
        self.known: dict[str, float] = {}
        """trace_id -> s, of the candidates scored so far."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Returns s of each of a group's candidates.

        Raises:
            FloatingPointError: a score is not finite.
        """
        if any(candidate.trace.trace_id not in self.known for candidate in candidates):
            wanted = [*(c for found in self.choosing.values() for c in found), *candidates]
            self._score({c.trace.trace_id: c for c in wanted if c.trace.trace_id not in self.known})
        return [self.known[candidate.trace.trace_id] for candidate in candidates]

    def _score(self, candidates: Mapping[str, Candidate]) -> None:
        """Scores the sequences of prompt, z_c and gold answer; trace_id -> candidate."""
        guide, sequences = self.guide, []
        assert guide.traces is not None, "there are candidates only where there is a store"
        for candidate in candidates.values():
            prompt = self._prompts[candidate.trace.problem_id]
            answer_ids = guide.traces.encode(plain_gold(prompt.problem.answer))
            sequences.append(((*prompt.ids, *candidate.reasoning_ids, *answer_ids), len(answer_ids)))
        max_tokens, rule = guide.config.train.max_tokens_per_microbatch, guide.config.guidance.score
        scores = answer_scores(guide.policy, sequences, score=rule, max_tokens=max_tokens)
        for (trace_id, candidate), score in zip(candidates.items(), scores, strict=True):
            if not math.isfinite(score):
                raise FloatingPointError(
                    f"comprehension score of trace {trace_id} ({candidate.trace.teacher}) for problem "
                    f"{candidate.trace.problem_id} is {score}"
                )
            self.known[trace_id] = score


def guidance_size(group: Group, n_candidates: int, guidance: GuidanceConfig) -> int:
    """Returns min(k0, |C(q)|, G - 1), and never more than the group's failed samples where traces replace
    those; min(k0, |C(q)|) where they replace nothing."""
    size = len(group.samples)
    room = {"failed": min(size - 1, size - group.n_correct), "any": size - 1}
    return min(guidance.k, n_candidates, room.get(guidance.place, n_candidates))


Selector = Callable[[Group, Sequence[Candidate], Scorer, Random], list[Candidate]]
"""(group, candidates, scorer, generator) -> candidates, best first; those left out are not used."""


def comprehension(
    group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random
) -> list[Candidate]:
    """Best score first; exact ties go to the shorter trace, then to the smaller trace_id. Nothing is scored
    where all candidates will be used."""
    has_to_choose = group.problem_id in scorer.choosing
    return best_first(candidates, scorer(candidates) if has_to_choose else [0.0] * len(candidates))


def best_first(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[Candidate]:
    ordered = sorted(
        zip(scores, candidates, strict=True),
        key=lambda pair: (-pair[0], len(pair[1].token_ids), pair[1].trace.trace_id),
    )
    return [candidate for _, candidate in ordered]


def at_random(group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random) -> list[Candidate]:
    """The ablation without ranking."""
    ordered = sorted(candidates, key=lambda c: c.trace.trace_id)
    return rng.sample(ordered, len(ordered))


def shortest(group: Group, candidates: Sequence[Candidate], scorer: Scorer, rng: Random) -> list[Candidate]:
    """Shortest first, in student tokens; ties go to the smaller trace_id."""
    return sorted(candidates, key=lambda c: (len(c.token_ids), c.trace.trace_id))


SELECTORS: dict[str, Selector] = {"comprehension": comprehension, "random": at_random, "shortest": shortest}
"""`guidance.select`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRow:
    """One candidate of one query; a problem without a candidate has one row with nulls."""

    step: int
    problem_id: str
    trace_id: str | None = None
    teacher: str | None = None
    score: float | None = None
    """s; None where it was not computed."""
    n_tokens: int | None = None
    """Length in the student's tokens."""
    rank: int | None = None
    """1 is best; None where the selector left it out."""
    selected: bool = False
    latency_ms: float
    """Time of the one store query of this step."""


Inserter = Callable[[Sequence[Group], Mapping[str, Sequence[Candidate]], int], dict[str, Group]]
"""(groups, problem_id -> candidates, best first, step) -> problem_id -> group."""


@dataclass(slots=True, eq=False)
class Guide:
    """Queries, selects and replaces."""

    config: Config
    traces: TraceReader | None
    """None where the trigger never queries."""
    policy: Policy
    rewarder: Rewarder
    inserter: Inserter | None = None
    """Uses the traces where `guidance.insert` is not `trace`."""

    def guide(
        self, groups: Sequence[Group], *, step: int, timer: Timer = nullcontext
    ) -> tuple[list[Group], list[QueryRow]]:
        """Returns the groups with guidance, and a row for each candidate.

        `timer` gets `query` (the store, and traces into the student's tokens), `score` and `place`.
        """
        is_triggered = lookup(TRIGGERS, self.config.guidance.trigger, key="guidance.trigger")
        select = lookup(SELECTORS, self.config.guidance.select, key="guidance.select")
        guidance, seed = self.config.guidance, self.config.train.seed
        queried = [
            group
            for group in groups
            if step > guidance.start
            and is_triggered(group, guidance, Random(seed_of(seed, "trigger", step, group.problem_id)))
        ]
        if not queried or self.traces is None:
            return list(groups), []
        with timer("query"):
            started = time.perf_counter()
            found = self.traces.query([group.prompt for group in queried])
            latency_ms = (time.perf_counter() - started) * 1000
            candidates = {
                group.problem_id: self.traces.candidates(group.prompt, found[group.problem_id])
                for group in queried
            }
        with timer("score"):
            scorer, ranked = Scorer(self, queried, candidates), {}
            for group in queried:
                rng = Random(seed_of(seed, "select", step, group.problem_id))
                ranked[group.problem_id] = select(group, candidates[group.problem_id], scorer, rng)
        with timer("place"):
            guided = (self.inserter or self._place)(queried, ranked, step)
        rows = []
        for group in queried:
            best_first = ranked[group.problem_id]
            left_out = [c for c in candidates[group.problem_id] if c not in best_first]
            used = {trace.trace_id for trace in guided[group.problem_id].traces}
            empty = QueryRow(step=step, problem_id=group.problem_id, latency_ms=latency_ms)
            rows += [
                replace(
                    empty,
                    trace_id=candidate.trace.trace_id,
                    teacher=candidate.trace.teacher,
                    score=scorer.known.get(candidate.trace.trace_id),
                    n_tokens=len(candidate.token_ids),
                    rank=rank if rank <= len(best_first) else None,
                    selected=candidate.trace.trace_id in used,
                )
                for rank, candidate in enumerate([*best_first, *left_out], start=1)
            ] or [empty]
        return [guided.get(group.problem_id, group) for group in groups], rows

    def _place(
        self, groups: Sequence[Group], ranked: Mapping[str, Sequence[Candidate]], step: int
    ) -> dict[str, Group]:
        """Returns problem_id -> group with its best traces. A trace gets the reward that the same verifier
        and the same rule give it."""
        verifying = []
        for group in groups:
            best_first = ranked[group.problem_id]
            size = guidance_size(group, len(best_first), self.config.guidance)
            samples = [candidate.sample for candidate in best_first[:size]]
            verifying.append([(sample, self.rewarder.verify(group.prompt, sample)) for sample in samples])
        guided = {}
        for group, pending in zip(groups, verifying, strict=True):
            traces = [self.rewarder.reward(group.prompt, *each) for each in pending]
            guided[group.problem_id] = placed(group, traces, self.config, step)
        return guided


def placed(group: Group, members: Sequence[Sample], config: Config, step: int) -> Group:
    """Returns the group with further members, which replace samples at random indices or train beside or
    instead of them."""
    place = config.guidance.place
    if place not in ("failed", "any"):
        own_train = place != "instead" or not members
        return replace(group, extra=tuple(members), own_train=own_train)
    free = [i for i, sample in enumerate(group.samples) if place == "any" or not sample.is_correct]
    rng = Random(seed_of(config.train.seed, "place", step, group.problem_id))
    indices = sorted(rng.sample(free, len(members)))
    return replace(group, guidance=dict(zip(indices, members, strict=True)))
