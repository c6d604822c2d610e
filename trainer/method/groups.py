"""Samples, rewards and groups.

    R = sum of weight * reward over [rewards]; by default 0.9 * correct + 0.1 * format

One rule rewards student samples and teacher traces alike. A group keeps all samples of the student, so "all
of them failed" always refers to them and never to the traces that replaced them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from precompute.verify.final_answer import has_format
from precompute.verify.verifier import Verdict, Verifier
from store.records import AnswerForm, Problem
from store.registry import lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response in a group: the student's, or a trace that replaces one of the student's."""

    token_ids: tuple[int, ...]
    """[T] response ids in the student's tokens, the final EOS included."""
    text: str
    finish_reason: str
    """`stop` or `length`."""
    is_correct: bool = False
    """The verdict; every decision about failure reads this and never the reward. False if cut."""
    has_format: bool = False
    """True if it holds exactly one final answer in the demanded form and ended by itself."""
    length_share: float = 0.0
    """Its tokens as a share of `rollout.max_completion_length`."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Name in `[rewards]`, of module:function the function's -> value, before weighting."""
    reward: float = 0.0
    """R."""
    logprobs: tuple[float, ...] | None = None
    """[T]: the sampler's for a student sample; the teacher's, at temperature 1, for a trace whose loss reads
    them; None for any other trace."""
    trace_id: str | None = None
    """Trace that it is, or that part of was inserted for it; None for any other of the student's."""
    teacher: str | None = None
    n_guided: int | None = None
    """Leading tokens that are the trace's, where the student sampled the others; None: all or none are."""
    prompt_ids: tuple[int, ...] | None = None
    """Prompt that it trains under; None: the group's."""

    @property
    def is_teacher(self) -> bool:
        return self.trace_id is not None and self.n_guided is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A problem as the student sees it."""

    problem: Problem
    text: str
    ids: tuple[int, ...]
    """[P]"""
    opens_think: bool = False
    """True if the prompt ends inside a `<think>` block, so that a response begins as thought."""
    answer_form: AnswerForm = "boxed"
    """Form in which the student must mark its final answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """G samples of one problem."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    """[G], the student's own, as sampled."""
    guidance: Mapping[int, Sample] = field(default_factory=dict)
    """Index (0..G-1) -> the trace that replaces the student's sample there."""
    extra: tuple[Sample, ...] = ()
    """Traces that train beside or instead of the student's samples."""
    own_train: bool = True
    """False where the student's own samples leave the update."""

    @property
    def problem_id(self) -> str:
        return self.prompt.problem.problem_id

    @property
    def members(self) -> tuple[Sample, ...]:
        """The group as it trains: [G], and the extra traces."""
        own = tuple(self.guidance.get(index, sample) for index, sample in enumerate(self.samples))
        return (own if self.own_train else ()) + self.extra

    @property
    def traces(self) -> tuple[Sample, ...]:
        """The traces that train."""
        return (*self.guidance.values(), *self.extra)

    @property
    def n_correct(self) -> int:
        """Number of the student's own samples that are correct."""
        return sum(sample.is_correct for sample in self.samples)

    @property
    def has_gradient(self) -> bool:
        """True if its members' rewards differ; where all are equal, every advantage is 0."""
        return len({member.reward for member in self.members}) > 1


Reward = Callable[[Problem, Sample, Verdict | None], float]
"""(problem, completion, verdict) -> value. The completion has its text, tokens, `is_correct` and
`has_format`; the verdict is None for a completion that was cut, which is not verified."""

REWARDS: dict[str, Reward] = {
    "correct": lambda problem, completion, verdict: 0.0 if verdict is None else verdict.score,
    "format": lambda problem, completion, verdict: float(completion.has_format),
}
"""Names in `[rewards]`; trainer/variants.py has more."""


class Rewarder:
    """Verifies completions and rewards them."""

    def __init__(self, verifier: Verifier, *, weights: Mapping[str, float], max_length: int) -> None:
        """
        Args:
            max_length: `rollout.max_completion_length`.
            weights: `[rewards]`, name or module:function -> weight. Raises ConfigError for an unknown name.
        """
        self.verifier = verifier
        self.max_length = max_length
        self._rewards = [
            (name.rpartition(":")[2], weight, lookup(REWARDS, name, key="rewards"))
            for name, weight in weights.items()
        ]

    def verify(self, prompt: Prompt, sample: Sample) -> Future[Verdict] | None:
        """Starts verification and returns at once; None for a sample that was cut, which is never correct."""
        if sample.finish_reason != "stop":
            return None
        # Any mark will do for correctness; letters in parentheses are no answers unless demanded.
        form = prompt.answer_form if prompt.answer_form == "letter" else None
        return self.verifier.submit(sample.text, prompt.problem, form, opens_think=prompt.opens_think)

    def reward(self, prompt: Prompt, sample: Sample, verification: Future[Verdict] | None) -> Sample:
        """Returns the sample with verdict and rewards; waits for the verification that `verify` started."""
        verdict = None if verification is None else verification.result()
        sample = replace(
            sample,
            length_share=len(sample.token_ids) / self.max_length,
            is_correct=verdict is not None and verdict.is_correct,
            has_format=verdict is not None
            and has_format(sample.text, form=prompt.answer_form, opens_think=prompt.opens_think),
        )
        values, total = {}, 0.0
        for name, weight, reward in self._rewards:
            values[name] = reward(prompt.problem, sample, verdict)
            total += weight * values[name]
        return replace(sample, rewards=values, reward=total)
