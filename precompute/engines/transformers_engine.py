"""transformers' own `generate`, with samples that depend on a row's seed alone (seeded_sampler.py).

`generate` samples a batch from one random stream, so that a row's tokens depend on its neighbours. Here a
logits processor samples instead: each row has its own uniforms, and the token is the inverse CDF at the row's
next one. The same request gives the same completion in any batch, up to float noise.

Rows that have ended leave the batch: the key-value cache is cut, other rows join (batch.py), and `generate`
goes on.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
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
from precompute.engines.decoding import response_decoder
from precompute.engines.feed import Feed
from precompute.engines.four_bits import check_blocks, nf4_on
from store.errors import EngineError

REFILL_SHARE = 1 / 4
"""Share of a running batch that has to be free before others join."""
DRY_TOKENS = 16
"""Tokens between two looks at a feed that was dry."""


class TransformersEngine:
    """Samples from a causal language model in memory.

    The model may be in training: it is in eval mode during a batch, and as before afterwards.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 64) -> None:
        self._model = model
        self._decode = response_decoder(tokenizer)
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
        `quantization = "bitsandbytes"` loads the linear layers in 4 bits (nf4). Raises EngineError that names
        the model if it cannot be loaded.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(device)
        on_cpu = target.type == "cpu"
        options = nf4_on(target, torch.float32 if on_cpu else torch.bfloat16) if quantization else {}
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would cross ours
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                model_path,
                revision=revision,
                dtype="float32" if dtype == "auto" and on_cpu else dtype,
                **options,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
            raise cannot_load(model_path, error) from error
        if quantization is None:
            model = model.to(target)
        else:
            check_blocks(model, target, named=f"model {model_path!r}", instead="leave quantization out")
        return cls(model, tokenizer, batch_size=batch_size)

    def generate(self, requests: Requests, sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request; a sequence begins with its short prompts.

        Samples until enough rows have ended, yields those, and lets others join: one long completion does
        not hold up the whole batch. Raises EngineError for a prompt that together with `max_tokens` exceeds
        the model's positions.
        """
        if isinstance(requests, Sequence):
            given: list[Request] = [request for request in requests if request is not None]
            given.sort(key=lambda request: len(request.prompt_ids))
            requests = given
        feed = Feed(requests, sampling, self._context_length)
        rows: Rows | None = None
        while True:
            if fresh := feed.take(self._room(rows)):
                joining = self._rows(fresh, sampling)
                if rows is not None:
                    # Prompts are computed apart from the rows that already run.
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

    def close(self) -> None:
        """Drops the model, which frees its memory unless it is in use elsewhere."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _rows(self, requests: Sequence[Request], sampling: Sampling) -> Rows:
        cache, device = self._new_cache(), self._model.device
        rows = Rows(requests, sampling, pad_id=self._eos[0], cache=cache, device=device)
        if rows.can_be_joined and self._can_keep_few_logits:
            self._read_prompts(rows)
        return rows

    def _read_prompts(self, rows: Rows) -> None:
        """Computes a prompt that several rows have only once; does nothing if all are different."""
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
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows.cache.batch_select_indices(
            torch.tensor([row_of[request.prompt_ids] for request in rows.requests], device=rows.ids.device)
        )

    def _room(self, rows: Rows | None) -> int:
        """Returns how many requests to take; 0 while few rows are free, for a refill is a pass of its own."""
        if rows is None:
            return self._batch_size
        free = self._batch_size - len(rows)
        return free if rows.can_be_joined and free >= self._batch_size * REFILL_SHARE else 0

    def _pace(self, rows: Rows, feed: Feed, sampling: Sampling) -> tuple[int, int]:
        """Returns (rows that end, tokens) after which the feed is looked at again, whichever comes first."""
        most = sampling.max_tokens - max(rows.sampler.counts)
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
        """Samples until `count` rows have ended or all have `most` further tokens; yields the ended ones."""
        with _lent(self._model):
            ids = self._model.generate(
                input_ids=rows.ids,
                attention_mask=rows.mask,
                past_key_values=rows.cache,
                generation_config=self._generation_config(most),
                logits_processor=LogitsProcessorList([rows.sampler]),
                stopping_criteria=StoppingCriteriaList([EnoughEnded(self._eos, rows.ids, count)]),
                # Every rank samples at its own pace.
                synced_gpus=False,
            )
        rows.grow(ids)
        going, completions = [], []
        for row, (tokens, logprobs) in enumerate(rows.sampled()):
            if len(tokens) == rows.sampler.max_tokens or not self._eos_set.isdisjoint(tokens):
                completions.append(self._completion(rows.requests[row], tokens, logprobs))
            else:
                going.append(row)
        rows.keep(going)
        yield from completions

    def _new_cache(self) -> DynamicCache | None:
        """Returns a key-value cache whose rows can be removed; None for models with another kind of state."""
        cache = DynamicCache(config=_base_model(self._model).config.get_text_config(decoder=True))
        return cache if all(isinstance(layer, DynamicLayer) for layer in cache.layers) else None

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        """Returns greedy decoding over scores in which the sampler left one token, without any of the model's
        own sampling defaults."""
        return GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._eos),
            pad_token_id=self._eos[0],
        )

    def _completion(self, request: Request, tokens: list[int], logprobs: list[float]) -> Completion:
        """Cuts a row after its first EOS; the rest is padding."""
        ends = [tokens.index(eos) for eos in self._eos if eos in tokens]
        length = min(ends) + 1 if ends else len(tokens)
        if not all(logprob > -torch.inf for logprob in logprobs[:length]):
            raise EngineError(
                f"the model's logits are not finite (request {request.request_id}); "
                f'dtype = "{self._model.dtype}" may be too small for it: try dtype = "float32"'
            )
        return Completion(
            request_id=request.request_id,
            token_ids=tuple(tokens[:length]),
            logprobs=tuple(logprobs[:length]),
            finish_reason="stop" if ends else "length",
            text=self._decode(tokens[:length]),
        )


class EnoughEnded(StoppingCriteria):
    """Stops a batch once at least `count` of its rows have ended."""

    def __init__(self, eos: Sequence[int], ids: torch.Tensor, count: int) -> None:
        self._eos = torch.tensor(eos, device=ids.device)
        self._ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self._count = count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[B, L] -> [B], equal for all rows."""
        self._ended |= torch.isin(input_ids[:, -1], self._eos)
        return (self._ended.sum() >= self._count).expand(len(self._ended))


def _base_model(model: Any) -> Any:
    """Returns the transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _lent(model: Any) -> Iterator[None]:
    """The model in eval mode and without its own generation defaults, from which `generate` would fill every
    open option (such as a repetition penalty)."""
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
