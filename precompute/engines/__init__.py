"""Engines: they turn prompt ids into sampled completions.

    requests (prompt ids, a seed each)  --generate-->  completions, in the order in which they finish

An engine takes the next request when it has room for it, so that a request may depend on earlier completions.
Each engine has a file of its own, the only one with its heavy import; registry.py has them by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """[P], special tokens and generation prompt included."""
    seed: int
    """Below 2**31, different for each sample: a shared seed gives n identical samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The sample of one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """[T], without the prompt; ends with the EOS id when finish_reason is `stop`."""
    logprobs: tuple[float, ...]
    """[T], log-probability of each token, of the kind that `Sampling.logprobs` names; empty where the engine
    cannot know it."""
    finish_reason: str
    """`stop` or `length` (store.records.FINISH_REASONS)."""
    text: str
    """The token ids decoded, special tokens left out."""


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
