"""Samples from vLLM servers by openai_engine.py, and gives them new weights.

Full weights need `VLLM_SERVER_DEV_MODE=1` in a server's environment (its /collective_rpc and
/reset_prefix_cache); adapters need `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`. These paths
are vLLM's own and open to whoever reaches the port.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from precompute.config import TeacherConfig
from precompute.engines import Completion, Requests, Sampling
from precompute.engines.openai_engine import OpenAIEngine
from store.errors import EngineError
from trainer.parallel.world import World

DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
LORA_MODE = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"


class VllmServers(OpenAIEngine):
    """Samples from several servers that hold the same weights, which rank 0 sends them.

    A server that does not answer is reported, and ends the next update of weights.
    """

    def __init__(self, servers: TeacherConfig, tokenizer: Any, world: World, *, max_length: int) -> None:
        """Raises EngineError when no server answers, and when one lacks the model or has too few positions.

        `servers`: their `base_urls`, `model`, `served_model_name`, `batch_size` and `request_timeout`.
        """
        super().__init__(servers, tokenizer, max_length=max_length)
        if self._max_length is not None and max_length > self._max_length:
            raise EngineError(f"{self._too_long(max_length)}; start it with --max-model-len {max_length}")
        self._updated_urls = servers.base_urls if world.is_main else ()
        # A server may still have the adapters of a killed run.
        self._adapters = world.from_main(lambda: f"student-{secrets.token_hex(4)}")

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request; the student's samples have to be complete, so a failed one raises
        EngineError."""
        for completion in super().generate(requests, sampling):
            if completion.error:
                raise EngineError(completion.error)
            yield completion

    def load_weights(self, folder: Path) -> None:
        """Has every server load the weights of a transformers directory. Raises EngineError."""
        for url in self._updated_urls:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post(url, "/collective_rpc", call, hint=DEV_MODE)
            self._post(url, "/reset_prefix_cache", {}, hint=DEV_MODE)

    def load_adapter(self, folder: Path, number: int) -> None:
        """Has every server replace its LoRA adapter by that of a peft directory. Raises EngineError.

        `number` counts the adapters, from 1.
        """
        before, self._model = self._model, f"{self._adapters}-{number}"
        for url in self._updated_urls:
            adapter = {"lora_name": self._model, "lora_path": str(folder)}
            self._post(url, "/v1/load_lora_adapter", adapter, hint=LORA_MODE)
            if number > 1:
                self._post(url, "/v1/unload_lora_adapter", {"lora_name": before}, hint=LORA_MODE)

    def sleep(self, level: int) -> None:
        """Does nothing: servers have GPUs of their own."""

    def wake(self, what: str) -> None:
        """Does nothing."""

    def _post(self, url: str, path: str, body: dict[str, Any], *, hint: str) -> None:
        """Raises EngineError that names the server; `hint` is for a server that does not know the path."""
        request = urllib.request.Request(
            url.rstrip("/").removesuffix("/v1") + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._teacher.request_timeout) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:300] or error.reason
            more = f"; {hint}" if error.code == 404 else ""
            raise EngineError(f"{url} refuses {path}: {error.code} {reason}{more}") from error
        except OSError as error:  # also URLError, a timeout and a broken connection
            raise EngineError(f"{url} does not answer: {getattr(error, 'reason', error)}") from error
