"""Servers with OpenAI's APIs, several for one model; the one file that imports openai.

completions: servers that are vLLM take the prompt's ids, and return the completion's with their
log-probabilities. Of any other server only the text is sure: it is tokenized again with the teacher's
tokenizer (no EOS behind it), and `logprobs` stays empty, so that `guidance.loss = "shaped_ratio"` refuses its
traces.

chat: messages in, text and its number of tokens out.

The key is read from the environment when a client is made, and goes nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import openai

from precompute.config import TeacherConfig
from precompute.engines import Completion, Request, Requests, Sampling
from precompute.engines.checks import stop_ids_of
from precompute.engines.decoding import response_decoder
from precompute.engines.feed import PAUSE, Feed
from precompute.engines.openai_answers import chat_text, choice_of, whole_text
from store.errors import EngineError

CONNECT_SECONDS = 10.0
"""Longest wait for a connection, and between two tries of an unusable answer."""
RETRY_SECONDS = 0.25
SHOWN = 8
"""Names of a server's models in an error."""
NO_SUCH_PATH = (404, 405, 501)
UNKNOWN = "unknown"
LOGGER = logging.getLogger(__name__)

REFUSALS = (400, 403, 413, 422)
"""Status of an answer to a prompt that no server will take; others may be taken."""

GONE = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
"""Errors after which the client tries again; after `max_retries` the server is given up."""

Tasks = set[asyncio.Task[Completion]]


@dataclass(slots=True, kw_only=True)
class Server:
    """One server of a model."""

    url: str
    is_vllm: bool = False
    """It returns ids."""
    version: str = UNKNOWN
    max_length: int | None = None
    """Positions for prompt and completion; None: it does not state them."""
    limit_key: str = "max_tokens"
    """Its name for the most tokens of a response; `max_completion_tokens` for OpenAI's reasoning models."""
    gone: str | None = None
    """Why it is given up."""
    busy: int = 0
    """Requests under way at it."""


def find_servers(teacher: TeacherConfig) -> list[Server]:
    """Queries every server for its models.

    Raises EngineError when none answers, and when one that does lacks the model or refuses the key.
    """
    servers = [_find_server(teacher, url) for url in teacher.base_urls]
    if all(server.gone for server in servers):
        raise EngineError(f"no server answers: {_listed(servers)}; start one, or give others as base_urls")
    return servers


def servers_version(teacher: TeacherConfig) -> str:
    """Returns the version, or versions, of the servers that answer. Raises EngineError as find_servers."""
    return ", ".join(sorted({server.version for server in find_servers(teacher) if not server.gone}))


def _find_server(teacher: TeacherConfig, url: str) -> Server:
    headers = _headers(teacher)
    options = _client_options(teacher, url) | {"timeout": CONNECT_SECONDS, "max_retries": 2}
    name, is_chat = teacher.served_model_name or teacher.model, teacher.api == "chat"
    with openai.OpenAI(**options) as client:
        try:
            served: dict[str, Any] = {model.id: model for model in client.models.list(extra_headers=headers)}
            version = _version(client, url, headers)
            if name not in served:
                near = get_close_matches(name, served, n=SHOWN, cutoff=0.0)
                more = f" and {len(served) - SHOWN} others" if len(served) > SHOWN else ""
                listed = ", ".join(map(repr, near)) or None
                raise EngineError(f"{url} does not serve {name!r}; served_model_name may be: {listed}{more}")
            is_vllm = getattr(served[name], "owned_by", None) == "vllm"
            if not (is_vllm or is_chat):
                _check_takes_ids(client, url, name, headers)
        except GONE as error:
            return Server(url=url, gone=_reason(error, teacher))
        except openai.APIStatusError as error:
            if is_chat and error.status_code in NO_SUCH_PATH:  # some list no models
                return Server(url=url)
            raise _refused(url, error, teacher) from None
        except (AttributeError, TypeError, ValueError):  # a page of HTML, say
            raise EngineError(f"{url} lists no models: is it the base URL? most end in /v1") from None
    length = None if is_chat else getattr(served[name], "max_model_len", None)
    return Server(url=url, is_vllm=is_vllm, version=version, max_length=length)


def _check_takes_ids(client: openai.OpenAI, url: str, name: str, headers: dict[str, Any]) -> None:
    """Raises EngineError for a server that completes no text, or none that is given as token ids."""
    for prompt in ([1], "1"):
        options: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": 1}
        try:
            client.completions.create(**options, extra_headers=headers)
        except openai.APIStatusError as error:
            if error.status_code in NO_SUCH_PATH:
                raise EngineError(f'{url} has no completions API: set api = "chat"') from None
            if error.status_code not in REFUSALS:
                raise
        else:
            if prompt == "1":
                raise EngineError(f'{url} takes prompts as text and not as token ids: set api = "chat"')
            return
    raise EngineError(f'{url} refuses any prompt of its completions API: set api = "chat"')


