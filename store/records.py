"""The records of the whole pipeline, on one page.

    Problem --(teacher engine)--> Trace --(store)--> Trace --(trainer)--> guidance

Ids are content hashes, so that doing a thing twice changes nothing:

    problem_id = hash(question, answer, and the row's own verifier, metadata and turns where it has them)
    trace_id   = hash(problem_id, teacher, sample_index, text)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Any, Literal, Self

VERDICTS = (
    *("match", "mismatch", "unsimplified", "no_answer"),
    *("gold_unparseable", "unjudged", "timeout", "error"),
)
"""All results of a verification; only `match` is a correct answer. `unsimplified`: the question's own
expression; `unjudged`: the verifier returned None."""

ROW_NUMBERS = ("index", "split", "problem_id", "teacher")
"""Keys of `metadata` that number a file's rows; no part of a problem's identity."""

FINISH_REASONS = ("stop", "length", "error")
"""`stop`: the model ended by itself with an EOS token; `length`: the response was truncated; `error`: there
is none, and `verdict_detail` has the reason."""


AnswerForm = Literal["boxed", "answer_tags", "hashes", "answer_line", "letter"]
"""Marks of a final answer: `\\boxed{42}`, `<answer>42</answer>`, lines `#### 42` and `Answer: 42`, `(B)`."""


def content_hash(*parts: object) -> str:
    """Returns 16 hex digits of blake2b over the parts as JSON: ("a", "bc") and ("ab", "c") differ."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A verifiable problem: a question and its gold answer."""

    question: str
    """User turn of the prompt, e.g. `What is 2 + 2?`"""
    answer: str
    """The gold answer as in the data, e.g. `\\frac{7}{4}`"""
    source: str = ""
    """Origin, e.g. `aime`: for tables and for `[verify.by_source]`, no part of the identity."""
    system_prompt: str | None = None
    """System turn that came with the data (the verl form embeds one), or None."""
    turns: tuple[tuple[str, str], ...] = ()
    """The turns behind the system turn, as (role, text), where there are more than the question: examples,
    say, or earlier turns. The last one is the question."""
    verifier: str = ""
    """The verifier that the row names; empty: as `[verify]` says."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further facts of the row for its verifier (verl's `extra_info`), as JSON has them."""
    repeats: int = field(default=1, compare=False)
    """Number of its rows in the file: the least number of samples in an evaluation; no part of the identity,
    and not stored."""
    problem_id: str = field(init=False)
    """Content hash of question and answer, and of verifier, metadata and turns where there are any."""

    def __post_init__(self) -> None:
        facts = {key: value for key, value in self.metadata.items() if key not in ROW_NUMBERS}
        own: tuple[object, ...] = (self.verifier, facts) if self.verifier or facts else ()
        own += (self.turns,) if self.turns else ()
        object.__setattr__(self, "problem_id", content_hash(self.question, self.answer, *own))

    @property
    def user_turns(self) -> tuple[tuple[str, str], ...]:
        """The prompt behind its system turn, as (role, text)."""
        return self.turns or (("user", self.question),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One solution of a teacher, with its verdict. Wrong ones are stored too."""

    problem_id: str
    teacher: str
    """The name that the config gives the teacher, e.g. `qwen-math`."""
    sample_index: int
    """0-based index among the samples of this (problem, teacher) pair."""
    text: str
    """The completion as the teacher wrote it, without special tokens."""
    answer: str | None
    """The final answer found in the text, or None."""
    answer_start: int | None
    """Character offset of the answer's content in `text`: z_c is `text[:answer_start]`."""
    n_tokens: int
    """Length in the teacher's tokens, the EOS token included."""
    token_ids: tuple[int, ...]
    """The teacher's own token ids, [n_tokens]; ends with the EOS id when it stopped by itself. Empty where a
    server or an import gives text alone."""
    logprobs: tuple[float, ...]
    """The teacher's log-probability of each of its tokens at temperature 1, [n_tokens]."""
    finish_reason: str
    """One of FINISH_REASONS."""
    verdict: str
    """One of VERDICTS."""
    is_correct: bool
    """verdict == "match" and the response was not truncated."""
    seed: int
    """Seed of this sample."""
    generation_fingerprint: str
    """Hash of the teacher's recipe (model, revision, template, sampling)."""
    created_at: datetime
    """UTC."""
    verified_by: str = ""
    """Name and version of the verifier, e.g. `math-verify 0.9.0`."""
    verdict_detail: str = ""
    """Reason of the verdict, where the verdict alone does not show it."""
    parsed_answer: str | None = None
    """`answer` as the verifier parsed it, in sympy's notation, or None."""
    parsed_gold: str | None = None
    """The problem's gold answer as the verifier parsed it, or None."""
    filtered: str | None = None
    """Reason why a filter excludes the trace, e.g. `repetition: ...`; None: not filtered."""
    trace_id: str = field(init=False)
    """Content hash of (problem_id, teacher, sample_index, text)."""

    def __post_init__(self) -> None:
        trace_id = content_hash(self.problem_id, self.teacher, self.sample_index, self.text)
        object.__setattr__(self, "trace_id", trace_id)

    @classmethod
    def stored(cls, **fields: Any) -> Self:
        """Returns a trace of given fields, `trace_id` included: hashing the texts again would cost as much as
        reading them, and their pages have checksums."""
        trace = object.__new__(cls)
        for name in cls.__dataclass_fields__:
            object.__setattr__(trace, name, fields[name])
        return trace

    @property
    def is_usable(self) -> bool:
        """True for a trace that may guide the student: verified, and not filtered."""
        return self.is_correct and self.filtered is None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord:
    """The model and settings of a teacher's traces: enough to sample them again."""

    name: str
    model: str
    revision: str | None = None
    engine: str
    """`vllm`, `transformers`, `openai`, `import` or a name of your own."""
    engine_version: str = ""
    chat_template: str = ""
    """The Jinja source that turned messages into the prompt."""
    system_prompt: str | None = None
    """None: each problem's own."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """temperature, top_p, max_tokens."""
    tokenizer_fingerprint: str = ""
    """Hash of the vocabulary: `guidance.loss = "shaped_ratio"` needs the student's to be the same."""
    user_template: str | None = None
    """Jinja that made the user turn of each question; None: the question itself."""
    answer_form: AnswerForm | None = None
    """Form in which its answers are searched; None: as its system turn demands."""
    filters: Mapping[str, Any] = field(default_factory=dict)
    """The filters of its traces (config: [filters]). No part of the recipe: they apply to
    stored texts and may change without sampling."""

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that must not change under one teacher name. The engine is not one of them: the same
        model under the same sampling gives the same distribution from any engine."""
        return {
            "model": self.model,
            "revision": self.revision,
            "chat_template": self.chat_template,
            "system_prompt": self.system_prompt,
            "user_template": self.user_template,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "sampling": dict(self.sampling),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "answer_form": self.answer_form,
        }

    @property
    def generation_fingerprint(self) -> str:
        """Content hash of the recipe."""
        return content_hash(self.recipe)
