"""The records that travel through ampo, on one page.

    Problem --(teacher engine)--> Trace --(store)--> Trace --(trainer)--> guidance

Ids are content hashes, so that doing a thing twice changes nothing:

    problem_id = hash(question, answer)
    trace_id   = hash(problem_id, teacher, sample_index, text)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Any, Literal, Self

VERDICTS = ("match", "mismatch", "no_answer", "gold_unparseable", "timeout", "error")
"""Every way a verification can end; only `match` is a correct answer."""

FINISH_REASONS = ("stop", "length")
"""`stop`: the model ended by itself with an EOS token; `length`: it was cut."""


def content_hash(*parts: object) -> str:
    """16 hex digits of blake2b over the parts; JSON keeps ("a", "bc") and ("ab", "c") apart."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A verifiable problem: a question and the gold answer that decides."""

    question: str
    """What the user turn of the prompt says, e.g. `What is 2 + 2?`"""
    answer: str
    """The gold answer as the data gives it, e.g. `\\frac{7}{4}`"""
    source: str = ""
    """Where it comes from, e.g. `aime`; for tables only, no part of the identity."""
    system_prompt: str | None = None
    """A system turn that came with the data (the verl form embeds one); None when it brought none."""
    repeats: int = field(default=1, compare=False)
    """Rows of its file that state it: how many samples of it an evaluation takes at least; no part of the
    identity, and not stored."""
    problem_id: str = field(init=False)
    """Content hash of (question, answer)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "problem_id", content_hash(self.question, self.answer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One solution that a teacher wrote, with the verdict on it. Wrong ones are kept too."""

    problem_id: str
    teacher: str
    """The name that the config gives the teacher, e.g. `qwen-math`."""
    sample_index: int
    """0-based: the how-maniest sample of this (problem, teacher) pair."""
    text: str
    """The completion as the teacher wrote it, special tokens left out."""
    answer: str | None
    """The final answer found in the text; None when there is none."""
    answer_start: int | None
    """Character offset in `text` at which the answer's content begins: z_c is `text[:answer_start]`."""
    n_tokens: int
    """Length in the teacher's tokens, the EOS token included."""
    token_ids: tuple[int, ...]
    """The teacher's own token ids, [n_tokens]; ends with the EOS id when it stopped by itself."""
    logprobs: tuple[float, ...]
    """The teacher's log-probability of each of its tokens at temperature 1, [n_tokens]."""
    finish_reason: str
    """One of FINISH_REASONS."""
    verdict: str
    """One of VERDICTS."""
    is_correct: bool
    """verdict == "match" and the response was not cut."""
    seed: int
    """What the sampler was seeded with for this sample alone."""
    generation_fingerprint: str
    """Hash of the recipe (model, revision, template, sampling) that made it."""
    created_at: datetime
    """UTC."""
    verdict_detail: str = ""
    """Why, in words, where the verdict alone does not say it."""
    parsed_answer: str | None = None
    """What the verifier read in `answer`, as sympy writes it; None where it read nothing."""
    parsed_gold: str | None = None
    """What the verifier read in the problem's gold answer; None where it was not asked."""
    filtered: str | None = None
    """Why a filter keeps the trace from the student, e.g. `repetition: ...`; None: it may be used."""
    trace_id: str = field(init=False)
    """Content hash of (problem_id, teacher, sample_index, text)."""

    def __post_init__(self) -> None:
        trace_id = content_hash(self.problem_id, self.teacher, self.sample_index, self.text)
        object.__setattr__(self, "trace_id", trace_id)

    @classmethod
    def stored(cls, **fields: Any) -> Self:
        """The trace that a store holds, `trace_id` and every other field given: hashing the texts again
        would cost as much as reading them, and the page they came from has a checksum."""
        trace = object.__new__(cls)
        for name in cls.__dataclass_fields__:
            object.__setattr__(trace, name, fields[name])
        return trace

    @property
    def is_usable(self) -> bool:
        """Whether the trace may guide the student: verified, and no filter holds it back."""
        return self.is_correct and self.filtered is None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord:
    """How a teacher's traces were made: enough to make them again."""

    name: str
    model: str
    revision: str | None
    engine: str
    """`vllm` or `transformers`."""
    engine_version: str
    chat_template: str
    """The Jinja source that turned messages into the prompt."""
    system_prompt: str | None
    """None: each problem's own."""
    chat_template_kwargs: Mapping[str, Any]
    sampling: Mapping[str, Any]
    """temperature, top_p, max_tokens."""
    tokenizer_fingerprint: str
    """Hash of the vocabulary: `ratio = "teacher"` needs the student's to be the same."""
    answer_form: Literal["boxed", "answer_tags"] | None = None
    """The form in which its answers are looked for; None: as its system turn demands."""
    filters: Mapping[str, Any] = field(default_factory=dict)
    """What holds traces back (config: [filters]). No part of the recipe: what is filtered is settled by the
    stored text, and settled anew without drawing anything."""

    @property
    def recipe(self) -> dict[str, Any]:
        """What must not change under one teacher name. The engine is provenance, not recipe:
        the same model under the same sampling gives the same distribution from either."""
        return {
            "model": self.model,
            "revision": self.revision,
            "chat_template": self.chat_template,
            "system_prompt": self.system_prompt,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "sampling": dict(self.sampling),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            # Absent where it is None: the traces of an older ampo keep their fingerprint.
            **({} if self.answer_form is None else {"answer_form": self.answer_form}),
        }

    @property
    def generation_fingerprint(self) -> str:
        """Content hash of the recipe."""
        return content_hash(self.recipe)