def _version(client: openai.OpenAI, url: str, headers: dict[str, Any]) -> str:
    """Returns vLLM's version, which it gives beside its API; other servers have no common way."""
    try:
        path = url.rstrip("/").removesuffix("/v1") + "/version"
        answer: Any = client.get(path, cast_to=object, options={"headers": headers})
    except openai.APIError:
        return UNKNOWN
    return str(answer.get("version", UNKNOWN)) if isinstance(answer, dict) else UNKNOWN


class OpenAIEngine:
    """Samples from servers, `batch_size` requests at once over all of them together."""

    def __init__(self, teacher: TeacherConfig, tokenizer: Any, *, max_length: int) -> None:
        """Queries the servers for the model, with room for `max_length` tokens of prompt and completion.

        Logs a line for every server that is given up. Raises EngineError.
        """
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._decode = None if tokenizer is None else response_decoder(tokenizer)
        self._servers = find_servers(teacher)
        self._model = teacher.served_model_name or teacher.model
        self._stop_ids = () if tokenizer is None else _stop_ids(teacher, tokenizer)
        lengths = [server.max_length for server in self._servers if server.max_length]
        self._max_length = min(lengths, default=None)
        if self._max_length is not None and max_length > self._max_length:
            LOGGER.warning(f"{teacher.name}: {self._too_long(max_length)}; prompts that do not fit fail")
        for server in self._servers:
            if server.gone:
                self._report_gone(server)

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, as they come back.

        The event loop runs while this is iterated; at other times the answers wait in their sockets. Raises
        EngineError when the last server is given up, and for errors that no further try can mend.
        """
        feed, most = Feed(requests, sampling, None), self._teacher.batch_size
        running: Tasks = set()
        with asyncio.Runner() as runner:
            clients = {
                server.url: openai.AsyncOpenAI(**_client_options(self._teacher, server.url))
                for server in self._servers
            }
            try:
                while not feed.ended or running:
                    for request in feed.take(most - len(running)):
                        sample = self._sample(request, sampling, clients)
                        running.add(runner.get_loop().create_task(sample))
                    if not running:
                        feed.wait()
                        continue
                    patience = None if feed.ended or len(running) == most else PAUSE
                    waiting = asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                    for task in runner.run(waiting)[0]:
                        completion = task.result()
                        running.remove(task)
                        yield completion
            finally:
                runner.run(_close(running, clients))

    def close(self) -> None:
        """Frees nothing: no connection outlives `generate`."""

    async def _sample(
        self, request: Request, sampling: Sampling, clients: Mapping[str, openai.AsyncOpenAI]
    ) -> Completion:
        """Samples from the server with the least to do, and from another if that one is given up.

        A refused prompt fails at once, and one without a usable answer after `max_retries` further tries.
        """
        needed, unusable = len(request.prompt_ids) + sampling.max_tokens, 0
        if self._max_length is not None and needed > self._max_length:
            return failed(request, self._too_long(needed))
        while alive := [server for server in self._servers if not server.gone]:
            server = min(alive, key=lambda server: server.busy)
            server.busy += 1
            limit_key = server.limit_key
            try:
                client = clients[server.url]
                create: Any = client.chat.completions.create if self._chats else client.completions.create
                answer = await create(
                    **self._arguments(request, sampling, server), extra_headers=_headers(self._teacher)
                )
                completion = self._completion(request, sampling, answer)
                if completion is not None:
                    return completion
                reason = "it broke a completion off"
            except GONE as error:
                reason = _reason(error, self._teacher)
            except openai.APIStatusError as error:
                is_refused = error.status_code in REFUSALS
                if is_refused and "max_completion_tokens" in str(error) and limit_key == "max_tokens":
                    server.limit_key = "max_completion_tokens"
                    continue
                if is_refused:
                    return failed(request, f"{server.url}: {_reason(error, self._teacher)}")
                raise _refused(server.url, error, self._teacher) from None
            except ValueError as error:  # also of an answer that is no JSON
                unusable += 1
                if unusable > self._teacher.max_retries:
                    return failed(request, f"{server.url}: {_one_line(str(error), self._teacher)}")
                await asyncio.sleep(min(RETRY_SECONDS * 2**unusable, CONNECT_SECONDS))
                continue
            finally:
                server.busy -= 1
            if not server.gone:
                server.gone = reason
                if any(not other.gone for other in self._servers):
                    self._report_gone(server)
        raise EngineError(
            f"no server is left: {_listed(self._servers)}; what was verified is kept: "
            "start one again and go on with the same command"
        )

    def _arguments(self, request: Request, sampling: Sampling, server: Server) -> dict[str, Any]:
        """Returns the arguments of a call. vLLM is to return ids, and to apply no sampling default of its
        own; another server gets the API's own arguments, and those that are off at their default only where
        they are on."""
        arguments = {
            "model": self._model,
            server.limit_key: sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": request.seed,
        }
        if self._chats:
            arguments["messages"] = [dict(message) for message in request.messages]
        else:
            arguments["prompt"] = list(request.prompt_ids)
        more: dict[str, Any] = {}
        if server.is_vllm or sampling.top_p < 1:
            arguments["top_p"] = sampling.top_p
        if server.is_vllm or sampling.top_k:
            more["top_k"] = sampling.top_k
        if server.is_vllm:
            more |= {"min_p": 0.0, "repetition_penalty": 1.0}
            if not self._chats:
                more |= {"stop_token_ids": list(self._stop_ids), "return_token_ids": True}
                arguments["logprobs"] = 0  # of the sampled token alone; vLLM gives it at temperature 1
        return arguments | {"extra_body": more | self._teacher.extra_body}

    def _completion(self, request: Request, sampling: Sampling, answer: Any) -> Completion | None:
        """Returns the completion; None if the server broke it off. ValueError for any other answer."""
        choice, count = choice_of(answer), None
        finish_reason = getattr(choice, "finish_reason", None)
        if finish_reason == "abort":
            return None
        ids, logprobs = getattr(choice, "token_ids", None), None
        if self._chats:
            text, ids = chat_text(choice), ()
            count = getattr(getattr(answer, "usage", None), "completion_tokens", None) or 0
        elif ids is None or self._decode is None:
            text = whole_text(getattr(choice, "text", None))
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            text = self._decode(ids)
            if sampling.logprobs == "model" or sampling.is_plain:  # servers give the model's alone
                logprobs = getattr(choice.logprobs, "token_logprobs", None)
        return Completion(
            request_id=request.request_id,
            token_ids=tuple(ids),
            logprobs=tuple(logprobs or ()),
            # Any other reason is a cut as well.
            finish_reason="stop" if finish_reason == "stop" else "length",
            text=text,
            n_tokens=count,
        )

    @property
    def _chats(self) -> bool:
        return self._teacher.api == "chat"

    def _too_long(self, needed: int) -> str:
        return (
            f"a prompt and max_tokens = {self._teacher.max_tokens} need {needed} positions and a server has "
            f"{self._max_length}"
        )

    def _report_gone(self, server: Server) -> None:
        name = self._teacher.name
        LOGGER.warning(f"{name}: {server.url} is given up ({server.gone}); the other servers go on")


def failed(request: Request, reason: str) -> Completion:
    """Returns the completion of a prompt that no server completes."""
    return Completion(
        request_id=request.request_id,
        token_ids=(),
        logprobs=(),
        finish_reason="error",
        text="",
        error=reason,
    )


async def _close(tasks: Tasks, clients: Mapping[str, openai.AsyncOpenAI]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for client in clients.values():
        await client.close()


def _client_options(teacher: TeacherConfig, url: str) -> dict[str, Any]:
    """Returns a client's options, the key included: to be passed on at once and never kept."""
    return {
        "base_url": url,
        # The client insists on a key; without one the header that would carry it is left out.
        "api_key": os.environ[teacher.api_key_env] if teacher.api_key_env else "none",
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
    hint = {404: "; most base URLs end in /v1; served_model_name is the server's name for the model"}
    if teacher.api_key_env:
        hint[401] = f"; the key in {teacher.api_key_env} is not accepted"
    else:
        hint[401] = "; it wants a key: name the environment variable that holds it in api_key_env"
    return EngineError(f"{url}: {_reason(error, teacher)}{hint.get(error.status_code, '')}")


def _reason(error: openai.APIError, teacher: TeacherConfig) -> str:
    """Returns one line without the key: some servers repeat what they were sent."""
    if isinstance(error, openai.APITimeoutError):
        reason = "no answer in time"
    elif isinstance(error, openai.APIStatusError):
        body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
        reason = f"{error.status_code} {body or error.response.reason_phrase}"
    else:
        reason = str(error.__cause__ or error) or type(error).__name__
    return _one_line(reason, teacher)


def _one_line(text: str, teacher: TeacherConfig) -> str:
    key = os.environ.get(teacher.api_key_env or "")
    return " ".join((text.replace(key, "***") if key else text).split())[:300]


def _listed(servers: Sequence[Server]) -> str:
    return ", ".join(f"{server.url} ({server.gone})" for server in servers)
