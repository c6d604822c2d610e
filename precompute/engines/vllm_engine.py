"""vLLM's offline engine, in a process of its own (vllm_process.py).

Only the end of a process frees all of a model's memory for the next teacher. The process also keeps vLLM's
environment, thread pinning and global seeds to itself, and ends with its parent however the parent ends:
vLLM's own engine process outlives a killed parent.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from precompute.config import TeacherConfig
from precompute.engines import Completion, Requests, Sampling
from precompute.engines.checks import cannot_load, stop_ids_of
from precompute.engines.feed import PAUSE, Feed
from precompute.engines.vllm_process import END, STOP, Call, Failure, Finished
from store.errors import EngineError, UserError

DEFAULT_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Defaults for the environment; the first is in GiB."""

PROGRAM = "from precompute.engines.vllm_process import main; main()"
"""With -m the module would be `__main__`, and its classes could not be unpickled here."""

HANDFUL = 8
"""Requests sent to the process at a time."""


class VllmEngine:
    """Samples from a model that vLLM has loaded."""

    name = "vllm"

    def __init__(
        self,
        process: VllmProcess,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        max_length: int,
        batch_size: int,
        logprobs: Literal["model", "sampler"] = "model",
    ) -> None:
        """`logprobs`: the kind that the process was loaded with (`logprobs_mode`)."""
        self.version = vllm_version()
        self._process = process
        self._tokenizer = tokenizer
        self._stop_ids = list(stop_ids)
        self._max_length = max_length
        self._batch_size = batch_size
        self._logprobs = logprobs

    @classmethod
    def load(cls, teacher: TeacherConfig, tokenizer: Any, *, max_length: int) -> VllmEngine:
        """Starts vLLM with room for `max_length` tokens of prompt and completion.

        On the CPU `dtype = "auto"` is float32. Raises EngineError that names the model if it cannot be loaded
        (one reason is a `max_length` beyond its positions).
        """
        stop_ids = stop_ids_of(teacher.model, teacher.revision, tokenizer)
        process = VllmProcess()
        process.load(llm_options(teacher, max_length=max_length), given=teacher.vllm_args)
        return cls(
            process, tokenizer, stop_ids=stop_ids, max_length=max_length, batch_size=teacher.batch_size
        )

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, each as soon as it is finished.

        Raises EngineError for a prompt that together with `max_tokens` exceeds `max_length`.
        """
        feed = Feed(requests, sampling, self._max_length)
        known = sampling.is_plain or sampling.logprobs == self._logprobs
        finished = self._process.generate(feed, sampling, self._stop_ids, ahead=2 * self._batch_size)
        return (self._completion(each, has_logprobs=known) for each in finished)

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

    def wake(self, *what: str) -> None:
        """Allocates the memory of `weights` and `kv_cache` again."""
        self._process.call("wake", what)

    def close(self) -> None:
        """Ends the process, which frees the model's memory."""
        self._process.close()

    def _completion(self, finished: Finished, *, has_logprobs: bool) -> Completion:
        request_id, token_ids, logprobs, finish_reason = finished
        return Completion(
            request_id=request_id,
            token_ids=token_ids,
            logprobs=logprobs if has_logprobs else (),
            finish_reason=finish_reason,
            text=self._tokenizer.decode(list(token_ids), skip_special_tokens=True),
        )


