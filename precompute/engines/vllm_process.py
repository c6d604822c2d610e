"""vLLM in a process of its own: the one file that imports vllm. precompute/engines/vllm_engine.py starts it.

    -> load options                                      <- None, or what went wrong, in one line
    -> (sampling, stop ids): a generation begins
    -> [request, ...], as often as there are some        <- (id, token ids, logprobs, finish reason), as they
    -> END: no more of them                                 finish, and None behind the last one
    -> STOP, at any time: forget what is left

A thread reads what comes, whatever the model does: neither side ever waits for the other to read. Objects
travel pickled over the socket whose descriptor is the argument. Standard input carries nothing: it
ends when the parent ends, however that came about, and this process with it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from pydantic import ValidationError

from precompute.engines import Sampling

END = "end"
STOP = "stop"

Inbox: TypeAlias = "queue.SimpleQueue[Any]"

Finished = tuple[str, tuple[int, ...], tuple[float, ...], str]
"""(request id, token ids [T], log-probabilities [T], finish reason)"""


def main() -> None:
    """Loads the model, then serves `generate` calls until the parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    llm = _load(connection, connection.recv())
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    while llm is not None:
        begin = inbox.get()
        if begin == STOP:
            continue  # it crossed the end of what it was to stop
        for finished in _generate(llm, inbox, *begin):
            connection.send(finished)
        connection.send(None)


def _read(connection: Connection[Any, Any], inbox: Inbox) -> None:
    with suppress(EOFError, OSError):  # the parent is gone, and this process goes with it
        while True:
            inbox.put(connection.recv())


def _end_with_parent() -> None:
    # Blocks until the other end is closed. Nothing is worth finishing then; os._exit skips vLLM's teardown.
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


def _load(connection: Connection[Any, Any], options: dict[str, Any]) -> Any:
    """The `LLM`; None, after telling the parent why, when it cannot be had."""
    try:
        from vllm import LLM

        llm = LLM(**options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        connection.send(_reason(error))
        return None
    connection.send(None)
    return llm


def _reason(error: Exception) -> str:
    """In one line; of a pydantic error the first thing that is wrong, without its long heading."""
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return " ".join(text.removeprefix("Value error, ").split())[:400] or type(error).__name__


def _generate(llm: Any, inbox: Inbox, sampling: Sampling, stop_ids: list[int]) -> Iterator[Finished]:
    """Gives the scheduler what comes, between two steps; the parent sees to it that it is never too much."""
    engine = llm.llm_engine
    running: dict[str, str] = {}  # vLLM's id -> ours
    ended = False
    while running or not ended:
        for message in _messages(inbox, wait=not running):
            if message == STOP:
                engine.abort_request(list(running.values()), internal=True)
                return
            if message == END:
                ended = True
                continue
            for request in message:
                parameters = _sampling_params(sampling, request.seed, stop_ids)
                prompt = {"prompt_token_ids": list(request.prompt_ids)}
                running[request.request_id] = engine.add_request(request.request_id, prompt, parameters)
        for output in engine.step() if running else ():
            if output.finished:
                del running[output.request_id]
                yield _finished(output)


def _messages(inbox: Inbox, *, wait: bool) -> Iterator[Any]:
    """What has come; with `wait` one message at least."""
    if wait:
        yield inbox.get()
    with suppress(queue.Empty):
        while True:
            yield inbox.get_nowait()


def _sampling_params(sampling: Sampling, seed: int, stop_ids: Sequence[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=seed,
        stop_token_ids=list(stop_ids),
        logprobs=0,  # the drawn token's alone; raw, as `logprobs_mode` says by default
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _finished(output: Any) -> Finished:
    (drawn,) = output.outputs
    tokens = tuple(drawn.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(drawn.logprobs, tokens, strict=True))
    return output.request_id, tokens, logprobs, drawn.finish_reason


if __name__ == "__main__":
    main()
