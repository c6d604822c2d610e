"""vLLM servers of a model whose weights change: drawn from by openai_engine.py, told of new weights here.

Whole weights need `VLLM_SERVER_DEV_MODE=1` in a server's environment (its /collective_rpc and
/reset_prefix_cache); adapters need `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`. Both are
vLLM's own and open to whoever reaches the port.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from precompute.config import TeacherConfig
from precompute.engines import Completion, Requests, Sampling
from precompute.engines.openai_engine import OpenAIEngine, served_name
from store.errors import EngineError

DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
LORA_MODE = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"


class VllmServers:
    """Draws from several servers that hold the same weights."""

    name = "vllm"

    def __init__(
        self,
        servers: TeacherConfig,
        tokenizer: Any,
        *,
        max_length: int,
        report: Callable[[str], None],
        tells: bool = True,
    ) -> None:
        """
        Args:
            servers: `base_urls`, `model`, `served_model_name`, `batch_size` and `request_timeout` of them.
            tells: of several processes that draw from the same servers one tells them of new weights and asks
                what they make of a probe; to the others the same calls only say what to draw with.

        Raises EngineError when none of them answers, and when one lacks the model or has too few positions.
        One that does not answer is reported, and ends the first change of weights.
        """
        self._servers = servers
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._report = report
        self._tells = tells
        self._adapter: str | None = None
        self._engine: OpenAIEngine | None = self._engine_of(servers)
        self.version = self._engine.version

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """As Engine.generate. A server that is lost is reported, and the others go on."""
        if self._engine is None:
            self._engine = self._engine_of(self._named(self._adapter))
        return self._engine.generate(requests, sampling)

    def load_weights(self, folder: Path) -> None:
        """Has every server load the weights of a transformers directory. Raises EngineError."""
        for url in self._told:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post(url, "/collective_rpc", call, hint=DEV_MODE)
            self._post(url, "/reset_prefix_cache", {}, hint=DEV_MODE)

    def load_adapter(self, folder: Path, number: int) -> None:
        """Has every server load the LoRA adapter of a peft directory, and forget the one before."""
        before, self._adapter = self._adapter, f"{folder.parent.name}-{number}"
        for url in self._told:
            adapter = {"lora_name": self._adapter, "lora_path": str(folder)}
            self._post(url, "/v1/load_lora_adapter", adapter, hint=LORA_MODE)
            if before is not None:
                self._post(url, "/v1/unload_lora_adapter", {"lora_name": before}, hint=LORA_MODE)
        self._engine = None  # made anew for the next samples, when the servers know the name

    def logprobs(self, rows: Sequence[Sequence[int]]) -> dict[str, list[tuple[float, ...]]]:
        """[N] rows of ids -> for each server the log-probabilities of all but their first tokens, at
        temperature 1."""
        return {url: [self._logprobs(url, row) for row in rows] for url in self._told}

    def sleep(self, level: int) -> None:
        """Servers stand on GPUs of their own."""

    def wake(self, *what: str) -> None:
        """They have never slept."""

    def close(self) -> None:
        """Nothing of theirs is held."""

    @property
    def _told(self) -> Sequence[str]:
        return self._servers.base_urls if self._tells else ()

    def _named(self, name: str | None) -> TeacherConfig:
        return self._servers.model_copy(update={"served_model_name": name})

    def _engine_of(self, servers: TeacherConfig) -> OpenAIEngine:
        return OpenAIEngine.load(servers, self._tokenizer, max_length=self._max_length, report=self._report)

    def _logprobs(self, url: str, row: Sequence[int]) -> tuple[float, ...]:
        name = self._adapter or served_name(self._servers)
        call = {
            "model": name, "prompt": list(row), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0,
        }  # fmt: skip
        answer = self._post(url, "/v1/completions", call, hint="is it vllm?")
        steps = answer["choices"][0]["prompt_logprobs"][1:]
        return tuple(step[str(token)]["logprob"] for step, token in zip(steps, row[1:], strict=True))

    def _post(self, url: str, path: str, body: dict[str, Any], *, hint: str) -> Any:
        """The answer's JSON, {} where it is none. Raises EngineError that names the server; `hint` is for one
        that does not know the path."""
        request = urllib.request.Request(
            url.rstrip("/").removesuffix("/v1") + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._servers.request_timeout) as answer:
                return _parsed(answer.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            more = f"; {hint}" if error.code == 404 else ""
            raise EngineError(f"{url} refuses {path}: {error.code} {said or error.reason}{more}") from error
        except OSError as error:  # URLError, a time-out and a broken connection are all of this kind
            raise EngineError(f"{url} does not answer: {getattr(error, 'reason', error)}") from error


def _parsed(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return {}