class VllmProcess:
    """The parent's side of the process with the model."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: replaces that of this process."""
        ours, theirs = socket.socketpair()
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        # A session of its own keeps the terminal's Ctrl-C away from it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", PROGRAM, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=_log(),
            stderr=_log(),
            env=_environment(os.environ if environment is None else environment),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def load(
        self, options: dict[str, Any], *, given: Mapping[str, Any] | None = None, named: str = "vllm_args"
    ) -> None:
        """Returns when the model is loaded. EngineError, with the process ended, if it cannot be.

        Args:
            given: the options that the user wrote under the key `named`; an error that names one of them, or
                its value, is reported under that key.
        """
        try:
            self._exchange(options)
        except VllmError as error:
            if culprit := _culprit(str(error), given or {}):
                raise EngineError(f"{named}.{culprit}: vllm says: {error}") from None
            raise cannot_load(options["model"], str(error)) from None

    def call(self, method: str, *arguments: Any) -> Any:
        """Returns the result of a method of vllm_process.Served. EngineError ends the process."""
        try:
            return self._exchange(Call(method, arguments))
        except VllmError as error:
            raise EngineError(f"vllm cannot {method.replace('_', ' ')}: {error}") from None

    def generate(
        self, feed: Feed, sampling: Sampling, stop_ids: list[int], *, ahead: int
    ) -> Iterator[Finished]:
        """Yields completions as they finish, with at most `ahead` requests in the process at a time.

        If the iteration ends early, the process drops the requests that are left.
        """
        self._send((sampling, stop_ids))
        try:
            yield from self._pump(feed, ahead)
        except VllmError as error:
            raise EngineError(f"vllm cannot go on sampling: {error}") from None
        except (GeneratorExit, UserError):
            if not self._connection.closed:
                self._send(STOP)
                while self._receive() is not None:
                    pass
            raise
        except BaseException:
            # Ctrl-C may have cut a message in two: this process cannot be read from any more.
            self.close()
            raise

    def _pump(self, feed: Feed, ahead: int) -> Iterator[Finished]:
        running, end_sent = 0, False
        while True:
            # A few at a time: the first step does not wait for all requests.
            while not feed.ended and (taken := feed.take(min(ahead - running, HANDFUL))):
                self._send(taken)
                running += len(taken)
            if feed.ended and not end_sent:
                self._send(END)
                end_sent = True
            if not running and not end_sent:
                feed.wait()
            elif running == ahead or end_sent or self._connection.poll(PAUSE):
                if (finished := self._receive()) is None:
                    return
                running -= 1
                yield finished

    def _exchange(self, message: Any) -> Any:
        try:
            self._send(message)
            return self._receive()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process at once. Does nothing if it has ended."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        if isinstance(message, Failure):
            self.close()
            raise VllmError(message.reason)
        return message

    def _ended(self) -> EngineError:
        code = self._process.wait()
        self.close()
        return EngineError(
            f"the vllm process ended with exit code {code} (-9: out of memory?); "
            "set VLLM_LOGGING_LEVEL=INFO in the environment to see its log"
        )


class VllmError(EngineError):
    """An error in vLLM's own words."""


def _culprit(reason: str, given: Mapping[str, Any]) -> str | None:
    """Returns the `argument = value` that an error of vllm names: by argument, or else by value."""
    named = [key for key in given if re.search(rf"\b{re.escape(key)}\b", reason)]
    valued = [key for key, value in given.items() if f" = {value!r}: " in reason]
    return next((f"{key} = {given[key]!r}" for key in (*named, *valued)), None)


def llm_options(teacher: TeacherConfig, *, max_length: int) -> dict[str, Any]:
    """Returns the arguments of `vllm.LLM`."""
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
        **({} if on_cpu else {"gpu_memory_utilization": teacher.gpu_memory_utilization}),
        **teacher.vllm_args,
    }


def vllm_version() -> str:
    """Returns the version of vLLM, whichever build is installed."""
    with suppress(PackageNotFoundError):
        return version("vllm")
    return version("vllm-cpu")


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """Returns the given environment with this process's import path, independent of the directory."""
    return (
        DEFAULT_ENVIRONMENT
        | dict(given)
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # vLLM in that very process: one of its own would outlive a killed parent.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    )


def _log() -> int | None:
    """Returns DEVNULL, unless the user has set vLLM's log level."""
    return None if "VLLM_LOGGING_LEVEL" in os.environ else subprocess.DEVNULL
