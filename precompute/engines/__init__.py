"""Engines: they turn prompt ids into sampled completions.

    requests (prompt ids, a seed each)  --generate-->  completions, in the order in which they finish

An engine takes the next request when it has room for it, so that a request may depend on earlier completions.
Each engine has a file of its own, the only one with its heavy import; registry.py has them by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Parameters of sampling."""

    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    """0: off."""
    max_tokens: int
    logprobs: Literal["model", "sampler"] = "model"
    """Kind of a completion's log-probabilities. model: the model's own, at temperature 1, before top_p and
    top_k (a store keeps these). sampler: of the very distribution that the token was sampled from."""

    @property
    def is_plain(self) -> bool:
        """True if both kinds of log-probabilities are equal."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to take. The same request gives the same completion in any batch."""

    request_id: str
    prompt_ids: tuple[int, ...]
    """[P], special tokens and generation prompt included; empty where `messages` are sent."""
    seed: int
    """Below 2**31, different for each sample: a shared seed gives n identical samples."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The chat, for a server that renders it itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The sample of one request."""

    request_id: str = ""
    token_ids: tuple[int, ...] = ()
    """[T], without the prompt; ends with the EOS id when finish_reason is `stop`."""
    logprobs: tuple[float, ...] = ()
    """[T], log-probability of each token, of the kind that `Sampling.logprobs` names; empty where the engine
    cannot know it."""
    finish_reason: str = "stop"
    """`stop`, `length` or `error` (store.records.FINISH_REASONS)."""
    text: str
    """The token ids decoded, without control tokens and with think and answer tags."""
    n_tokens: int | None = None
    """Length in tokens, where the server counts them and does not return them; None: len(token_ids)."""
    error: str = ""
    """Reason of the finish reason `error`: there is no response to this prompt, and other prompts go on."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.token_ids) if self.n_tokens is None else self.n_tokens


Requests = Iterable[Request | None]
"""Requests for an engine. None: nothing right now, more may come; the end of the iterable: no more."""


class Engine(Protocol):
    """Samples completions. A caller may stop iterating at any time."""

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, in the order in which they finish.

        Takes requests as it has room for them, in the thread that iterates; at a None it goes on with what
        runs and looks again later. Raises EngineError when it takes a request that does not fit.
        """
        ...

    def close(self) -> None:
        """Frees the model's memory."""
        ...
