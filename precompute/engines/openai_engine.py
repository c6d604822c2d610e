"""Servers with OpenAI's completions API, several for one model; the one file that imports openai.

The calls and their answers are in completions_api.py. The key is read from the environment when a client is
made, and goes nowhere else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import openai

from precompute.config import TeacherConfig
from precompute.engines import Completion, Request, Requests, Sampling
from precompute.engines.checks import stop_ids_of
from precompute.engines.completions_api import completion_of, plain_call, vllm_call
from precompute.engines.feed import PAUSE, Feed
from store.errors import EngineError

CONNECT_SECONDS = 10.0
"""Longest wait for a connection."""
IMPATIENT = {"timeout": CONNECT_SECONDS, "max_retries": 2}
"""Options of calls that cost a server nothing."""
UNKNOWN = "unknown"
NO_KEY = "none"
"""The client insists on a key; without one the header that would carry it is left out."""

GONE = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
"""Errors after which the client tries again; after `max_retries` the server is given up."""


Tasks = set[asyncio.Task[Completion]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Answers of a teacher's servers about themselves."""

    version: str
    vllm_urls: frozenset[str]
    """Servers that are vLLM: they return ids."""
    max_length: int | None
    """Fewest positions of any server; None where no server states it."""
    gone: dict[str, str]
    """url -> why it cannot be used."""


def survey(teacher: TeacherConfig) -> Survey:
    """Asks every server for its models.

    Raises EngineError when none answers, and when one that does lacks the model or refuses the key.
    """
    models: dict[str, Any] = {}
    versions: set[str] = set()
    gone: dict[str, str] = {}
    for url in teacher.base_urls:
        with openai.OpenAI(**_client_options(teacher, url) | IMPATIENT) as client:
            try:
                models[url] = _served_model(client, teacher, url)
                versions.add(_version(client, teacher, url))
            except GONE as error:
                gone[url] = _reason(error, teacher)
            except openai.APIStatusError as error:
                raise _refused(url, error, teacher) from None
    if not models:
        raise EngineError(f"no server answers: {_listed(gone)}; start one, or give others as base_urls")
    lengths = [length for model in models.values() if (length := getattr(model, "max_model_len", None))]
    return Survey(
        version=", ".join(sorted(versions)),
        vllm_urls=frozenset(url for url, model in models.items() if model.owned_by == "vllm"),
        max_length=min(lengths, default=None),
        gone=gone,
    )


def _served_model(client: openai.OpenAI, teacher: TeacherConfig, url: str) -> Any:
    name = served_name(teacher)
    served = {model.id: model for model in client.models.list(extra_headers=_headers(teacher))}
    if name not in served:
        raise EngineError(
            f"{url} does not serve {name!r}; served_model_name may be: {', '.join(map(repr, served)) or None}"
        )
    return served[name]


def _version(client: openai.OpenAI, teacher: TeacherConfig, url: str) -> str:
    """Returns vLLM's version, which it gives beside its API; other servers have no common way."""
    path = url.rstrip("/").removesuffix("/v1") + "/version"
    try:
        answer: Any = client.get(path, cast_to=object, options={"headers": _headers(teacher)})
    except openai.APIError:
        return UNKNOWN
    return str(answer.get("version", UNKNOWN)) if isinstance(answer, dict) else UNKNOWN


def served_name(teacher: TeacherConfig) -> str:
    """Returns the model's name at the servers."""
    return teacher.served_model_name or teacher.model


class Server:
    """One server during a `generate` call."""

    def __init__(self, teacher: TeacherConfig, url: str, *, is_vllm: bool) -> None:
        self.url = url
        self.is_vllm = is_vllm
        self.busy = 0
        """Requests under way at it."""
        self.client = openai.AsyncOpenAI(**_client_options(teacher, url))


