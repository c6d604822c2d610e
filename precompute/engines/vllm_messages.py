"""What travels between vLLM's process and its parent, pickled; vllm_process.py says in which order.

A module of its own, for the process runs as `__main__` and the parent could not find its classes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

END = "end"
STOP = "stop"

Finished = tuple[str, tuple[int, ...], tuple[float, ...], str]
"""(request id, token ids [T], log-probabilities [T], finish reason)"""


@dataclass(frozen=True, slots=True)
class Call:
    """A method of `Served`, to be called between two generations."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something could not be done, in one line; the process ends with it."""

    reason: str
