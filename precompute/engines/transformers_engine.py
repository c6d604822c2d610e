"""transformers' own `generate`, with draws that depend on a row's seed alone (drawing.py).

`generate` samples a batch from one random stream, so that a row's tokens depend on its neighbours. Here a
logits processor draws instead: each row brings its own uniforms and the token is the inverse CDF at the
row's next one. The same request gives the same completion in any batch, up to float noise.

Rows that have ended leave the batch: the key-value cache is cut, others take their places (rows.py), and
`generate` goes on.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import logging

from precompute.engines import Completion, Request, Requests, Sampling
from precompute.engines.batch import Rows
from precompute.engines.checks import cannot_load, eos_ids
from precompute.engines.feed import Feed
from precompute.engines.four_bits import check_blocks, nf4_on
from store.errors import EngineError

REFILL_SHARE = 1 / 4
"""Others join a running batch once this share of its places is free."""
DRY_TOKENS = 16
"""Tokens between two looks at a feed that had nothing."""


class TransformersEngine:
    """Draws completions from a causal language model that is already in memory.

    The model may be one that is being trained: it is put into eval mode for the time of a batch and given
    back as it was.
    """

    name = "transformers"
    version: str = transformers.__version__

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 64) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        base = _base_model(model)
        self._eos = eos_ids(base.generation_config, tokenizer)
        self._eos_set = frozenset(self._eos)
        self._can_keep_few_logits = "logits_to_keep" in signature(base.forward).parameters
        self._context_length = getattr(base.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def load(
        cls,
        model_path: str,
        tokenizer: Any,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        device: str = "auto",
        batch_size: int = 64,
    ) -> TransformersEngine:
        """Loads the model onto `device` (auto: CUDA where there is one).

        `dtype = "auto"` is the checkpoint's own on an accelerator and float32 on the CPU;
        `quantization = "bitsandbytes"` puts the linear layers into 4 bits (nf4). Raises EngineError that
        names the model when it cannot be loaded.
        """
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        kind = "float32" if dtype == "auto" and place.type == "cpu" else dtype
        computing = torch.float32 if place.type == "cpu" else torch.bfloat16
        narrow = nf4_on(place, computing) if quantization else {}
        try:
            with _no_bars():
                model: Any = AutoModelForCausalLM.from_pretrained(
                    model_path, revision=revision, dtype=kind, **narrow
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
            raise cannot_load(model_path, error) from error
        if quantization is None:
            model = model.to(place)
        else:  # it stands there already
            check_blocks(model, place, named=f"model {model_path!r}", instead="leave quantization out")
        return cls(model, tokenizer, batch_size=batch_size)

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request; those of a sequence are begun short prompts first.

        Raises EngineError for a prompt that together with `max_tokens` exceeds the model's positions: at
        once where `requests` is a sequence.
        """
        if isinstance(requests, Sequence):
            given: list[Request] = [request for request in requests if request is not None]
            given.sort(key=lambda request: len(request.prompt_ids))
            requests = given
        return self._generate(Feed(requests, sampling, self._context_length), sampling)

    def close(self) -> None:
        """Lets go of the model; its memory is free once nobody else holds it."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _generate(self, feed: Feed, sampling: Sampling) -> Iterator[Completion]:
        """Draws until enough rows have ended, hands those over, and puts others in their places: one long
        completion does not keep the whole batch at work."""
        rows: Rows | None = None
        while True:
            if fresh := feed.take(self._room(rows)):
                joining = self._rows(fresh, sampling)
                if rows is not None:
                    # A prompt's columns are computed apart from the rows that run already.
                    yield from self._advance(joining, count=1, most=1)
                    rows.join(joining)
                else:
                    rows = joining
            if rows is not None:
                count, most = self._pace(rows, feed, sampling)
                yield from self._advance(rows, count=count, most=most)
                rows = rows if rows.requests else None
            elif feed.ended:
                return
            else:
                feed.wait()

    def _rows(self, requests: Sequence[Request], sampling: Sampling) -> Rows:
        cache, device = self._new_cache(), self._model.device
        rows = Rows(requests, sampling, pad_id=self._eos[0], cache=cache, device=device)
        if rows.can_be_joined and self._can_keep_few_logits:
            self._read_prompts(rows)
        return rows

    def _read_prompts(self, rows: Rows) -> None:
        """Computes what rows with the same prompt share once; without such rows, nothing."""
        distinct = {request.prompt_ids: row for row, request in reversed(list(enumerate(rows.requests)))}
        if len(distinct) == len(rows) or rows.ids.shape[1] == 1:
            return
        ids, mask = rows.ids[list(distinct.values()), :-1], rows.mask[list(distinct.values()), :-1]
        with _lent(self._model):
            self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=rows.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        places = {prompt: place for place, prompt in enumerate(distinct)}
        rows.cache.batch_select_indices(
            torch.tensor([places[request.prompt_ids] for request in rows.requests], device=rows.ids.device)
        )

    def _room(self, rows: Rows | None) -> int:
        """How many requests to take; none for a few free places, for a refill is a pass of its own."""
        if rows is None:
            return self._batch_size
        free = self._batch_size - len(rows)
        return free if rows.can_be_joined and free >= self._batch_size * REFILL_SHARE else 0

    def _pace(self, rows: Rows, feed: Feed, sampling: Sampling) -> tuple[int, int]:
        """How many rows have to end, or how many tokens are drawn, before the next look at the feed."""
        most = sampling.max_tokens - max(rows.sampler.drawn)
        half = (len(rows) + 1) // 2
        if rows.cache is None:
            return len(rows), most
        if feed.ended or not rows.can_be_joined:
            return half, most
        if feed.dry:
            return half, min(most, DRY_TOKENS)
        missing = math.ceil(self._batch_size * REFILL_SHARE) - (self._batch_size - len(rows))
        return min(max(missing, 1), half), most

    def _advance(self, rows: Rows, *, count: int, most: int) -> Iterator[Completion]:
        """Draws until `count` rows have ended or `most` tokens are drawn; then the ended ones leave."""
        with _lent(self._model):
            ids = self._model.generate(
                input_ids=rows.ids,
                attention_mask=rows.mask,
                past_key_values=rows.cache,
                generation_config=self._generation_config(most),
                logits_processor=LogitsProcessorList([rows.sampler]),
                stopping_criteria=StoppingCriteriaList([EnoughEnded(self._eos, rows.ids, count)]),
                # Of several processes each draws at its own pace.
                synced_gpus=False,
            )
        rows.grow(ids)
        going, completions = [], []
        for row, (tokens, logprobs) in enumerate(rows.drawn()):
            if len(tokens) == rows.sampler.max_tokens or not self._eos_set.isdisjoint(tokens):
                completions.append(self._completion(rows.requests[row], tokens, logprobs))
            else:
                going.append(row)
        rows.keep(going)
        yield from completions

    def _new_cache(self) -> DynamicCache | None:
        """A key-value cache from which rows can be taken; None for models that keep another kind of state."""
        cache = DynamicCache(config=_base_model(self._model).config.get_text_config(decoder=True))
        return cache if all(isinstance(layer, DynamicLayer) for layer in cache.layers) else None

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """Greedy over scores in which the sampler has left one token; what the model's own config says about
        sampling stays out."""
        return GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._eos),
            pad_token_id=self._eos[0],
        )

    def _completion(self, request: Request, tokens: list[int], logprobs: list[float]) -> Completion:
        """Cuts a row of the batch behind its first EOS: what follows is padding, whichever id pads."""
        ends = [tokens.index(eos) for eos in self._eos if eos in tokens]
        length = min(ends) + 1 if ends else len(tokens)
        if not all(logprob > -torch.inf for logprob in logprobs[:length]):
            raise EngineError(
                f"the model's logits are not finite (request {request.request_id}); "
                f'dtype = "{self._model.dtype}" may be too narrow for it: try dtype = "float32"'
            )
        return Completion(
            request_id=request.request_id,
            token_ids=tuple(tokens[:length]),
            logprobs=tuple(logprobs[:length]),
            finish_reason="stop" if ends else "length",
            text=self._tokenizer.decode(tokens[:length], skip_special_tokens=True),
        )


class EnoughEnded(StoppingCriteria):
    """Stops a batch once at least `count` of its rows have ended."""

    def __init__(self, eos: Sequence[int], ids: torch.Tensor, count: int) -> None:
        self._eos = torch.tensor(eos, device=ids.device)
        self._ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self._count = count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[B, L] -> [B], the same for all rows."""
        self._ended |= torch.isin(input_ids[:, -1], self._eos)
        return (self._ended.sum() >= self._count).expand(len(self._ended))


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' progress bars would be drawn across ours."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _base_model(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _lent(model: Any) -> Iterator[None]:
    """The model in eval mode and without its own generation defaults, for `generate` fills every option that
    is left open from them (a repetition penalty, say)."""
    base = _base_model(model)
    was_training, defaults = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            yield
    finally:
        base.generation_config = defaults
        model.train(was_training)
