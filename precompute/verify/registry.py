"""Kinds of verification by name: each one decides whether a final answer is right.

To add one, write a VerifierFunction and enter it in VERIFIERS; or name your own function in the config,
`[verify] default = "checks.py:same_city"` or `"package.module:function"`. It runs in worker processes that
are killed at a deadline (precompute/verify/pool.py), so it may hang or crash.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from precompute.verify.base import Outcome, VerifierFunction
from store.registry import lookup

VERIFY_KEY = "verify.default"
"""The config key that chooses a verifier."""


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
