"""Shapes of public models, by which a run is planned before they are downloaded, from their config.json."""

from __future__ import annotations

import re
from typing import Any

from transformers import Qwen2Config

QWEN = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11008, 36, 16, 2),
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
    "32B": (5120, 27648, 64, 40, 8),
}
"""Of Qwen2.5: size -> hidden and intermediate width, layers, heads, key-value heads."""
TIED = {"0.5B", "1.5B", "3B"}
"""Sizes whose head is the embedding."""


def known_config(model: str) -> Any | None:
    """The config of a public model, by its hub name, for its shape alone; None: it is not known here."""
    named = re.fullmatch(r"Qwen/Qwen2\.5-(?:Coder-|Math-)?([\d.]+B)(?:-Instruct)?", model)
    if named is None or named[1] not in QWEN:
        return None
    hidden, intermediate, layers, heads, kv_heads = QWEN[named[1]]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=151936 if named[1] in TIED else 152064,
        tie_word_embeddings=named[1] in TIED,
        max_position_embeddings=32768,
    )
