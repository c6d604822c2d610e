"""Four-bit weights (bitsandbytes' nf4 with double quantization), for teachers and student.

Source: QLoRA, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from store.errors import EngineError


def nf4_on(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that quantize linear layers, to compute in `dtype`."""
    nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": nf4, "device_map": {"": device}}


def check_blocks(model: Any, device: torch.device, *, named: str, instead: str) -> None:
    """Raises EngineError where bitsandbytes would compute wrong results: on the CPU it assumes that no block
    of weights with a common scale crosses the end of a row.

    Args:
        named: the user's name of the model, e.g. `model 'x'`.
        instead: the way out.
    """
    if device.type != "cpu":
        return
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            raise EngineError(
                f"{named}: on the CPU bitsandbytes needs layers whose width is a multiple of "
                f"{state.blocksize}; {name} has {state.shape[-1]}: {instead}"
            )
