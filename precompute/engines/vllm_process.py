"""vLLM in a process of its own, started by vllm_engine.py; the one file that imports vllm.

The parent sends to the left, the process answers to the right:

    load options                                    None
    (sampling, stop ids), begins a generation
    [request, ...], repeatedly                      (id, token ids, logprobs, finish reason) of each that ends
    END, after the last request                     None, after the last completion
    STOP, at any time: drop the generation          None
    Call(method of Served, arguments)               its result
                                                    Failure, instead of any answer: the process ends

A thread reads whatever arrives, so that neither side ever waits for the other to read. Objects are pickled;
the argument is the descriptor of the socket. Standard input carries nothing: it closes when the parent ends,
however that happens, and the process ends with it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from pydantic import ValidationError

from precompute.engines import Sampling

END = "end"
STOP = "stop"

Finished = tuple[str, tuple[int, ...], tuple[float, ...], str]
"""(request id, token ids [T], log-probabilities [T], finish reason)"""

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
"""Errors of vllm for what it cannot do; running out of memory is a RuntimeError."""


@dataclass(frozen=True, slots=True)
class Call:
    """A method of `Served`, to be called between two generations."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """The last message of the process."""

    reason: str
    """One line."""


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
    """Returns TROUBLE and vllm's own errors, which have no class in common with it."""
    try:
        from vllm.exceptions import VLLMError
    except TROUBLE:
        return TROUBLE
    return (*TROUBLE, VLLMError)


def _serve(connection: Connection[Any, Any], served: Served, inbox: Inbox) -> None:
    """Serves one generation or one call."""
    begin = inbox.get()
    if begin == STOP:
        return  # it was sent while the generation ended by itself
    if isinstance(begin, Call):
        connection.send(getattr(served, begin.method)(*begin.arguments))
        return
    for finished in _generate(served, inbox, *begin):
        connection.send(finished)
    connection.send(None)


def _read(connection: Connection[Any, Any], inbox: Inbox) -> None:
    with suppress(EOFError, OSError):  # the parent has ended, and this process ends with it
        while True:
            inbox.put(connection.recv())


def _end_with_parent() -> None:
    # Blocks until the other end is closed. os._exit skips vLLM's teardown: nothing is worth finishing then.
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


class Served:
    """The loaded model and its operations."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm: Any = LLM(**options)
        self.adapter: Any = None
        """LoRARequest of the samples; None samples from the model itself."""

    def load_weights(self, folder: str) -> None:
        """Replaces the weights by those of a transformers directory, and drops the adapter."""
        self.adapter = None
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.apply_model(_pack_tied_heads)
        self._forget_prefixes()

    def load_adapter(self, folder: str, number: int) -> None:
        """Replaces the LoRA adapter by that of a peft directory; `number` is new each time."""
        from vllm.lora.request import LoRARequest

        self.adapter = LoRARequest(str(number), number, folder)
        self.llm.llm_engine.add_lora(self.adapter)
        self._forget_prefixes()

    def sleep(self, level: int) -> None:
        """Frees the device's memory. Level 1 keeps the weights in host memory, level 2 drops them."""
        self.llm.sleep(level=level)

    def wake(self, what: Sequence[str]) -> None:
        """Allocates the memory of `weights` or `kv_cache` again."""
        self.llm.wake_up(tags=list(what))

    def _forget_prefixes(self) -> None:
        """Drops the keys and values that the old weights computed."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("its prefix cache is in use while weights change")


def _pack_tied_heads(model: Any) -> None:
    """Packs tied output heads again: on the CPU a head is a packed copy of its weight, and vllm's reload does
    not renew the copy of a head that is tied to the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)


def _reason(error: Exception) -> str:
    """Returns one line: of a pydantic error the first complaint without its long heading."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:400] or type(error).__name__
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    text = " ".join(first["msg"].removeprefix("Value error, ").split())[:400]
    return f"{where} = {first['input']!r:.60}: {text}" if where else text


def _generate(served: Served, inbox: Inbox, sampling: Sampling, stop_ids: list[int]) -> Iterator[Finished]:
    """Adds arriving requests between two steps of the scheduler; the parent limits their number."""
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
    """Yields the messages that have arrived; with `wait` at least one."""
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
        logprobs=0,  # of the sampled token alone, of the kind that `logprobs_mode` names
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _finished(output: Any) -> Finished:
    (sample,) = output.outputs
    tokens = tuple(sample.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(sample.logprobs, tokens, strict=True))
    return output.request_id, tokens, logprobs, sample.finish_reason