class OpenAIEngine:
    """Samples from servers, `batch_size` requests at once over all of them together."""

    name = "openai"

    def __init__(
        self, teacher: TeacherConfig, tokenizer: Any, *, max_length: int, report: Callable[[str], None]
    ) -> None:
        """Asks the servers for the model, with room for `max_length` tokens of prompt and completion.

        `report` receives a line for every server that is given up. Raises EngineError.
        """
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._report = report
        self._found = survey(teacher)
        if self._found.max_length is not None and max_length > self._found.max_length:
            raise EngineError(
                f"the longest prompt and max_tokens = {teacher.max_tokens} need {max_length} positions and a "
                f"server has {self._found.max_length}; start it with --max-model-len {max_length}"
            )
        self.version = self._found.version
        self._gone = dict(self._found.gone)
        self._stop_ids = _stop_ids(teacher, tokenizer)
        for url in self._gone:
            self._report_gone(url)

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, as they come back.

        Raises EngineError when the last server is given up, and for errors that no further try can mend.
        """
        return self._generate(Feed(requests, sampling, self._found.max_length), sampling)

    def close(self) -> None:
        """Frees nothing: no connection outlives `generate`."""

    def _generate(self, feed: Feed, sampling: Sampling) -> Iterator[Completion]:
        """Runs the event loop while it is iterated: at other times the answers wait in their sockets."""
        most = self._teacher.batch_size
        servers = [
            Server(self._teacher, url, is_vllm=url in self._found.vllm_urls)
            for url in self._teacher.base_urls
            if url not in self._gone
        ]
        running: Tasks = set()
        with asyncio.Runner() as runner:
            try:
                while not feed.ended or running:
                    for request in feed.take(most - len(running)):
                        sample = self._sample(request, sampling, servers)
                        running.add(runner.get_loop().create_task(sample))
                    patience = None if feed.ended or len(running) == most else PAUSE
                    if running:
                        for task in runner.run(_ended(running, patience)):
                            completion = task.result()
                            running.remove(task)
                            yield completion
                    elif not feed.ended:
                        feed.wait()
            finally:
                runner.run(_close(running, servers))

    async def _sample(self, request: Request, sampling: Sampling, servers: list[Server]) -> Completion:
        """Samples from the server with the least to do, and from another if that one is given up."""
        while True:
            alive = [server for server in servers if server.url not in self._gone]
            if not alive:
                raise EngineError(
                    f"no server is left: {_listed(self._gone)}; what was verified is kept: "
                    "start one again and go on with the same command"
                )
            server = min(alive, key=lambda server: server.busy)
            server.busy += 1
            try:
                answer = await server.client.completions.create(
                    **self._call(request, sampling, server), extra_headers=_headers(self._teacher)
                )
                completion = completion_of(request, answer, self._tokenizer, url=server.url)
                if completion is not None:
                    # Servers give the log-probabilities of the model alone.
                    known = sampling.logprobs == "model" or sampling.is_plain
                    return completion if known else replace(completion, logprobs=())
                self._give_up(server, servers, "it broke a completion off")
            except GONE as error:
                self._give_up(server, servers, _reason(error, self._teacher))
            except openai.APIStatusError as error:
                raise _refused(server.url, error, self._teacher) from None
            finally:
                server.busy -= 1

    def _call(self, request: Request, sampling: Sampling, server: Server) -> dict[str, Any]:
        name = served_name(self._teacher)
        if server.is_vllm:
            return vllm_call(request, sampling, name, stop_ids=self._stop_ids)
        return plain_call(request, sampling, name)

    def _give_up(self, server: Server, servers: list[Server], reason: str) -> None:
        if server.url in self._gone:
            return
        self._gone[server.url] = reason
        if any(other.url not in self._gone for other in servers):
            self._report_gone(server.url)

    def _report_gone(self, url: str) -> None:
        self._report(f"{self._teacher.name}: {url} is given up ({self._gone[url]}); the other servers go on")


async def _ended(tasks: Tasks, patience: float | None) -> Tasks:
    """Returns the tasks that have ended, as soon as there is one; after `patience` seconds at the latest."""
    ended, _ = await asyncio.wait(tasks, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    return ended


async def _close(tasks: Tasks, servers: list[Server]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for server in servers:
        await server.client.close()


def _client_options(teacher: TeacherConfig, url: str) -> dict[str, Any]:
    """Returns a client's options, the key included: to be passed on at once and never kept."""
    key = os.environ[teacher.api_key_env] if teacher.api_key_env else NO_KEY
    return {
        "base_url": url,
        "api_key": key,
        "timeout": openai.Timeout(teacher.request_timeout, connect=CONNECT_SECONDS),
        "max_retries": teacher.max_retries,
    }


def _headers(teacher: TeacherConfig) -> dict[str, Any]:
    """Returns the headers of every call: without `api_key_env` no key is sent, whatever is in the
    environment."""
    return {} if teacher.api_key_env else {"Authorization": openai.Omit()}


def _stop_ids(teacher: TeacherConfig, tokenizer: Any) -> tuple[int, ...]:
    """Returns the EOS ids of the model if it is here, else the tokenizer's; the server adds its own."""
    try:
        return stop_ids_of(teacher.model, teacher.revision, tokenizer)
    except EngineError:
        return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _refused(url: str, error: openai.APIStatusError, teacher: TeacherConfig) -> EngineError:
    """Returns an error that no further try can mend, with the way out."""
    hints = {
        401: f"the key in {teacher.api_key_env} is not accepted"
        if teacher.api_key_env
        else "it wants a key: name the environment variable that holds it in api_key_env",
        404: "most base URLs end in /v1; served_model_name is the server's name for the model",
    }
    hint = hints.get(error.status_code)
    return EngineError(f"{url}: {_reason(error, teacher)}" + (f"; {hint}" if hint else ""))


def _reason(error: openai.APIError, teacher: TeacherConfig) -> str:
    """Returns one line without the key: some servers repeat what they were sent."""
    if isinstance(error, openai.APITimeoutError):
        reason = "no answer in time"
    elif isinstance(error, openai.APIStatusError):
        body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
        reason = f"{error.status_code} {body or error.response.reason_phrase}"
    else:
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root.__cause__, BaseExceptionGroup):
            root = root.__cause__
        reason = str(root) or type(root).__name__
    key = os.environ.get(teacher.api_key_env or "")
    return " ".join((reason.replace(key, "***") if key else reason).split())[:300]


def _listed(gone: dict[str, str]) -> str:
    return ", ".join(f"{url} ({reason})" for url, reason in gone.items())
