"""Kinds of verification: each one decides whether a final answer is right.

To add one, write a VerifierFunction and enter it in VERIFIERS; or name your own function
in the config, `[verify] default = "checks.py:same_city"` or `"package.module:function"`. It runs in worker
processes that are killed at a deadline (precompute/verify/pool.py), so it may take forever or crash.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

VERIFY_KEY = "verify.default"
"""The config key that chooses a verifier."""


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


def verify_math(
    answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
) -> Outcome:
    """Compares two mathematical expressions by value, with math-verify."""
    from precompute.verify.math import compare

    return compare(gold, answer)


VERIFIERS: Mapping[str, VerifierFunction] = {"math": verify_math}

PAIRWISE = frozenset({"math"})
"""Verifiers that read nothing but answer and gold: equal pairs are verified once."""

_MATH_RECORD = (
    "math-verify",
    f"{version('math-verify')}+antlr{version('antlr4-python3-runtime')}.ampo.2",
)
"""The versions of math-verify and of its parser, and the revision of our rules around them
(precompute/verify/math.py). Verdicts depend on all three."""


def chosen_verifier(name: str) -> VerifierFunction:
    """Returns the verifier that a config names. Raises ConfigError where there is no such verifier."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    from store.registry import lookup

    return lookup(VERIFIERS, name, key=VERIFY_KEY)


def verifier_record(name: str) -> tuple[str, str]:
    """Returns (name, version) as a store records them; the version of a user's function is its file's hash.

    Raises ConfigError where there is no such verifier.
    """
    if name == "math":
        return _MATH_RECORD
    source = Path(inspect.getfile(inspect.unwrap(chosen_verifier(name))))
    where, _, function = name.rpartition(":")
    short = Path(where).name if where.endswith(".py") else where
    return f"{short}:{function}", blake2b(source.read_bytes(), digest_size=8).hexdigest()
