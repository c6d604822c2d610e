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


class Request(NamedTuple):
    """The arguments of one call."""

    gold: str
    answer: str
    question: str = ""
    response: str = ""
    metadata: Mapping[str, Any] | None = None


class VerifierFunction(Protocol):
    """A kind of verification."""

    def __call__(
        self, answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
    ) -> bool | float | Outcome | None:
        """Compares the final `answer` found in `response` with the problem's `gold` answer.

        A number counts as correct from 1 on. None means that the gold answer cannot be used; each gold answer
        is checked once by passing it as its own answer.
        """
        ...
