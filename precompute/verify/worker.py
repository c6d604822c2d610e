"""The inside of a verification process, which imports little and may be killed at any moment."""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
from contextlib import suppress
from numbers import Real

from precompute.verify.base import Outcome, Request, VerifierFunction
from precompute.verify.registry import VERIFIERS, chosen_verifier

CPU_SECONDS = 1
"""A computation ends this long after its deadline even where nobody is left to kill it."""

_verify: VerifierFunction


def start(name: str, memory_mb: int) -> None:
    """Prepares the process for the verifier `name`, with `memory_mb` MiB of address space."""
    global _verify
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # A Python handler would wait for the end of a computation in C.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit(resource.RLIMIT_AS, memory_mb * 2**20)
    _verify = chosen_verifier(name)
    if name in VERIFIERS:
        # Imports now, so that they do not count against the first answer's deadline.
        _verify("1", "1", question="", response="", metadata={})
    # A tenth of a grammar's time goes into looking for garbage among what it keeps.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def run(request: Request, timeout: float) -> Outcome:
    """Returns the outcome of one request, `error` where the verifier raises."""
    _limit(resource.RLIMIT_CPU, math.ceil(sum(os.times()[:2]) + timeout) + CPU_SECONDS)
    gold, answer, question, response, metadata = request
    try:
        result = _verify(answer, gold, question=question, response=response, metadata=metadata or {})
    except (Exception, SystemExit) as error:  # noqa: BLE001  sympy and users raise anything; it is recorded.
        return Outcome("error", f"{type(error).__name__} while comparing")
    if isinstance(result, Outcome):
        return result
    if result is None:
        return Outcome("gold_unparseable", "the verifier cannot use the gold answer")
    if not isinstance(result, Real):
        return Outcome("error", f"the verifier returned a {type(result).__name__}, not a bool or a number")
    return Outcome("match" if result >= 1 else "mismatch")


def _limit(what: int, amount: int) -> None:
    # macOS refuses some limits; the deadline still holds.
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (amount, resource.getrlimit(what)[1]))
