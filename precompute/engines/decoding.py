"""Token ids -> the text of a response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

KEPT = ("<think>", "</think>", "<answer>", "</answer>")
"""Tags that a response keeps where they are special tokens: verifier and student read them."""


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Returns token -> id of the special tokens (turns, ends, padding), without the tags of KEPT."""
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {token: index for token, index in (added | named).items() if token.strip() not in KEPT}


def response_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Returns the function that decodes a response: without control tokens, and with the tags of KEPT."""
    dropped = frozenset(control_tokens(tokenizer).values())
    has_special_tags = any(
        token.special and str(token).strip() in KEPT for token in tokenizer.added_tokens_decoder.values()
    )

    def decode(ids: Sequence[int]) -> str:
        if not has_special_tags:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True))
        return str(tokenizer.decode([each for each in ids if each not in dropped]))

    return decode


def without_ends(text: str, control: Iterable[str]) -> str:
    """Returns the text without the control tokens that end it, and the space before them."""
    tokens = tuple(control)
    while (stripped := text.rstrip()).endswith(tokens):
        text = stripped.removesuffix(max(filter(stripped.endswith, tokens), key=len)).rstrip()
    return text
