"""The reward rule, one for student and teacher alike.

    R = (1 - w_f) * correct + w_f * format

`correct` is the verifier's boolean; `format` is 1 when the response holds exactly one final answer in the
demanded form and ended by itself. A cut response is never correct.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from precompute.config import AnswerForm
from precompute.verify.final_answer import has_format
from precompute.verify.verifier import Verdict, Verifier
from trainer.method.groups import Sample


def reward_of(*, is_correct: bool, has_format: bool, format_weight: float) -> float:
    """R in [0, 1]."""
    return (1.0 - format_weight) * is_correct + format_weight * has_format


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingSample:
    """A response whose verdict is on its way."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    text: str
    finish_reason: str
    verdict: Future[Verdict] | None
    """None: the response was cut, so nothing about its answer matters."""
    opens_think: bool = False
    trace_id: str | None = None
    teacher: str | None = None

    @property
    def is_judged(self) -> bool:
        """Whether `Judge.settle` returns at once."""
        return self.verdict is None or self.verdict.done()


class Judge:
    """Sends responses to the verifier and turns verdicts into rewarded samples."""

    def __init__(self, verifier: Verifier, *, answer_form: AnswerForm, format_weight: float) -> None:
        self.verifier = verifier
        self.answer_form = answer_form
        self.format_weight = format_weight

    def submit(
        self,
        *,
        text: str,
        gold: str,
        token_ids: tuple[int, ...],
        finish_reason: str,
        logprobs: tuple[float, ...] | None = None,
        opens_think: bool = False,
        trace_id: str | None = None,
        teacher: str | None = None,
    ) -> PendingSample:
        """Starts verification and returns at once, so that sampling goes on meanwhile.

        `opens_think`: the prompt ended inside a `<think>` block, so the response begins as thought.
        """
        verdict = None
        if finish_reason == "stop":
            verdict = self.verifier.submit(text, gold, opens_think=opens_think)
        return PendingSample(
            token_ids=token_ids,
            logprobs=logprobs,
            text=text,
            finish_reason=finish_reason,
            verdict=verdict,
            opens_think=opens_think,
            trace_id=trace_id,
            teacher=teacher,
        )

    def settle(self, pending: PendingSample) -> Sample:
        """Waits for the verdict and applies the reward rule."""
        is_correct = pending.verdict is not None and pending.verdict.result().is_correct
        well_formed = pending.finish_reason == "stop" and has_format(
            pending.text, form=self.answer_form, opens_think=pending.opens_think
        )
        return Sample(
            token_ids=pending.token_ids,
            text=pending.text,
            finish_reason=pending.finish_reason,
            is_correct=is_correct,
            has_format=well_formed,
            reward=reward_of(is_correct=is_correct, has_format=well_formed, format_weight=self.format_weight),
            logprobs=pending.logprobs,
            trace_id=pending.trace_id,
            teacher=pending.teacher,
        )
