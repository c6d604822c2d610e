"""vLLM in a process of its own: the one file that imports vllm. precompute/engines/vllm_engine.py starts it.

    -> load options                                      <- None, or what went wrong, in one line
    -> (requests, sampling, stop ids)                    <- (id, token ids, logprobs, finish reason), as they
    -> STOP, at any time: forget what is left               finish, and None behind the last one

Objects travel pickled over the socket whose descriptor is the argument. Standard input carries nothing: it
ends when the parent ends, however that came about, and this process with it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from precompute.engines import Request, Sampling

STOP = "stop"

Finished = tuple[str, tuple[int, ...], tuple[float, ...], str]
"""(request id, token ids [T], log-probabilities [T], finish reason)"""


def main() -> None:
    """Loads the model, then serves `generate` calls until the parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    llm = _load(connection, connection.recv())
    while llm is not None:
        requests, sampling, stop_ids = connection.recv()
        for finished in _generate(llm, connection, deque(requests), sampling, stop_ids):
            connection.send(finished)
        connection.send(None)


def _end_with_parent() -> None:
    # Blocks until the other end is closed. Nothing is worth finishing then; os._exit skips vLLM's teardown.
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


def _load(connection: Connection[Any, Any], options: dict[str, Any]) -> Any:
    """The `LLM`; None, after telling the parent why, when it cannot be had."""
    try:
        from vllm import LLM

        llm = LLM(**options)
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        # pydantic puts the reason on a line behind a heading.
        connection.send(" ".join(str(error).split())[:400] or type(error).__name__)
        return None
    connection.send(None)
    return llm


def _generate(
    llm: Any,
    connection: Connection[Any, Any],
    waiting: deque[Request],
    sampling: Sampling,
    stop_ids: list[int],
) -> Iterator[Finished]:
    """Keeps the scheduler supplied a little ahead, so that the first step need not wait for all requests."""
    engine = llm.llm_engine
    ahead = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    running: dict[str, str] = {}  # vLLM's id -> ours
    while waiting or running:
        while waiting and len(running) < ahead:
            request = waiting.popleft()
            parameters = _sampling_params(sampling, request.seed, stop_ids)
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            running[request.request_id] = engine.add_request(request.request_id, prompt, parameters)
        for output in engine.step():
            if output.finished:
                del running[output.request_id]
                yield _finished(output)
        if connection.poll():
            assert connection.recv() == STOP
            engine.abort_request(list(running.values()), internal=True)
            return


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
