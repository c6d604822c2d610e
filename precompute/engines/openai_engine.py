"""Servers that speak OpenAI's completions API, several for one model; the one file that imports openai.

What is asked and how the answers are read stands in completions_api.py. The key is read from the environment
when a client is made, and goes nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import openai

from precompute.config import TeacherConfig
from precompute.engines import Completion, Request, Requests, Sampling
from precompute.engines.calls import Calls
from precompute.engines.checks import stop_ids_of
from precompute.engines.completions_api import completion_of, plain_call, vllm_call
from precompute.engines.feed import PAUSE, Feed
from store.errors import EngineError

CONNECT_SECONDS = 10.0
"""Until a server counts as one that cannot be reached."""
IMPATIENT = {"timeout": CONNECT_SECONDS, "max_retries": 2}
"""For questions that cost a server nothing."""
UNKNOWN = "unknown"
NO_KEY = "none"
"""The client insists on a key; without one the header that would carry it is left out."""

GONE = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
"""What the client tries again. Once it has tried often enough, the server is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a teacher's servers say of themselves."""

    version: str
    vllm_urls: frozenset[str]
    """Those that are vLLM: they return ids."""
    max_length: int | None
    """The fewest positions that one of them has; None where none says it."""
    gone: dict[str, str]
    """url -> why it cannot be used."""


def survey(teacher: TeacherConfig) -> Survey:
    """Asks every server for its models. Raises EngineError when none answers, and when one that does lacks
    the model or refuses the key."""
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
    """What vLLM answers beside its API; of others there is no common way to know."""
    try:
        answer: Any = client.get(
            url.rstrip("/").removesuffix("/v1") + "/version",
            cast_to=object,
            options={"headers": _headers(teacher)},
        )
    except openai.APIError:
        return UNKNOWN
    return str(answer.get("version", UNKNOWN)) if isinstance(answer, dict) else UNKNOWN


def served_name(teacher: TeacherConfig) -> str:
    """The model's name at the servers."""
    return teacher.served_model_name or teacher.model


class Server:
    """One server, while requests are under way."""

    def __init__(self, teacher: TeacherConfig, url: str, *, is_vllm: bool) -> None:
        self.url = url
        self.is_vllm = is_vllm
        self.busy = 0
        """Requests under way at it."""
        self.client = openai.AsyncOpenAI(**_client_options(teacher, url))


class OpenAIEngine:
    """Draws completions from servers, `batch_size` at once over all of them together."""

    name = "openai"

    def __init__(
        self,
        teacher: TeacherConfig,
        tokenizer: Any,
        found: Survey,
        *,
        report: Callable[[str], None],
    ) -> None:
        self.version = found.version
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._found = found
        self._gone = dict(found.gone)
        self._stop_ids = _stop_ids(teacher, tokenizer)
        self._report = report

    @classmethod
    def load(
        cls, teacher: TeacherConfig, tokenizer: Any, *, max_length: int, report: Callable[[str], None]
    ) -> OpenAIEngine:
        """Asks the servers whether they have the model, with room for `max_length` tokens of prompt and
        completion. Raises EngineError."""
        found = survey(teacher)
        if found.max_length is not None and max_length > found.max_length:
            raise EngineError(
                f"the longest prompt and max_tokens = {teacher.max_tokens} need {max_length} positions and "
                f"a server has {found.max_length}; start it with --max-model-len {max_length}"
            )
        engine = cls(teacher, tokenizer, found, report=report)
        for url, reason in found.gone.items():
            engine._report_gone(url, reason)
        return engine

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, as they come back.

        Raises EngineError when the last server is given up, and for what no further try can mend.
        """
        return self._generate(Feed(requests, sampling, self._found.max_length), sampling)

    def close(self) -> None:
        """Nothing is held between two `generate`."""

    def _generate(self, feed: Feed, sampling: Sampling) -> Iterator[Completion]:
        servers = [
            Server(self._teacher, url, is_vllm=url in self._found.vllm_urls)
            for url in self._teacher.base_urls
            if url not in self._gone
        ]

        async def close() -> None:
            for server in servers:
                await server.client.close()

        most = self._teacher.batch_size
        with Calls[Completion](close) as calls:
            while True:
                for request in feed.take(most - calls.running):
                    calls.start(self._draw(request, sampling, servers))
                if calls.running:
                    yield from calls.take(None if feed.ended or calls.running == most else PAUSE)
                elif feed.ended:
                    return
                else:
                    feed.wait()

    async def _draw(self, request: Request, sampling: Sampling, servers: list[Server]) -> Completion:
        """From the server with the least to do; from another when that one has to be given up."""
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
                    return completion if _tells(sampling) else replace(completion, logprobs=())
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
            self._report_gone(server.url, reason)

    def _report_gone(self, url: str, reason: str) -> None:
        self._report(f"{self._teacher.name}: {url} is given up ({reason}); the other servers go on")


def _tells(sampling: Sampling) -> bool:
    """Servers give the model's own log-probabilities."""
    return sampling.logprobs == "model" or sampling.is_plain


def _client_options(teacher: TeacherConfig, url: str) -> dict[str, Any]:
    """Of a client, the key included: to be passed on at once and never kept."""
    key = os.environ[teacher.api_key_env] if teacher.api_key_env else NO_KEY
    return {
        "base_url": url,
        "api_key": key,
        "timeout": openai.Timeout(teacher.request_timeout, connect=CONNECT_SECONDS),
        "max_retries": teacher.max_retries,
    }


def _headers(teacher: TeacherConfig) -> dict[str, Any]:
    """Of every call: without a key of the config's none is sent, whatever else stands in the environment."""
    return {} if teacher.api_key_env else {"Authorization": openai.Omit()}


def _stop_ids(teacher: TeacherConfig, tokenizer: Any) -> tuple[int, ...]:
    """The model's EOS ids where it is at hand, else the tokenizer's; the server knows its own in any case."""
    try:
        return stop_ids_of(teacher.model, teacher.revision, tokenizer)
    except EngineError:
        return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _refused(url: str, error: openai.APIStatusError, teacher: TeacherConfig) -> EngineError:
    """What no further try can mend, and what to do about it."""
    hints = {
        401: f"the key in {teacher.api_key_env} is not accepted"
        if teacher.api_key_env
        else "it wants a key: name the environment variable that holds it in api_key_env",
        404: "most base URLs end in /v1; served_model_name is the server's name for the model",
    }
    hint = hints.get(error.status_code)
    return EngineError(f"{url}: {_reason(error, teacher)}" + (f"; {hint}" if hint else ""))


def _reason(error: openai.APIError, teacher: TeacherConfig) -> str:
    """One line, and never with the key in it: some servers repeat what they were sent."""
    if isinstance(error, openai.APITimeoutError):
        said = "no answer in time"
    elif isinstance(error, openai.APIStatusError):
        said = f"{error.status_code} {_message(error)}"
    else:
        said = _root(error)
    key = os.environ.get(teacher.api_key_env or "")
    return " ".join((said.replace(key, "***") if key else said).split())[:300]


def _root(error: BaseException) -> str:
    """What the system said, below what was made of it."""
    while error.__cause__ is not None and not isinstance(error.__cause__, BaseExceptionGroup):
        error = error.__cause__
    return str(error) or type(error).__name__


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message", body) if isinstance(body, dict) else body
    return str(said or error.response.reason_phrase)


def _listed(gone: dict[str, str]) -> str:
    return ", ".join(f"{url} ({reason})" for url, reason in gone.items())
