"""Engines: anything that turns prompt ids into sampled completions.

    requests (prompt ids, a seed each)  --generate-->  completions, in the order in which they finish

Engines are fed: they take the next request when they have room for one, so that what is asked next may
depend on what came back.

One Protocol, one file an engine; each heavy import lives in its engine's file alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    """0: off."""
    max_tokens: int
    logprobs: Literal["model", "sampler"] = "model"
    """What a completion's are. model: the model's own, at temperature 1, before top_p and top_k (what a store
    keeps). sampler: of the very distribution that the token was drawn from."""

    @property
    def is_plain(self) -> bool:
        """Draws from the model's own distribution: both kinds of log-probabilities are the same."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to draw. The same request gives the same completion in any batch."""

    request_id: str
    prompt_ids: tuple[int, ...]
    """[P], special tokens and generation prompt included: ids in, ids out."""
    seed: int
    """Below 2**31, and its own for each sample: a shared seed gives n identical samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine drew for one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """[T], without the prompt; ends with the EOS id when finish_reason is `stop`."""
    logprobs: tuple[float, ...]
    """[T], log-probability of each token, of the kind that `Sampling.logprobs` asks for; empty where the
    engine cannot know it."""
    finish_reason: str
    """`stop` or `length` (store.records.FINISH_REASONS)."""
    text: str
    """The token ids decoded, special tokens left out."""


Requests = Iterable[Request | None]
"""What an engine draws. None: nothing right now, more may come; the end of the iterable: no more."""


class Engine(Protocol):
    """Draws completions. A caller may stop iterating at any time; `close` frees the model."""

    name: str
    version: str

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, in the order in which they finish.

        Takes requests as it has room for them, in the thread that iterates; at a None it goes on with what
        runs and asks again later. Raises EngineError for a request that does not fit: at once where
        `requests` is a sequence, else when it is taken.
        """
        ...

    def close(self) -> None:
        """Frees the model's memory."""
        ...
