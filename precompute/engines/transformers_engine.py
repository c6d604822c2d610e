"""transformers' own `generate`, with draws that depend on a row's seed alone.

`generate` samples a batch from one random stream, so that a row's tokens depend on its neighbours. Here a
logits processor draws instead: each row brings its own uniforms and the token is the inverse CDF at the
row's next one. The same request gives the same completion in any batch, up to float noise.

Rows that have ended leave the batch once half of it has: the key-value cache is cut and `generate` goes on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import logging

from precompute.engines import Completion, Request, Sampling
from precompute.engines.checks import cannot_load, check_lengths, eos_ids
from store.errors import EngineError


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
        self._context_length = getattr(base.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def load(
        cls,
        model_path: str,
        tokenizer: Any,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 64,
    ) -> TransformersEngine:
        """Loads the model onto `device` (auto: CUDA where there is one).

        `dtype = "auto"` is the checkpoint's own on an accelerator and float32 on the CPU. Raises EngineError
        that names the model when it cannot be loaded.
        """
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        kind = "float32" if dtype == "auto" and place.type == "cpu" else dtype
        try:
            with _no_bars():
                model: Any = AutoModelForCausalLM.from_pretrained(model_path, revision=revision, dtype=kind)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise cannot_load(model_path, error) from error
        return cls(model.to(place), tokenizer, batch_size=batch_size)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yields one completion a request, batch by batch, short prompts first.

        Raises EngineError at once when a prompt and `max_tokens` together exceed the model's positions.
        """
        check_lengths(requests, sampling, self._context_length)
        return self._batches(sorted(requests, key=lambda request: len(request.prompt_ids)), sampling)

    def close(self) -> None:
        """Lets go of the model; its memory is free once nobody else holds it."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batches(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        for start in range(0, len(requests), self._batch_size):
            yield from self._batch(requests[start : start + self._batch_size], sampling)

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Draws until half of the rows have ended, hands those over, goes on with the others alone: one
        long completion does not keep the whole batch at work."""
        device = self._model.device
        prompts, mask = left_padded([request.prompt_ids for request in requests], pad_id=self._eos[0])
        ids, mask = prompts.to(device), mask.to(device)  # [B, P + T]: the completions grow on the right
        sampler = SeededSampler([request.seed for request in requests], sampling, device)
        cache = self._new_cache()
        while requests:
            ids = self._draw(ids, mask, cache, sampler, sampling)
            tokens = ids[:, prompts.shape[1] :]
            full = tokens.shape[1] == sampling.max_tokens
            ended = torch.isin(tokens, torch.tensor(self._eos, device=device)).any(-1) | full  # [B]
            rows = zip(requests, ended.tolist(), tokens.tolist(), sampler.logprobs().tolist(), strict=True)
            yield from [self._completion(row[0], *row[2:]) for row in rows if row[1]]
            going = (~ended).nonzero().squeeze(1)
            requests = [requests[row] for row in going.tolist()]
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[going]
            ids = ids[going]
            sampler.keep(going)
            if cache is not None:
                cache.batch_select_indices(going)

    def _draw(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, sampler: SeededSampler, sampling: Sampling
    ) -> torch.Tensor:
        """[B, L] -> [B, L + n]: until half of the rows have ended, or all where there is no cache to cut."""
        ends = [HalfEnded(self._eos, ids)] if cache is not None else []
        with _lent(self._model):
            sequences: torch.Tensor = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=self._generation_config(sampling.max_tokens - sampler.drawn),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList(ends),
            )
        return sequences

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


class SeededSampler(LogitsProcessor):
    """Draws the next token of each row by inverse CDF at the row's own uniform, and forces it.

    Remembers the log-probability of each token at temperature 1, before top_k and top_p.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        # Bins of a large vocabulary are narrower than float32 resolves; MPS has nothing wider.
        self._precision = torch.float32 if device.type == "mps" else torch.float64
        self._uniforms = uniforms(seeds, sampling.max_tokens).to(device, self._precision)  # [B, max_tokens]
        self._logprobs: list[torch.Tensor] = []

    @property
    def drawn(self) -> int:
        """T, the tokens drawn so far for each row."""
        return len(self._logprobs)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, L] and raw logits [B, V] -> [B, V] with everything but the drawn token at -inf."""
        normalizer = scores.logsumexp(-1, keepdim=True)  # [B, 1]
        tokens = self._draw(scores, normalizer)
        self._logprobs.append((scores.gather(1, tokens) - normalizer).squeeze(1))
        return scores.fill_(-torch.inf).scatter_(1, tokens, 0.0)

    def logprobs(self) -> torch.Tensor:
        """[B, T], one column for each token drawn so far; what stands behind a row's end means nothing."""
        return torch.stack(self._logprobs, dim=1)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows of the batch alone."""
        self._uniforms = self._uniforms[rows]
        self._logprobs = [logprobs[rows] for logprobs in self._logprobs]

    def _draw(self, logits: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        """[B, V] -> [B, 1]"""
        sampling = self._sampling
        if sampling.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if sampling.temperature == 1:
            probs = (logits - normalizer).exp_()
        else:
            probs = (logits / sampling.temperature).softmax(-1)
        if sampling.top_k:
            probs = keep_top_k(probs, sampling.top_k)
        if sampling.top_p < 1:
            probs = keep_top_p(probs, sampling.top_p)
        return inverse_cdf(probs.to(self._precision), self._uniforms[:, self.drawn : self.drawn + 1])


class HalfEnded(StoppingCriteria):
    """Stops a batch once at least half of its rows have ended."""

    def __init__(self, eos: Sequence[int], ids: torch.Tensor) -> None:
        self._eos = torch.tensor(eos, device=ids.device)
        self._ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[B, L] -> [B], the same for all rows."""
        self._ended |= torch.isin(input_ids[:, -1], self._eos)
        return (2 * self._ended.sum() >= len(self._ended)).expand(len(self._ended))


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """[B, count] in [0, 1), float64: row i depends on seeds[i] alone, on the CPU wherever the model is."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows)


def inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, V] (of any positive sum) and uniforms [B, 1] in [0, 1) -> token ids [B, 1].

    A token of probability 0 is never drawn: its bin is empty.
    """
    edges = probs.cumsum(-1)
    tokens = torch.searchsorted(edges, uniform * edges[:, -1:], right=True)
    return tokens.clamp_(max=probs.shape[1] - 1)  # only NaN lands behind the last bin


def keep_top_k(probs: torch.Tensor, k: int) -> torch.Tensor:
    """[B, V] with all but the k most probable tokens of a row at 0 (ties with the k-th stay)."""
    least = probs.topk(min(k, probs.shape[1])).values[:, -1:]
    return probs.masked_fill(probs < least, 0.0)


def keep_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """[B, V] with a row's least probable tokens at 0: those kept are the fewest that hold a share p."""
    descending, order = probs.sort(dim=-1, descending=True, stable=True)
    before = descending.cumsum(-1) - descending
    dropped = before >= p * descending.sum(-1, keepdim=True)
    return probs.masked_fill(dropped.scatter(1, order, dropped), 0.0)


def left_padded(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both [B, P]: `generate` appends on the right, so padding goes to the left."""
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


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
