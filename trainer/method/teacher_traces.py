"""The store's traces as the student must write them, in its tokens; tokenised once, while memory lasts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from precompute.config import AnswerForm
from store.errors import StoreError
from store.records import TeacherRecord, Trace
from trainer.method.rollouts import Prompt
from trainer.method.student_form import in_students_form

CACHED_TOKENS = 2**21
"""Student tokens whose traces are kept, some 200 MB: 512 traces of 4,096 tokens."""

ASKED_AT_ONCE = 256
"""Problems of one look-up where the whole store is gone through."""


class CandidateStore(Protocol):
    """All that the trainer sees of the store."""

    def candidates(
        self, problem_ids: Sequence[str], *, teachers: Sequence[str] | None = None, tokens: bool = False
    ) -> Mapping[str, Sequence[Trace]]:
        """The verified traces of each problem; a problem without one maps to an empty sequence.

        `teachers`: None for all. `tokens`: with the teacher's own token ids and log-probs.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTrace:
    """A trace in the student's tokens and answer form."""

    trace: Trace
    text: str
    token_ids: tuple[int, ...]
    """[T], the student's EOS included."""
    reasoning_ids: tuple[int, ...]
    """z_c, up to and including the opening of the final answer."""
    teacher_logprobs: tuple[float, ...] | None
    """[T] under `ratio = "teacher"`."""


class _HasTokens(Protocol):
    @property
    def token_ids(self) -> tuple[int, ...]: ...


V = TypeVar("V", bound=_HasTokens)


class Recent(Generic[V]):
    """The values that were asked for last, as many as hold `capacity` tokens together; those that fall out
    are made again when they are asked for."""

    def __init__(self, capacity: int = CACHED_TOKENS) -> None:
        self.capacity = capacity
        self.tokens = 0
        """Held now."""
        self._values: OrderedDict[object, V] = OrderedDict()

    def get(self, key: object, make: Callable[[], V]) -> V:
        """The value of `key`, made where it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        self.tokens += len(value.token_ids)
        while self.tokens > self.capacity:
            _, oldest = self._values.popitem(last=False)
            self.tokens -= len(oldest.token_ids)
        return value


class StudentTokens(Protocol):
    """What is known of a student's tokens, its weights loaded (`Policy`) or not."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    """All that end a response."""
    eos_id: int
    """Ends a trace."""


class TraceTokens:
    """Turns traces into the student's tokens; nothing is cut."""

    def __init__(self, policy: StudentTokens, form: AnswerForm, *, own_ids: bool) -> None:
        self.policy = policy
        self.form = form
        """In which the student must answer."""
        self.own_ids = own_ids
        """`ratio = "teacher"`: the teacher's own tokens, StoreError where they are not the student's."""
        self._recent: Recent[StudentTrace] = Recent()

    def of(self, trace: Trace, *, opens_think: bool) -> StudentTrace:
        """The trace behind a prompt that ends inside `<think>`, or does not."""
        return self._recent.get(
            (trace.trace_id, opens_think), lambda: self._tokenised(trace, opens_think=opens_think)
        )

    def _tokenised(self, trace: Trace, *, opens_think: bool) -> StudentTrace:
        """The teacher's form is mapped explicitly to the student's."""
        reasoning, text = in_students_form(trace, self.form, opens_think=opens_think)
        if self.own_ids:
            self._check_own_ids(trace, text)
        return StudentTrace(
            trace=trace,
            text=text,
            token_ids=trace.token_ids if self.own_ids else (*self.encode(text), self.policy.eos_id),
            reasoning_ids=self.encode(reasoning),
            teacher_logprobs=trace.logprobs if self.own_ids else None,
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Without special tokens."""
        return tuple(self.policy.tokenizer(text, add_special_tokens=False)["input_ids"])

    def check_teacher_ratio(
        self, store: CandidateStore, prompts: Sequence[Prompt], teachers: Sequence[str]
    ) -> None:
        """Before training under `ratio = "teacher"`: every trace that may be asked for must bear it."""
        for start in range(0, len(prompts), ASKED_AT_ONCE):
            part = {
                prompt.problem.problem_id: prompt.opens_think
                for prompt in prompts[start : start + ASKED_AT_ONCE]
            }
            found = store.candidates(list(part), teachers=teachers or None, tokens=True)
            for problem_id, traces in found.items():
                for trace in traces:
                    _, text = in_students_form(trace, self.form, opens_think=part[problem_id])
                    self._check_own_ids(trace, text)

    def _check_own_ids(self, trace: Trace, text: str) -> None:
        """StoreError unless the teacher's own tokens are what the student would have to write."""
        reason = None
        if text != trace.text:
            reason = "answers in another form than the student, so its log-probs are of other tokens"
        elif not len(trace.logprobs) == len(trace.token_ids) > 0:
            reason = f"has {len(trace.logprobs)} log-probs for {len(trace.token_ids)} tokens"
        elif trace.token_ids[-1] not in self.policy.eos_ids:
            reason = "does not end with an EOS token of the student's"
        if reason is not None:
            raise StoreError(
                f'guidance.ratio = "teacher": trace {trace.trace_id} of {trace.teacher} {reason}; '
                f'use ratio = "student", or leave the teacher out of guidance.teachers'
            )


def check_tokenizers(
    teachers: Mapping[str, TeacherRecord], student_fingerprint: str, used: Sequence[str]
) -> None:
    """`ratio = "teacher"` compares probabilities of the same tokens: StoreError unless vocabularies agree."""
    for name in used or sorted(teachers):
        if teachers[name].tokenizer_fingerprint != student_fingerprint:
            raise StoreError(
                f'guidance.ratio = "teacher" needs the student\'s tokenizer in every teacher, and {name!r} '
                f'({teachers[name].model}) has another; use ratio = "student"'
            )
