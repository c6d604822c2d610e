"""Arguments and result of a verifier; verify/registry.py has the verifiers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Outcome(NamedTuple):
    """Result of one comparison."""

    reason: str
    """One of store.records.VERDICTS."""
    detail: str = ""
    """The cause in words, where the reason alone does not give it."""
    parsed_gold: str | None = None
    """The gold answer as the verifier read it, cut to 1,000 characters; None where it could not be read."""
    parsed_answer: str | None = None
    score: float | None = None
    """The number that the verifier returned; None: 1 for a match, else 0."""


class Request(NamedTuple):
    """The arguments of one call."""

    gold: str
    answer: str
    question: str = ""
    response: str = ""
    metadata: Mapping[str, Any] | None = None
    source: str = ""


class VerifierFunction(Protocol):
    """A kind of verification."""

    def __call__(
        self, answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
    ) -> bool | float | Outcome | None:
        """Compares the final `answer` found in `response` with the problem's `gold` answer.

        A number is the score, which counts as correct from `verify.threshold` on. None: it cannot be judged.
        Each gold answer is checked once by passing it as its own answer; None then means that it is unusable.
        """
        ...
