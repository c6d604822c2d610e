"""Kinds of verification by name: each one decides whether a final answer is right.

To add one, write a VerifierFunction and enter it in VERIFIERS; or name your own function in the config,
`[verify] default = "checks.py:same_city"` or `"package.module:function"`; a package may also offer one as an
entry point of the group `ampo.verifiers`. verl's reward functions, `(data_source, solution_str, ground_truth,
extra_info)`, are taken as they are. All of them run in worker processes that are killed at a deadline
(precompute/verify/pool.py), so they may hang or crash.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from hashlib import blake2b
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from precompute.verify.base import Outcome, Request, VerifierFunction
from precompute.verify.plain_answers import (
    verify_choice,
    verify_exact,
    verify_numeric,
    verify_reasoning_gym,
)
from store.errors import ConfigError, install_hint
from store.registry import lookup

VERIFY_KEY = "verify.default"
"""The config key that chooses a verifier."""
ENTRY_POINTS = "ampo.verifiers"
"""Group of the entry points that installed packages offer."""


def verify_math(
    answer: str, gold: str, *, question: str, response: str, metadata: Mapping[str, Any]
) -> Outcome:
    """Compares two mathematical expressions by value, with math-verify."""
    from precompute.verify.math import compare

    return compare(gold, answer)


VERIFIERS: Mapping[str, VerifierFunction] = {
    "math": verify_math,
    "numeric": verify_numeric,
    "choice": verify_choice,
    "exact": verify_exact,
    "reasoning_gym": verify_reasoning_gym,
}

PAIRWISE = frozenset({"math", "numeric", "exact"})
"""Verifiers that read nothing but answer and gold: equal pairs are verified once."""

_OURS = "ampo.1"
"""Revision of the rules in verify/plain_answers.py."""
_MATH = f"{version('math-verify')}+antlr{version('antlr4-python3-runtime')}.ampo.3"
"""Versions of math-verify and of its parser, and the revision of our rules around them
(precompute/verify/math*.py). Verdicts depend on all three."""


def chosen_verifier(name: str, *, key: str = VERIFY_KEY) -> Callable[..., Any]:
    """Returns the function that a name chooses. Raises ConfigError, naming `key`, where there is none."""
    offered = {} if name in VERIFIERS else {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in offered:
        function: Callable[..., Any] = offered[name].load()
        return function
    if name == "reasoning_gym" and find_spec("reasoning_gym") is None:
        raise ConfigError(f'{key} = "reasoning_gym" needs the package: {install_hint("reasoning-gym")}')
    found: Callable[..., Any] = lookup(VERIFIERS, name, key=key)
    return found


def is_verls(function: Callable[..., Any]) -> bool:
    """Returns True for a function in verl's form, which finds the answer in the response itself."""
    return {"solution_str", "ground_truth"} <= inspect.signature(function).parameters.keys()


def call_of(function: Callable[..., Any]) -> Callable[[Request], Any]:
    """Returns the call of a verifier: with the arguments that it takes, by its own names."""
    names = inspect.signature(function).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in names.values())

    def call(request: Request) -> Any:
        metadata = dict(request.metadata or {})
        if is_verls(function):
            given = {
                "data_source": request.source,
                "solution_str": request.response,
                "ground_truth": request.gold,
                "extra_info": metadata,
            }
            result = function(**{name: value for name, value in given.items() if name in names or takes_all})
            return result.get("score") if isinstance(result, Mapping) else result
        given = {"question": request.question, "response": request.response, "metadata": metadata}
        kept = {name: value for name, value in given.items() if name in names or takes_all}
        return function(request.answer, request.gold, **kept)

    return call


def verifier_record(name: str, *, key: str = VERIFY_KEY) -> tuple[str, str]:
    """Returns (name, version) as a store records them; the version of a user's function is its file's hash.

    Raises ConfigError, naming `key`, where there is no such verifier.
    """
    if name == "math":
        return "math-verify", _MATH
    function = chosen_verifier(name, key=key)
    if name == "reasoning_gym":
        return "reasoning-gym", version("reasoning-gym")
    if name in VERIFIERS:
        return name, _OURS
    source = Path(inspect.getfile(inspect.unwrap(function)))
    where, _, short = name.rpartition(":")
    where = Path(where).name if where.endswith(".py") else where
    return f"{where}:{short}".lstrip(":"), blake2b(source.read_bytes(), digest_size=8).hexdigest()
