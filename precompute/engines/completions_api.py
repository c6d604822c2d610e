"""Calls of OpenAI's completions API and their answers.

Servers that are vLLM take the prompt's ids, and return the completion's with their log-probabilities. Of any
other server only the text is sure: it is tokenized again with the teacher's tokenizer (no EOS behind it), and
`logprobs` stays empty, so that `guidance.loss = "shaped_ratio"` refuses its traces.
"""

from __future__ import annotations

from typing import Any

from precompute.engines import Completion, Request, Sampling
from store.errors import EngineError


def plain_call(request: Request, sampling: Sampling, model: str) -> dict[str, Any]:
    """Returns the API's own arguments, and top_k, which many servers know, where it is on."""
    call = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request.seed,
    }
    return call | ({"extra_body": {"top_k": sampling.top_k}} if sampling.top_k else {})


def vllm_call(
    request: Request, sampling: Sampling, model: str, *, stop_ids: tuple[int, ...]
) -> dict[str, Any]:
    """Returns the arguments for vLLM: it shall return ids, and apply no sampling default of its own."""
    more = {
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
    }
    # logprobs = 0: of the sampled token alone; vLLM gives it at temperature 1.
    return plain_call(request, sampling, model) | {"logprobs": 0, "extra_body": more}


def completion_of(request: Request, answer: Any, tokenizer: Any, *, url: str) -> Completion | None:
    """Returns the completion; None if the server broke it off. EngineError if it is of another prompt."""
    choices = getattr(answer, "choices", None)
    if not choices:
        raise EngineError(f"{url} answers with something that is no completion")
    choice = choices[0]
    if choice.finish_reason == "abort":
        return None
    ids = getattr(choice, "token_ids", None)
    if ids is not None:
        read = getattr(choice, "prompt_token_ids", None)
        if read is not None and tuple(read) != request.prompt_ids:
            raise EngineError(
                f"{url} was sent a prompt of {len(request.prompt_ids)} tokens and read another of {len(read)}"
            )
        logprobs, text = _logprobs(choice, len(ids)), tokenizer.decode(ids, skip_special_tokens=True)
    else:
        text, logprobs = choice.text, ()
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Completion(
        request_id=request.request_id,
        token_ids=tuple(ids),
        logprobs=logprobs,
        # Any other reason is a cut as well.
        finish_reason="stop" if choice.finish_reason == "stop" else "length",
        text=text,
    )


def _logprobs(choice: Any, count: int) -> tuple[float, ...]:
    """Returns [T]; empty unless every token has one."""
    found = getattr(choice.logprobs, "token_logprobs", None) or []
    return tuple(found) if len(found) == count and None not in found else ()
