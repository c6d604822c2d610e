"""The inside of a verification process, which imports little and may be killed at any moment."""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from numbers import Real
from typing import Any

from precompute.verify.base import Outcome, Request
from precompute.verify.registry import PAIRWISE, call_of, chosen_verifier

CPU_SECONDS = 1
"""A computation ends this long after its deadline even where nobody is left to kill it."""

_verify: Callable[[Request], Any]
_threshold: float


def start(name: str, threshold: float, memory_mb: int) -> None:
    """Prepares the process for the verifier `name`, with `memory_mb` MiB of address space.

    `threshold`: the least score of a correct answer.
    """
    global _verify, _threshold
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # A Python handler would wait for the end of a computation in C.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit(resource.RLIMIT_AS, memory_mb * 2**20)
    _verify, _threshold = call_of(chosen_verifier(name)), threshold
    if name in PAIRWISE:
        # Imports now, so that they do not count against the first answer's deadline.
        _verify(Request("1", "1"))
    elif name == "reasoning_gym":
        import_module(name)
    # A tenth of a grammar's time goes into looking for garbage among what it keeps.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def run(request: Request, timeout: float) -> Outcome:
    """Returns the outcome of one request, `error` where the verifier raises."""
    _limit(resource.RLIMIT_CPU, math.ceil(sum(os.times()[:2]) + timeout) + CPU_SECONDS)
    try:
        result = _verify(request)
    except (Exception, SystemExit) as error:  # noqa: BLE001  sympy and users raise anything; it is recorded.
        return Outcome("error", f"{type(error).__name__} while comparing")
    if isinstance(result, Outcome):
        return result
    if result is None:
        return Outcome("unjudged", "the verifier cannot judge it")
    if not isinstance(result, Real) or not math.isfinite(result):
        return Outcome("error", f"the verifier returned {repr(result)[:80]}, not a bool or a number")
    score = float(result)
    return Outcome("match" if score >= _threshold else "mismatch", score=score)


def _limit(what: int, amount: int) -> None:
    # macOS refuses some limits; the deadline still holds.
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (amount, resource.getrlimit(what)[1]))
