"""A stored trace in the student's answer format and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from precompute.engines.decoding import without_ends
from precompute.verify.final_answer import CLOSING, OPENING, FinalAnswer, find_answer, to_form
from store.errors import StoreError
from store.records import AnswerForm, Trace
from trainer.method.groups import Prompt, Sample
from trainer.student.policy import Policy

QUERY_PROBLEMS = 256
"""Problems of one query where traces of all problems are read."""


class CandidateStore(Protocol):
    """The part of the store that the trainer reads."""

    def candidates(
        self, problem_ids: Sequence[str], *, teachers: Sequence[str] | None = None, tokens: bool = False
    ) -> Mapping[str, Sequence[Trace]]:
        """Returns the verified traces of each problem; an empty sequence where there are none.

        `teachers`: None for all. `tokens`: with the teacher's own token ids and log-probs.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A trace in the student's tokens and answer form."""

    trace: Trace
    sample: Sample
    """The trace as a sample that is not verified yet."""
    reasoning_ids: tuple[int, ...]
    """z_c, up to and including the opening of the final answer."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """[T], the student's EOS included."""
        return self.sample.token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReader:
    """Reads traces from the store as candidates; nothing is cut but control tokens behind the end."""

    store: CandidateStore
    student: Policy
    teachers: Sequence[str] = ()
    """Teachers whose traces are read; empty: all."""
    max_length: int
    """Most student tokens of a candidate; half a solution is no solution, so a longer trace is left out."""
    own_ids: bool = False
    """Keeps the teacher's own tokens and log-probs; StoreError where the tokens are not the student's."""
    control: Mapping[str, int] = field(default_factory=dict)
    """Control tokens of the student: token -> id. A text that holds one would train turns of others."""
    on_refused: Callable[[Trace, str], None] = lambda trace, token: None
    """Called for each trace that is left out for such a token."""

    def query(self, prompts: Sequence[Prompt]) -> Mapping[str, Sequence[Trace]]:
        """Returns problem_id -> its verified traces, by one query of the store."""
        ids = [prompt.problem.problem_id for prompt in prompts]
        return self.store.candidates(ids, teachers=self.teachers or None, tokens=self.own_ids)

    def candidates(self, prompt: Prompt, traces: Sequence[Trace]) -> list[Candidate]:
        """Returns the traces of a prompt's problem as candidates, without those that are too long or hold
        control tokens."""
        found = [self.candidate(trace, prompt) for trace in traces]
        fitting = [candidate for candidate in found if len(candidate.token_ids) <= self.max_length]
        return [candidate for candidate in fitting if not self._is_refused(candidate)]

    def _is_refused(self, candidate: Candidate) -> bool:
        ids = set(candidate.token_ids[:-1])
        token = next((token for token, index in self.control.items() if index in ids), None)
        if token is not None:
            self.on_refused(candidate.trace, token)
        return token is not None

    def all_candidates(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, list[Candidate]]]:
        """Yields each prompt with its candidates, by queries of QUERY_PROBLEMS problems."""
        for start in range(0, len(prompts), QUERY_PROBLEMS):
            part = prompts[start : start + QUERY_PROBLEMS]
            found = self.query(part)
            yield from (
                (prompt, self.candidates(prompt, found[prompt.problem.problem_id])) for prompt in part
            )

    def candidate(self, trace: Trace, prompt: Prompt) -> Candidate:
        """Returns the trace as it follows the prompt."""
        opened = prompt.text.rpartition("<think>")[2] if prompt.opens_think else None
        reasoning, text = in_students_form(trace, prompt.answer_form, opened=opened)
        text = without_ends(text, self.control)
        reasoning = reasoning[: len(text)]
        has_own_ids = len(trace.logprobs) == len(trace.token_ids) > 0
        ends = has_own_ids and trace.token_ids[-1] in self.student.eos_ids
        if self.own_ids and not (text == trace.text and ends):
            raise StoreError(
                f'guidance.loss = "shaped_ratio": trace {trace.trace_id} of {trace.teacher} has no log-probs '
                "of the tokens that the student has to write (its answer form, its EOS); use "
                'guidance.loss = "shaped", or leave the teacher out of guidance.teachers'
            )
        sample = Sample(
            token_ids=trace.token_ids if self.own_ids else (*self.encode(text), self.student.eos_id),
            text=text,
            finish_reason=trace.finish_reason,
            logprobs=trace.logprobs if self.own_ids else None,
            trace_id=trace.trace_id,
            teacher=trace.teacher,
        )
        return Candidate(trace=trace, sample=sample, reasoning_ids=self.encode(reasoning))

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the student's ids of `text`, without special tokens."""
        return tuple(self.student.tokenizer(text, add_special_tokens=False)["input_ids"])


def in_students_form(trace: Trace, form: AnswerForm, *, opened: str | None) -> tuple[str, str]:
    """Returns (z_c, text): the trace as the student must write it. A student whose prompt ends inside
    `<think>` closes it first; a thought that the teacher's prompt opened is opened in the text.

    `opened`: the prompt's text behind its open `<think>`; None where it opens no thought.
    """
    reasoning, ending, has_thought = trace.text, "", "</think>" in trace.text
    if trace.answer_start is not None:  # otherwise its verifier read the whole response
        solution = _verified_answer(trace)
        reasoning, rest = to_form(trace.text, solution, form)
        answer = str(solution.answer)
        inner = find_answer(answer, form="boxed")
        if inner.answer is not None and inner.opening_start == 0 and inner.closing_end == len(answer):
            answer = inner.answer  # `\boxed{4}` inside answer tags is the answer 4
        ending = f"{answer}{CLOSING[form]}{rest}"
    if opened is not None and not has_thought:
        reasoning = f"</think>\n\n{reasoning}"
    elif opened is not None:
        if reasoning.lstrip().startswith("<think>"):
            reasoning = reasoning.lstrip().removeprefix("<think>").removeprefix(opened)
    elif has_thought and "<think>" not in trace.text.split("</think>")[0]:
        reasoning = f"<think>\n{reasoning}"
    return reasoning, f"{reasoning}{ending}"


def _verified_answer(trace: Trace) -> FinalAnswer:
    """Returns the answer that the verifier read: the one at `answer_start`."""
    for form in (None, *OPENING):
        for thinking in (False, True):
            solution = find_answer(trace.text, form=form, opens_think=thinking)
            if solution.answer_start is not None and solution.answer_start == trace.answer_start:
                return solution
    raise StoreError(f"trace {trace.trace_id} of {trace.teacher} has no answer at {trace.answer_start}")
