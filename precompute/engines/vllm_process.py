"""vLLM in a process of its own: the one file that imports vllm. precompute/engines/vllm_engine.py starts it.

    -> load options                                      <- None
    -> (sampling, stop ids): a generation begins
    -> [request, ...], as often as there are some        <- (id, token ids, logprobs, finish reason), as they
    -> END: no more of them                                 finish, and None behind the last one
    -> STOP, at any time: forget what is left
    -> Call(method of Served, arguments)                 <- its result
                                                         <- Failure, in the place of any answer: it is over

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
from precompute.engines.vllm_messages import END, STOP, Call, Failure, Finished

Inbox: TypeAlias = "queue.SimpleQueue[Any]"

TROUBLE = (
    ImportError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    AssertionError,
)
"""What vllm raises when it cannot do what it is asked: memory that is full is a RuntimeError."""


def main() -> None:
    """Loads the model, then serves generations and calls until the parent is gone or something fails."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    try:
        served = Served(connection.recv())
        connection.send(None)
        inbox: Inbox = queue.SimpleQueue()
        threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
        while True:
            _serve(connection, served, inbox)
    except _trouble() as error:
        connection.send(Failure(_reason(error)))


def _trouble() -> tuple[type[Exception], ...]:
    """TROUBLE and vllm's own errors, which are of no common kind with it."""
    try:
        from vllm.exceptions import VLLMError
    except TROUBLE:
        return TROUBLE
    return (*TROUBLE, VLLMError)


def _serve(connection: Connection[Any, Any], served: Served, inbox: Inbox) -> None:
    """One generation or one call."""
    begin = inbox.get()
    if begin == STOP:
        return  # it crossed the end of what it was to stop
    if isinstance(begin, Call):
        connection.send(getattr(served, begin.method)(*begin.arguments))
        return
    for finished in _generate(served, inbox, *begin):
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


class Served:
    """The model, and what can be done to it while it is up."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm: Any = LLM(**options)
        self.adapter: Any = None
        """The LoRARequest of all that is drawn; None: the model itself."""

    def load_weights(self, folder: str) -> None:
        """The weights of a transformers directory take the places of those that are there, and no adapter
        changes them."""
        self.adapter = None
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.apply_model(_pack_tied_heads)
        self._forget_prefixes()

    def load_adapter(self, folder: str, number: int) -> None:
        """The LoRA adapter of a peft directory, instead of the one before; `number` is new each time."""
        from vllm.lora.request import LoRARequest

        self.adapter = LoRARequest(str(number), number, folder)
        self.llm.llm_engine.add_lora(self.adapter)
        self._forget_prefixes()

    def sleep(self, level: int) -> None:
        """Frees the device's memory; level 1 keeps the weights in the host's, level 2 forgets them."""
        self.llm.sleep(level=level)

    def wake(self, what: Sequence[str]) -> None:
        """`weights` and `kv_cache` get their memory back."""
        self.llm.wake_up(tags=list(what))

    def _forget_prefixes(self) -> None:
        """Keys and values of prompts that the old weights have read are worth nothing now."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("its prefix cache is in use while weights change")


def _pack_tied_heads(model: Any) -> None:
    """On the CPU an output head is a packed copy of its weight; one that is tied to the embedding gets no
    weights of its own, and vllm's reload leaves the old copy in place."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)


def _reason(error: Exception) -> str:
    """In one line; of a pydantic error the first thing that is wrong, without its long heading."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:400] or type(error).__name__
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    text = " ".join(first["msg"].removeprefix("Value error, ").split())[:400]
    return f"{where} = {first['input']!r:.60}: {text}" if where else text


def _generate(served: Served, inbox: Inbox, sampling: Sampling, stop_ids: list[int]) -> Iterator[Finished]:
    """Gives the scheduler what comes, between two steps; the parent sees to it that it is never too much."""
    engine = served.llm.llm_engine
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
                running[request.request_id] = engine.add_request(
                    request.request_id, prompt, parameters, lora_request=served.adapter
                )
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
        logprobs=0,  # the drawn token's alone, of the kind that `logprobs_mode` has been told
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _finished(output: Any) -> Finished:
    (drawn,) = output.outputs
    tokens = tuple(drawn.token_ids)
    return output.request_id, tokens, _logprobs(drawn.logprobs, tokens), drawn.finish_reason


def _logprobs(steps: Any, tokens: Sequence[int]) -> tuple[float, ...]:
    """[T], each token's own."""
    return tuple(step[token].logprob for step, token in zip(steps, tokens, strict=True))


if __name__ == "__main__":
    main()
