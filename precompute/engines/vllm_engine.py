"""vLLM's offline engine, in a process of its own (vllm_process.py).

Only the end of a process frees all of a model's memory for the next teacher. The process also keeps vLLM's
environment, thread pinning and global seeds to itself, and ends with its parent however the parent ends:
vLLM's own engine process outlives a killed parent.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from precompute.config import TeacherConfig
from precompute.engines import Completion, Requests, Sampling, vllm_process
from precompute.engines.decoding import response_decoder
from precompute.engines.feed import PAUSE, Feed
from precompute.engines.vllm_process import Finished
from store.errors import EngineError, UserError

DEFAULT_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Defaults for the environment; the first is in GiB."""

HANDFUL = 8
"""Requests sent to the process at a time: its first step does not wait for all of them."""


class VllmEngine:
    """Samples from a model that vLLM has loaded."""

    def __init__(
        self,
        options: dict[str, Any],
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        given: Mapping[str, Any],
        key: str = "vllm_args",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts vLLM.

        Args:
            options: of `vllm.LLM`, see `llm_options`.
            given: those of them that the user wrote under `key`.
            environment: of the process; None: that of this one.

        Raises EngineError that names the model, and what the user gave, if it cannot be loaded.
        """
        self._decode = response_decoder(tokenizer)
        self._stop_ids = list(stop_ids)
        self._max_length = options["max_model_len"]
        self._ahead = 2 * options["max_num_seqs"]
        self._logprobs = "sampler" if options.get("logprobs_mode") == "processed_logprobs" else "model"
        self._process = VllmProcess(environment)
        problem = f"model {options['model']!r} cannot be loaded"
        self._process.call("load", options, problem=problem + (f" with {key} = {given}" if given else ""))

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, each as soon as it is finished.

        Raises EngineError for a prompt that together with `max_tokens` exceeds the model's positions.
        """
        feed = Feed(requests, sampling, self._max_length)
        has_logprobs = sampling.is_plain or sampling.logprobs == self._logprobs
        finished = self._process.generate(feed, sampling, self._stop_ids, ahead=self._ahead)
        for request_id, token_ids, logprobs, finish_reason in finished:
            yield Completion(
                request_id=request_id,
                token_ids=token_ids,
                logprobs=logprobs if has_logprobs else (),
                finish_reason=finish_reason,
                text=self._decode(token_ids),
            )

    def load_weights(self, folder: Path) -> None:
        """Replaces the weights by those of a transformers directory of the same model.

        This and the next three methods raise EngineError, with the process ended, if vllm cannot do it.
        """
        self._process.call("load_weights", str(folder))

    def load_adapter(self, folder: Path, number: int) -> None:
        """Samples with the LoRA adapter of a peft directory from now on; `number` is new each time."""
        self._process.call("load_adapter", str(folder), number)

    def sleep(self, level: int) -> None:
        """Frees the GPU's memory. Level 1 keeps the weights in host memory. Level 2 drops them: they have to
        be loaded between `wake("weights")` and `wake("kv_cache")`."""
        self._process.call("sleep", level)

    def wake(self, what: str) -> None:
        """Allocates the memory of `weights` or `kv_cache` again."""
        self._process.call("wake", what)

    def close(self) -> None:
        """Ends the process, which frees the model's memory."""
        self._process.close()


class VllmProcess:
    """The parent's side of the process with the model."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: replaces that of this process."""
        ours, theirs = socket.socketpair()
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        # The log is dropped unless the user has set its level.
        log = None if "VLLM_LOGGING_LEVEL" in os.environ else subprocess.DEVNULL
        # A session of its own keeps the terminal's Ctrl-C away from it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", vllm_process.__name__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(os.environ if environment is None else environment),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def call(self, method: str, *arguments: Any, problem: str = "") -> None:
        """Returns when a method of vllm_process.Served has. EngineError, which begins with `problem`, if it
        fails; the process has ended then."""
        try:
            self._send(method, *arguments)
            while self._receive(problem or f"vllm cannot {method.replace('_', ' ')}") is not None:
                pass  # completions of requests that `stop` dropped too late
        except BaseException:
            self.close()
            raise

    def generate(
        self, feed: Feed, sampling: Sampling, stop_ids: list[int], *, ahead: int
    ) -> Iterator[Finished]:
        """Yields completions as they finish, with at most `ahead` requests in the process at a time.

        If the iteration ends early, the process drops the requests that are left.
        """
        running = 0
        try:
            while running or not feed.ended:
                while taken := feed.take(min(ahead - running, HANDFUL)):
                    self._send("sample", taken, sampling, stop_ids)
                    running += len(taken)
                if not running:
                    feed.wait()
                elif feed.ended or running == ahead or self._connection.poll(PAUSE):
                    finished = self._receive("vllm cannot go on sampling")
                    assert finished is not None
                    running -= 1
                    yield finished
        except (GeneratorExit, UserError):
            if running and not self._connection.closed:
                self.call("stop")
            raise
        except BaseException:
            # Ctrl-C may have cut a message in two: this process cannot be read from any more.
            self.close()
            raise

    def close(self) -> None:
        """Ends the process at once. Does nothing if it has ended."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _send(self, method: str, *arguments: Any) -> None:
        try:
            self._connection.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None

    def _receive(self, problem: str) -> Finished | None:
        try:
            message: Finished | str | None = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        if isinstance(message, str):
            self.close()
            raise EngineError(f"{problem}: {message}")
        return message

    def _ended(self) -> EngineError:
        code = self._process.wait()
        self.close()
        return EngineError(
            f"the vllm process ended with exit code {code} (-9: out of memory?); "
            "set VLLM_LOGGING_LEVEL=INFO in the environment to see its log"
        )


def llm_options(teacher: TeacherConfig, *, max_length: int) -> dict[str, Any]:
    """Returns the arguments of `vllm.LLM`, with room for `max_length` tokens of prompt and completion.

    On the CPU `dtype = "auto"` is float32.
    """
    on_cpu = not torch.cuda.is_available()
    return {
        "model": teacher.model,
        "revision": teacher.revision,
        "dtype": "float32" if teacher.dtype == "auto" and on_cpu else teacher.dtype,
        "quantization": teacher.quantization,
        "max_model_len": max_length,
        "max_num_seqs": teacher.batch_size,
        "tensor_parallel_size": teacher.tensor_parallel_size,
        "enforce_eager": on_cpu if teacher.enforce_eager is None else teacher.enforce_eager,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own sampling defaults stay out
        # On a CPU vllm 0.32 fails at a seeded request whose prompt is split over two steps.
        **(
            {"enable_chunked_prefill": False}
            if on_cpu
            else {"gpu_memory_utilization": teacher.gpu_memory_utilization}
        ),
        **teacher.vllm_args,
    }


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """Returns the given environment with this process's import path, independent of the directory."""
    return {
        **DEFAULT_ENVIRONMENT,
        **given,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # vLLM in that very process: one of its own would outlive a killed parent.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
