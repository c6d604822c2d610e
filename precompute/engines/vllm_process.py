"""vLLM in a process of its own, started by vllm_engine.py; the one file that imports vllm.

The parent sends (name of a method of `Served`, arguments). `sample` adds requests, and each completion is
sent when it ends; any other method is answered by None when it has returned. An error is answered by its
reason, a string, and ends the process.
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

from precompute.engines import Request, Sampling

Finished = tuple[str, tuple[int, ...], tuple[float, ...], str]
"""(request id, token ids [T], log-probabilities [T], finish reason)"""

Inbox: TypeAlias = "queue.SimpleQueue[tuple[str, tuple[Any, ...]]]"

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


def main() -> None:
    """Serves the parent until it is gone or something fails."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    served = Served()
    try:
        while True:
            # Requests that arrive are added between two steps of the scheduler.
            while not served.running or not inbox.empty():
                method, arguments = inbox.get()
                getattr(served, method)(*arguments)
                if method != "sample":
                    connection.send(None)
            for finished in served.step():
                connection.send(finished)
    except _trouble() as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        connection.send(" ".join(reason.split())[:400] or type(error).__name__)


def _trouble() -> tuple[type[Exception], ...]:
    """Returns TROUBLE and vllm's own errors, which have no class in common with it."""
    try:
        from vllm.exceptions import VLLMError
    except TROUBLE:
        return TROUBLE
    return (*TROUBLE, VLLMError)


def _read(connection: Connection[Any, Any], inbox: Inbox) -> None:
    """Reads in a thread, so that neither side waits for the other to read; ends with the parent, however that
    ended: vLLM's teardown is skipped."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    os._exit(0)


class Served:
    """The model and its operations."""

    def __init__(self) -> None:
        self.running: dict[str, str] = {}
        """vLLM's id of each request -> ours."""
        self._llm: Any = None
        self._adapter: Any = None
        """LoRARequest of the samples; None samples from the model itself."""

    def load(self, options: dict[str, Any]) -> None:
        """Loads the model."""
        from vllm import LLM

        self._llm = LLM(**options)

    def sample(self, requests: Sequence[Request], sampling: Sampling, stop_ids: list[int]) -> None:
        """Adds requests; the parent limits their number."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=request.seed,
                stop_token_ids=stop_ids,
                logprobs=0,  # of the sampled token alone, of the kind that `logprobs_mode` names
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            self.running[request.request_id] = self._llm.llm_engine.add_request(
                request.request_id, prompt, parameters, lora_request=self._adapter
            )

    def step(self) -> Iterator[Finished]:
        """Samples a token of each running request; yields the completions that end."""
        for output in self._llm.llm_engine.step():
            if output.finished:
                del self.running[output.request_id]
                (sample,) = output.outputs
                tokens = tuple(sample.token_ids)
                logprobs = tuple(
                    step[token].logprob for step, token in zip(sample.logprobs, tokens, strict=True)
                )
                yield output.request_id, tokens, logprobs, sample.finish_reason

    def stop(self) -> None:
        """Drops all running requests."""
        self._llm.llm_engine.abort_request(list(self.running.values()), internal=True)
        self.running.clear()

    def load_weights(self, folder: str) -> None:
        """Replaces the weights by those of a transformers directory, and drops the adapter."""
        self._adapter = None
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.apply_model(_pack_tied_heads)
        self._forget_prefixes()

    def load_adapter(self, folder: str, number: int) -> None:
        """Replaces the LoRA adapter by that of a peft directory; `number` is new each time."""
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(str(number), number, folder)
        self._llm.llm_engine.add_lora(self._adapter)
        self._forget_prefixes()

    def sleep(self, level: int) -> None:
        """Frees the device's memory. Level 1 keeps the weights in host memory, level 2 drops them."""
        self._llm.sleep(level=level)

    def wake(self, what: str) -> None:
        """Allocates the memory of `weights` or `kv_cache` again."""
        self._llm.wake_up(tags=[what])

    def _forget_prefixes(self) -> None:
        """Drops the keys and values that the old weights computed."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("its prefix cache is in use while weights change")


def _pack_tied_heads(model: Any) -> None:
    """Packs tied output heads again: on the CPU a head is a packed copy of its weight, and vllm's reload does
    not renew the copy of a head that is tied to the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)


if __name__ == "__main__":
    main()
