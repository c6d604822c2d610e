"""The judge's own process: reads mathematics, compares it, and may be killed at any moment.

`precompute.verify.verifier` starts this file by its path and speaks lines of JSON with it over the pipes:

    -> {"gold": "\\\\frac{7}{4}", "answer": "1.75", "timeout": 5.0}      answer null: only read the gold
    <- ["taken", "", null, null]                                        when it begins with this one
    <- ["match", "", "7/4", "1.75000000000000"]                         verify_math.Reading

More lines may be sent than are answered by now. Nothing taken at once by an idle worker: it died.
Whatever the parent's directory and `__main__` are, it finds its neighbour, verify_math.py, by its path.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import queue
import resource
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


def main(memory_mb: int) -> None:
    """Serves requests until the parent's end of the pipe closes."""
    replies = _claim_stdout()
    _die_with_parent()
    _limit(resource.RLIMIT_AS, memory_mb * 2**20)
    sys.path.append(str(Path(__file__).parent.parent.parent))
    from precompute.verify.math import judge

    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    _reply(replies, "ready")
    replies.flush()
    while True:
        request = requests.get()
        _reply(replies, "taken")
        replies.flush()
        # Where the parent's death sends no signal, this still ends a computation nobody waits for.
        _limit(resource.RLIMIT_CPU, math.ceil(sum(os.times()[:2]) + request["timeout"]) + 5)
        try:
            _reply(replies, *judge(request["gold"], request["answer"]))
        except Exception as error:  # noqa: BLE001  sympy raises anything; the verdict names it.
            _reply(replies, "error", f"{type(error).__name__} while comparing")
        if requests.empty():  # otherwise it travels with the next "taken"
            replies.flush()


def _claim_stdout() -> BinaryIO:
    """The pipe to the parent; whatever a library prints goes nowhere instead."""
    replies = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    return replies


def _reply(
    replies: BinaryIO,
    reason: str,
    detail: str = "",
    parsed_gold: str | None = None,
    parsed_answer: str | None = None,
) -> None:
    replies.write(json.dumps([reason, detail, parsed_gold, parsed_answer]).encode() + b"\n")


def _read_requests(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _limit(what: int, amount: int) -> None:
    # macOS refuses some limits; the deadline still holds there.
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (amount, resource.getrlimit(what)[1]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
