"""Samples and groups: what a step is made of. Pure records and rules, no I/O.

    Group: one problem, its G student samples, and the guidance that took the places of some of them

The student's own samples stay in the group, so "all of them failed" is always asked of them and never of
what replaced them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from store.records import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response of a group: the student's, or a trace that took a place."""

    token_ids: tuple[int, ...]
    """[T] response ids in the student's tokens, the final EOS included."""
    text: str
    finish_reason: str
    """`stop` or `length`."""
    is_correct: bool
    """The verifier's boolean; every decision about failure reads this and nothing else."""
    has_format: bool
    reward: float
    """R = (1 - w_f) * correct + w_f * format."""
    logprobs: tuple[float, ...] | None = None
    """[T]: the sampler's for a student sample; the teacher's, at temperature 1, for a trace under
    `ratio = "teacher"`, None for any other trace."""
    trace_id: str | None = None
    """None for the student's own."""
    teacher: str | None = None

    @property
    def is_teacher(self) -> bool:
        return self.trace_id is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """G samples of one problem."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    """[P]"""
    samples: tuple[Sample, ...]
    """[G], the student's own, as sampled."""
    opens_think: bool = False
    """The prompt ends inside a `<think>` block, so a response begins as thought."""
    guidance: Mapping[int, Sample] = field(default_factory=dict)
    """place (0..G-1) -> the trace that trains there instead of the student's sample."""

    @property
    def members(self) -> tuple[Sample, ...]:
        """[G], the group as it trains."""
        return tuple(self.guidance.get(place, sample) for place, sample in enumerate(self.samples))

    @property
    def outcome(self) -> str:
        """`all_fail`, `all_solved` or `mixed`, by the student's own samples."""
        solved = sum(sample.is_correct for sample in self.samples)
        return {0: "all_fail", len(self.samples): "all_solved"}.get(solved, "mixed")

    @property
    def has_gradient(self) -> bool:
        """Its members' rewards differ; where they are all equal every advantage is 0."""
        return len({member.reward for member in self.members}) > 1


TRIGGERS: dict[str, frozenset[str]] = {
    "all_fail": frozenset({"all_fail"}),
    "never": frozenset(),
    "always": frozenset({"all_fail", "mixed", "all_solved"}),
}
"""`guidance.trigger` -> the outcomes of groups that ask the store."""


def outcome_shares(groups: Sequence[Group]) -> dict[str, float]:
    """Share of groups by outcome, before any replacement."""
    counts = Counter(group.outcome for group in groups)
    return {name: counts[name] / len(groups) for name in ("all_fail", "all_solved", "mixed")}


def guidance_size(group: Group, n_candidates: int, k: int) -> int:
    """min(k0, |C(q)|, G - 1), and never more than the group has failed samples to give up."""
    failed = sum(not sample.is_correct for sample in group.samples)
    return min(k, n_candidates, len(group.samples) - 1, failed)


def place_guidance(group: Group, traces: Sequence[Sample], rng: Random) -> Group:
    """The group with `traces` in the places of as many failed samples, drawn without replacement by `rng`."""
    failed = [place for place, sample in enumerate(group.samples) if not sample.is_correct]
    places = sorted(rng.sample(failed, len(traces)))
    return replace(group, guidance=dict(zip(places, traces, strict=True)))
